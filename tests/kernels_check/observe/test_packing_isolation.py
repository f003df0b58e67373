"""Packed records that see each other are found by changing one and looking at the others."""

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import transformers
from negative_controls.batch_controls import eight_bit

import kernels_check
from kernels_check.observe.records import record_numbers


@pytest.fixture
def instrument():
    """The probe forwards by itself and needs none."""
    return "profile"


def _packed(run, **more):
    return {**run.inputs, "position_ids": torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]]), **more}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_cache_records_are_isolated(training, attention):
    """The block mask is derived from the positions, to the bit."""
    run = training(attention=attention)
    check = kernels_check.probe_isolation(run.model, _packed(run, use_cache=False))
    assert (check.status, check.observed) == ("active", True)
    assert "4 records" in check.reason


def test_the_default_cache_leaks(training):
    """With the default use_cache packed detection is skipped, in train and in eval."""
    run = training()
    check = kernels_check.probe_isolation(run.model, _packed(run))
    assert (check.status, check.observed) == ("fallback", False)
    assert "train: changing the first record" in check.reason
    assert "eval: changing the first record" in check.reason
    assert "use_cache=False" in check.reason


def test_an_all_ones_mask_leaks(training):
    """A two-dimensional mask disables packed detection too."""
    run = training()
    batch = _packed(run, use_cache=False, attention_mask=torch.ones_like(run.inputs["input_ids"]))
    assert kernels_check.probe_isolation(run.model, batch).status == "fallback"


def test_checkpointing_hides_the_leak_in_training_only(training):
    """It forces use_cache off where gradients are on, and evaluation leaks again."""
    run = training()
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check = kernels_check.probe_isolation(run.model, _packed(run))
    assert check.status == "fallback"
    assert "train:" not in check.reason
    assert "eval:" in check.reason


def test_one_record_a_row_is_unknown(training):
    """Nothing is packed, so nothing is proved."""
    run = training()
    check = kernels_check.probe_isolation(run.model, {**run.inputs, "position_ids": torch.arange(16).repeat(2, 1)})
    assert check.status == "unknown"


def test_a_batch_without_positions_is_unknown(training):
    """With what to pass."""
    run = training()
    check = kernels_check.probe_isolation(run.model, run.inputs)
    assert check.status == "unknown"
    assert "pass position_ids that restart at each record" in check.reason


def test_the_probe_leaves_weights_modes_and_generators_as_found(training):
    """The eval forward does not repack 4-bit weights, and training goes on bit for bit."""
    run = training(lora_dropout=0.3)
    layers = [module for module in run.model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    odd = next(module for name, module in run.model.named_modules() if name.endswith("layers.0.mlp"))
    odd.training = False
    modes = [module.training for module in run.model.modules()]
    shapes = [layer.weight.shape for layer in layers]
    switches = [layer.support_avx512bf16_for_cpu for layer in layers]
    generator = torch.get_rng_state()
    kernels_check.probe_isolation(run.model, _packed(run, use_cache=False))
    assert torch.equal(generator, torch.get_rng_state())
    assert [module.training for module in run.model.modules()] == modes
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == switches
    assert [layer.weight.shape for layer in layers] == shapes
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert all(value.grad is None for value in run.model.parameters())
    assert run.check("lora.learning", True).met


def _gpt2(**dropout):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64, **dropout)
    return transformers.GPT2LMHeadModel(config)


def _opt(**dropout):
    config = transformers.OPTConfig(
        num_hidden_layers=2,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_attention_heads=4,
        vocab_size=96,
        ffn_dim=64,
        max_position_embeddings=64,
        **dropout,
    )
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "masked"),
    [
        (_gpt2, False),
        (_opt, True),
        (partial(_gpt2, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), False),
        (partial(_opt, attention_dropout=0.5, dropout=0.5), True),
    ],
)
def test_dropout_in_a_function_hides_nothing(build, masked):
    """The same masks are drawn for every forward, so that isolation and a leak can be told.

    OPT makes its mask without its positions, so that it takes a mask of blocks to isolate its records.
    """
    model = build()
    batch = {
        "input_ids": torch.randint(3, 96, (2, 16)),
        "position_ids": torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]]),
    }
    numbers = record_numbers(batch["position_ids"])
    blocks = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
    sound = {**batch, "use_cache": False} | ({"attention_mask": blocks} if masked else {})
    check = kernels_check.probe_isolation(model, sound)
    assert check.met, check.reason
    assert "in train and in eval" in check.reason
    check = kernels_check.probe_isolation(model, {**batch, "use_cache": False if masked else None})
    assert check.status == "fallback"
    assert "a mask of blocks" in check.reason
    assert kernels_check.probe_isolation(model, {**sound, "return_dict": False}).met


def test_attention_dropout_of_the_layers_hides_nothing(training):
    """It is a number of the layer's and no module."""
    run = training(attention_dropout=0.4)
    assert kernels_check.probe_isolation(run.model, _packed(run, use_cache=False)).met
    assert kernels_check.probe_isolation(run.model, _packed(run)).status == "fallback"


def test_outlier_columns_over_the_batch_are_no_leak(training):
    """LLM.int8 picks them over all rows; while records are probed it picks none, and then as before."""

    run = training(quant=eight_bit, dtype="float16")
    check = kernels_check.probe_isolation(run.model, _packed(run, use_cache=False))
    assert check.met, check.reason
    assert kernels_check.probe_isolation(run.model, _packed(run)).status == "fallback"
    layers = [module for module in run.model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert {layer.state.threshold for layer in layers} == {1.0}


def test_a_model_without_a_head_is_told_by_its_hidden_states(training):
    """Any output with features for each token will do."""
    run = training(quant=None)
    body = run.model.base_model.model.model
    assert kernels_check.probe_isolation(body, _packed(run, use_cache=False)).met
    assert kernels_check.probe_isolation(body, _packed(run)).status == "fallback"


def test_positions_for_all_rows_at_once(training):
    """One row of positions, which the model spreads over the batch."""
    run = training()
    shared = {**run.inputs, "use_cache": False, "position_ids": torch.tensor([[*range(6), *range(10)]])}
    assert "4 records" in kernels_check.probe_isolation(run.model, shared).reason
    assert kernels_check.probe_isolation(run.model, shared).met


def test_a_row_padded_on_its_left_is_judged_without_its_padding(training):
    """What the mask hides is no record, and the mask of two dimensions loses the boundary."""
    run = training()
    batch = _packed(run, use_cache=False, attention_mask=torch.ones(2, 16, dtype=torch.long))
    batch["attention_mask"][:, :3] = 0
    batch["position_ids"] = torch.tensor([[1, 1, 1, *range(5), *range(8)]]).repeat(2, 1)
    check = kernels_check.probe_isolation(run.model, batch)
    assert check.status == "fallback"
    assert "2 of 4 records see others" in check.reason


def test_an_encoder_decoder_is_unknown():
    """Its inputs tell of no records."""
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    positions = torch.arange(4).repeat(1, 2)
    check = kernels_check.probe_isolation(model, {"input_ids": torch.randint(3, 50, (1, 8)), "position_ids": positions})
    assert check.status == "unknown"
    assert "an encoder-decoder is told of no records" in check.reason


def test_a_model_that_is_distributed_is_probed_inside(training):
    """A forward of the wrapper's own would leave it waiting for a backward pass; here it has no group to wait for."""
    run = training(quant=None)
    kind = torch.nn.parallel.DistributedDataParallel
    wrapper = kind.__new__(kind)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = run.model
    with pytest.raises(AttributeError):
        wrapper(**run.inputs)
    assert kernels_check.probe_isolation(wrapper, _packed(run, use_cache=False)).met
    assert kernels_check.probe_isolation(wrapper, _packed(run)).status == "fallback"
