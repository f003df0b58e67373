"""Tests of the FLOPs of a step, counted from the modules of a model, against torch's own counter."""

from __future__ import annotations

import json
from math import prod
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from lorameter.models.costs.flops import (
    StepTokens,
    UncountedError,
    computed_tokens,
    count_products,
    from_values,
    to_values,
)
from lorameter.models.shapes import FAMILIES
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.profiling.phases import watch_gradients
from lorameter.trial.step import TrainStep

ROWS, LENGTH = 2, 32


def _attention(query, key, value, *_, **__):
    return sdpa_flop_count(query, _each_head(key, query), _each_head(value, query))


def _attention_backward(gradient, query, key, value, *_, **__):
    return sdpa_backward_flop_count(gradient, query, _each_head(key, query), _each_head(value, query))


def _each_head(shape, query):
    """Return the shape of keys or values (rows, heads, length, width), repeated for each head of the query."""
    return (shape[0], query[1], *shape[2:])


def _batched_product(left, right, *_, **__):
    """Count (b, m, k) times (b, k, n); an outer product (k = 1), as in older rotary embeddings, does not count."""
    return 2 * prod(left) * right[2] if left[2] > 1 else 0


def _product(inputs, weight, *_, **__):
    return 2 * prod(inputs) * weight[0]


def _packed_product(inputs, packed, weight, *_, **__):
    return 2 * prod(inputs) * weight[0]


FORMULAS = {
    ("aten", "bmm"): _batched_product,
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"): _attention,
    ("aten", "_scaled_dot_product_flash_attention_for_cpu_backward"): _attention_backward,
    ("bitsandbytes", "gemm_4bit"): _packed_product,
    ("bitsandbytes", "gemv_4bit"): _packed_product,
    ("bitsandbytes", "int8_linear_matmul"): _product,
    ("bitsandbytes", "int8_scaled_mm"): _product,
    ("bitsandbytes", "int8_mixed_scaled_mm"): _packed_product,
}
"""Operators that torch's counter does not know: the CPU's flash attention, and bitsandbytes' products of quantised
weights. Their backward passes call products of aten. A formula counts what an operator is given: attention over every
pair of a row, whatever its mask."""


def count_flops(call):
    """Return the FLOPs of a call as torch counts them, and whether its attention is one operator."""
    known = {getattr(getattr(torch.ops, library), name, None): formula for (library, name), formula in FORMULAS.items()}
    known.pop(None, None)
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    found = counter.get_flop_counts().get("Global", {})
    return sum(found.values()), any("dot_product" in str(operator) for operator in found)


QV = ("q_proj", "v_proj")


def batch(layout):
    """Return two rows of tokens: one record in each, two isolated records in each, or the second row half padding."""
    tokens = torch.randint(3, 120, (ROWS, LENGTH))
    inputs = {"input_ids": tokens, "labels": tokens.clone()}
    if layout == "padded":
        mask = torch.ones_like(tokens)
        mask[1, LENGTH // 2 :] = 0
        return inputs | {"attention_mask": mask}
    length = LENGTH if layout == "one record" else LENGTH // 2
    return inputs | {"position_ids": torch.arange(length).repeat(ROWS, LENGTH // length)}


def train_step(variant, layout="one record", model="tiny-llama"):
    """Return a step of a trial, and the tokens that it computes."""
    workload = Workload(model=model, batch_size=ROWS, sequence_length=LENGTH)
    request = TrialRequest(
        trial="t", variant=variant, role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1, tokens_path="", scratch="",
        log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    trainee = build(request, steps=10, shared=SharedBase())
    stream = SimpleNamespace(take=lambda: batch(layout))
    return TrainStep(trainee, stream, variant, "cpu"), computed_tokens(variant, workload)


def assert_counted(variant, layout="one record", folder=None, model_type="llama"):
    """Assert that the count agrees within 3 % with torch's count of a step of tiny-llama, or of two narrow blocks of a
    family; within 5 % with DoRA, whose product with an identity matrix counts more in narrow layers."""
    model = "tiny-llama"
    if folder is not None:
        config = SMALL | {"model_type": model_type, "head_dim": 32 if model_type == "gemma" else 16}
        (folder / "config.json").write_text(json.dumps(config))
        model = f"random:{folder}"
    step, tokens = train_step(variant, layout, model)
    products = count_products(step._trainee.model, watch_gradients(step._trainee.model, step))
    total, fused = count_flops(step)
    found = products.flops(tokens, checkpointing=variant.gradient_checkpointing, fused=fused)
    assert found.hardware == pytest.approx(total, rel=0.05 if variant.use_dora else 0.03)
    assert from_values(to_values(products)) == products
    assert from_values({}) is None


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ("all-linear",), "quantization": "nf4"}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_the_flops_of_a_step_are_counted(options):
    """The count covers forward, backward, clipping and update of LoRA and QLoRA."""
    assert_counted(LoraVariant(**{"r": 4, "target_modules": QV, **options}))


@pytest.mark.parametrize("layout", ["two records", "padded"])
def test_masked_pairs_are_computed(layout):
    """Packed records and padding cost as much as a full row, because the operator gets a mask."""
    assert_counted(LoraVariant(r=4, target_modules=QV), layout)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "eager", "target_modules": ("k_proj",), "gradient_checkpointing": True},
        {"quantization": "int8", "target_modules": QV, "gradient_checkpointing": True},
        {"use_dora": True, "lora_dropout": 0.1, "gradient_checkpointing": True, "gradient_accumulation": 2},
        {"dtype": "float32", "autocast": "bfloat16", "lora_dropout": 0.1, "use_rslora": True},
        {"quantization": "nf4", "prepare_for_kbit": True, "gradient_checkpointing": True},
    ],
    ids=" ".join,
)
def test_options_that_change_a_step(tmp_path, options):
    """The count covers eager attention, a subset of the layers, int8, DoRA with dropout over several passes, autocast
    and preparation."""
    assert_counted(LoraVariant(r=4, **options), folder=tmp_path)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "llama"])
def test_every_family(tmp_path, model_type):
    """The count covers grouped keys, head sizes independent of the width, and tied heads."""
    variant = LoraVariant(r=4, target_modules=("all-linear",), dtype="float32")
    assert_counted(variant, folder=tmp_path, model_type=model_type)


SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attn_pdrop": 0.0,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
OTHERS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": {"n_head": 4},
    "cohere": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
}
"""Small models of other families: a Conv1D, parallel attention and feed-forward, one layer for query, key and value,
experts, and keys and values of different widths."""
STEP = StepTokens(positions=ROWS * LENGTH, pairs=ROWS * LENGTH**2)
LORA, EXPERTS = "all-linear", ["q_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"]


def built(model_type, targets, **extra):
    """Build a model of a family, with an adapter or fully trained, and a step of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **extra})
    attention = "sdpa" if model_type != "deepseek_v3" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    if targets:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    tokens = torch.randint(3, 120, (ROWS, LENGTH))
    return model.train(), lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


@pytest.mark.parametrize(
    ("model_type", "whole"), [*((name, False) for name in OTHERS), ("gpt2", True), ("mixtral", True)]
)
def test_other_families_are_counted(model_type, whole):
    """The count is within 1 % for models with a router of experts and within 0.2 % for others, with an adapter or full
    training."""
    experts = model_type in ("mixtral", "deepseek_v3")
    model, step = built(model_type, None if whole else EXPERTS if experts else LORA, **OTHERS[model_type])
    total, fused = count_flops(step)
    flops = count_products(model, watch_gradients(model, step)).flops(STEP, fused=fused)
    assert flops.hardware == pytest.approx(total, rel=0.01 if experts else 0.002)


class Towers(torch.nn.Module):
    """A text model with a vision tower, and a layer whose weight is used without calling the layer."""

    def __init__(self):
        super().__init__()
        block = [torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU()]
        self.text = torch.nn.ModuleList([torch.nn.Sequential(*block), torch.nn.Linear(8, 4, bias=False)])
        self.picture = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        self.inner = Inner()

    def forward(self, hidden):
        for one in (self.text[0][0], self.text[1]):  # the parts of a ModuleList are called, not the list
            hidden = one(hidden)
        return self.inner(hidden).sum()


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used = torch.nn.Linear(4, 4, bias=False)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.used.weight)


def test_modules_that_a_step_does_not_use_are_not_counted():
    """A vision tower is not counted; a part of a called module is counted, whether it was called itself or not."""
    model = Towers()
    wanted = watch_gradients(model, lambda: model(torch.ones(3, 8)).backward())
    counted = count_products(model, wanted)
    assert counted.plain == counted.weights == 8 * 8 + 8 * 4 + 4 * 4
    assert counted.inputs == 8 * 4 + 4 * 4
    assert count_products(model).plain == counted.plain + 64 * 64


def test_experts_with_an_adapter():
    """The count is within 5 %, because PEFT computes the whole update twice in each pass and a step needs it once."""
    model, step = built("mixtral", LORA, **OTHERS["mixtral"])
    flops = count_products(model, watch_gradients(model, step)).flops(STEP)
    assert flops.hardware == pytest.approx(count_flops(step)[0], rel=0.05)


def test_a_step_that_was_not_watched_is_counted_in_the_order_of_the_modules():
    """The inputs of the first block are counted in excess: at most 5 % with two blocks, and a third of that with
    eight."""
    errors = []
    for layers in (2, 8):
        model, step = built("llama", LORA, num_hidden_layers=layers)
        errors.append(count_products(model).flops(STEP).hardware / count_flops(step)[0] - 1)
    assert 0 < errors[1] < 0.35 * errors[0] < 0.35 * 0.05


def test_adapters_of_other_trials_are_not_counted():
    """Only the active adapter is counted; a model without linear layers, or with an unknown number of experts for each
    token, is an error."""
    model, _ = built("opt", LORA, **OTHERS["opt"])
    alone = count_products(model)
    model.add_adapter("other", LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_adapter("default")
    assert count_products(model) == alone
    with pytest.raises(UncountedError, match="no linear layer"):
        count_products(torch.nn.Embedding(4, 4))
    model, _ = built("mixtral", None, **OTHERS["mixtral"])
    model.config = SimpleNamespace(num_attention_heads=4, hidden_size=64)
    with pytest.raises(UncountedError, match="how many of 4 experts"):
        count_products(model)
