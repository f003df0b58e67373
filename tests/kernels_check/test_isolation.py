"""Tests that forward passes of the watched step decide whether packed records are isolated from each other."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kernels_check

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (7, 9, 8)
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
POSITIONS = torch.tensor([[place for length in LENGTHS for place in range(length)]] * 2)
NUMBERS = (POSITIONS == 0).cumsum(dim=1)
CAUSAL = torch.ones(2, 4, 24, 24, dtype=torch.bool).tril()
BLOCKS = CAUSAL & (NUMBERS[:, :, None] == NUMBERS[:, None, :])[:, None]


def build(config=None, attention="sdpa", **more):
    """A small model with random weights."""
    torch.manual_seed(0)
    config = config or LlamaConfig(**SIZES | {"pad_token_id": 0, "bos_token_id": 1} | more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def take_step(model, optimizer, inputs):
    optimizer.zero_grad()
    loss = model(**{"labels": inputs.get("input_ids")} | inputs).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def batch(rows=2, **more):
    """Rows of three records; their positions are passed on unless others are given."""
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))[:rows]
    return {"input_ids": ids, "position_ids": POSITIONS[:rows], "use_cache": False} | more


def judge(model, inputs):
    """The check of a watched step."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    with kernels_check.watch(model, {"packing.isolated": True}) as watched:
        take_step(model, optimizer, inputs)
    return next(check for check in watched.checks if check.path == "packing.isolated")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Bamba", {"attn_layer_indices": [1], **MAMBA}),
        ("FalconH1", {"head_dim": 16, "mamba_d_ssm": 128, **MAMBA}),
        ("Jamba", {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "num_experts_per_tok": 1,
                   "use_mamba_kernels": False, "mamba_d_state": 8}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
        ("Qwen3_5Text", LINEAR),
    ],
)  # fmt: skip
def test_a_state_that_crosses_records_is_a_leak(name, settings):
    """Recurrent and convolutional layers carry a state over restarting positions, beside attention with a mask."""
    check = judge(build(getattr(transformers, f"{name}Config")(**SIZES | settings), None), batch())
    assert check.status == "fallback", check
    assert "first those of record 2" in check.reason


def without_mask(module, query, key, value, attention_mask, **more):
    return sdpa_attention_forward(module, query, key, value, None, **more)


AttentionInterface.register("without_mask", without_mask)
AttentionMaskInterface.register("without_mask", sdpa_mask)
PADDED = torch.where(torch.arange(24) < 21, NUMBERS, 0)
BETWEEN = NUMBERS.masked_fill((torch.arange(24) >= 5) & (torch.arange(24) < 9), 0)
FIRST_ONLY = CAUSAL & ~((POSITIONS == 0)[:, None, :, None] & ~BLOCKS)
THREE_HEADS = torch.where(torch.arange(4)[:, None, None] > 0, CAUSAL, BLOCKS)
FIRST_HEAD = torch.where(torch.arange(4)[:, None, None] > 0, BLOCKS, CAUSAL)


def add(mask: Tensor, low: float) -> Tensor:
    """The additive form of a boolean mask."""
    return torch.zeros(mask.shape).masked_fill(~mask, low)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "mask",
    [NUMBERS, PADDED, BETWEEN, FIRST_ONLY, THREE_HEADS, FIRST_HEAD, add(BLOCKS, -3.0)],
    ids=["numbered", "numbered and padded", "padded between", "first token", "three heads", "first head", "soft"],
)
def test_a_mask_that_does_not_separate_is_a_leak(attention, mask):
    """A mask shows records, and their tokens still see others: the model reads 1 … n as ones, or the mask has gaps."""
    check = judge(build(attention=attention), batch(attention_mask=mask, position_ids=None))
    assert check.status == "fallback", check


def test_a_mask_that_attention_ignores_is_a_leak():
    """A correct mask of blocks does not help if the attention function drops it."""
    check = judge(build(attention="without_mask"), batch(attention_mask=BLOCKS, position_ids=None))
    assert check.status == "fallback", check


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("inputs", "use_cache"),
    [
        ({}, True),
        ({"use_cache": None}, False),
        ({"attention_mask": add(BLOCKS, torch.finfo(torch.float32).min)}, True),
        ({"attention_mask": add(BLOCKS, -torch.inf), "position_ids": None}, True),
    ],
    ids=["positions", "cache off in the configuration", "additive mask", "additive mask alone"],
)
def test_isolated_records_are_active(attention, inputs, use_cache):
    """Positions without a cache, and masks of blocks with or without positions, isolate the records."""
    check = judge(build(attention=attention, use_cache=use_cache), batch(**inputs))
    assert check.status == "active", check


def test_a_boolean_mask_separates_only_where_attention_reads_it():
    """SDPA reads a boolean mask; eager attention adds it to the scores, so that all tokens see each other."""
    statuses = [judge(build(attention=one), batch(attention_mask=BLOCKS)).status for one in ("sdpa", "eager")]
    assert statuses == ["active", "fallback"]


@pytest.mark.parametrize("lengths_too", [False, True])
def test_a_flattened_batch_is_judged(lengths_too):
    """transformers' collator for flattened batches isolates them by positions; lengths alone do nothing in SDPA."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_too)
    row = batch()["input_ids"][0].tolist()
    inputs = collate([{"input_ids": row[:7]}, {"input_ids": row[7:16]}, {"input_ids": row[16:]}])
    model = build(use_cache=False)
    assert judge(model, inputs).status == "active"
    if lengths_too:
        assert judge(model, {**inputs, "position_ids": None}).status == "fallback"


class Wrapped(nn.Module):
    """A model that makes its own mask, embeddings or scale."""

    def __init__(self, kind, model=None):
        super().__init__()
        self.inner = model or build()
        self.config = self.inner.config
        self.kind = kind
        self.generator = torch.Generator()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, input_ids, position_ids, labels=None, use_cache=False):
        self.calls += 1
        self.last = self.calls.clone()
        embedded = self.inner.get_input_embeddings()(input_ids)
        numbers = (position_ids == 0).cumsum(dim=1)
        seen = numbers[:, :, None] == numbers[:, None, :]
        if self.kind == "next but one":
            seen = numbers[:, :, None] % 2 == numbers[:, None, :] % 2
        if self.kind == "first token":
            seen[:, :, 0] = True
        if self.kind == "noise":
            embedded = embedded + torch.rand(embedded.shape, generator=self.generator)
        if self.kind == "drawn noise":
            embedded = embedded + torch.rand(embedded.shape)
        output = self.inner(inputs_embeds=embedded, attention_mask=seen.tril()[:, None], use_cache=False, labels=labels)
        if self.kind == "scaled over the batch":
            output.logits = output.logits * output.logits.detach().abs().amax()
        return output


@pytest.mark.parametrize(
    ("kind", "rows", "status"),
    [
        ("plain", 2, "active"),
        ("next but one", 2, "fallback"),
        ("first token", 2, "fallback"),
        ("noise", 2, "unknown"),
        ("drawn noise", 2, "active"),
        ("scaled over the batch", 1, "active"),
    ],
)
def test_what_a_model_does_itself_is_judged(kind, rows, status):
    """A leak to the next record but one, or of each row's first token, is found; noise of an own generator makes the
    path unknown; a scale over the batch is no leak between records."""
    ids = batch(rows)["input_ids"].masked_fill(POSITIONS[:rows] == 0, 1)
    check = judge(Wrapped(kind), batch(rows, input_ids=ids))
    assert check.status == status, check


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("cached", "status"), [(False, "active"), (True, "fallback")])
def test_groups_of_experts_are_no_leak(rows, cached, status):
    """A change that routes other tokens changes the size of the groups, and so the rounding, of all tokens."""
    config = transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2)
    check = judge(build(config), batch(rows, use_cache=cached))
    assert check.status == status, check


def test_padding_with_its_own_positions_is_not_changed():
    """Padding at the end of a row may count as a record, but it holds nothing that could reach others."""
    ids = batch()["input_ids"].masked_fill(NUMBERS == 3, 0)
    assert judge(build(), batch(input_ids=ids)).status == "active"


def test_embeddings_are_changed_where_no_tokens_are_given():
    """Inputs as embeddings are judged as well."""
    inputs = batch(inputs_embeds=torch.randn(2, 24, 64), input_ids=None, labels=batch()["input_ids"])
    assert judge(build(), inputs).status == "active"
    assert judge(build(), inputs | {"use_cache": True}).status == "fallback"


def test_the_watched_training_goes_on_as_without_the_probe():
    """Random numbers, buffers, modes, hooks and the next losses equal those of a twin that is not watched."""
    plain = Wrapped("plain", build(attention_dropout=0.3)).train()
    plain.inner.model.layers[0].mlp.eval()
    watched = copy.deepcopy(plain)
    inputs, states = batch(), []
    for model in (plain, watched):
        optimizer, watch = (
            torch.optim.SGD(model.parameters(), lr=0.1),
            kernels_check.watch(model, {"packing.isolated": True}),
        )
        torch.manual_seed(3)
        losses = []
        for _ in range(2):
            if model is plain:
                losses.append(take_step(model, optimizer, inputs))
                continue
            with watch:
                losses.append(take_step(model, optimizer, inputs))
            check = next(check for check in watch.checks if check.path == "packing.isolated")
            assert (check.status, "perturbations" in check.reason) == ("active", True), check
        modes = [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
        gradients = [float(one.grad.sum()) for one in model.parameters() if one.grad is not None]
        buffers = model.calls.item(), model.last.item()
        states.append((losses, modes, gradients, buffers, torch.get_rng_state().tolist()))
    assert states[0] == states[1]
