"""Packed records that see each other are found by changing one and looking at the others."""

import pytest
import torch

import kernels_check
from kernels_check.observation.isolation import record_numbers


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


def test_attention_to_the_future_is_a_leak(training):
    """Isolated records are still wrong if a later token changes an earlier logit."""
    run = training()
    for module in run.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    both = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    both[0, :, :6, 6:] = both[0, :, 6:, :6] = both[1, :, :8, 8:] = both[1, :, 8:, :8] = False
    check = kernels_check.probe_isolation(run.model, _packed(run, use_cache=False, attention_mask=both))
    assert check.status == "fallback"
    assert "changing the last token" in check.reason
    assert "changing the first record" not in check.reason


def test_one_record_a_row_is_unknown(training):
    """Nothing is packed, so nothing is proved."""
    run = training()
    check = kernels_check.probe_isolation(run.model, {**run.inputs, "position_ids": torch.arange(16).repeat(2, 1)})
    assert check.status == "unknown"


def test_a_probe_that_changes_nothing_proves_nothing(training):
    """A model deaf to its input is not isolated, it is broken."""
    run = training()
    embedding = run.model.get_input_embeddings()
    torch.nn.init.ones_(embedding.weight)
    assert kernels_check.probe_isolation(run.model, _packed(run, use_cache=False)).status == "unknown"


def test_a_noisy_forward_is_unknown(training):
    """Where two equal forwards differ, a difference proves no leak."""
    run = training()
    embedding = run.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    check = kernels_check.probe_isolation(run.model, _packed(run, use_cache=False))
    assert check.status == "unknown"
    assert "two forwards of the same batch differ" in check.reason


def test_a_batch_without_positions_is_unknown(training):
    """The exception becomes the reason."""
    run = training()
    check = kernels_check.probe_isolation(run.model, run.inputs)
    assert check.status == "unknown"
    assert "KeyError: 'position_ids'" in check.reason


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


def test_records_are_numbered_where_positions_restart():
    """A restart, or any jump, begins a record; rows count on their own."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [5, 6, 0, 0, 1]])
    assert record_numbers(positions).tolist() == [[0, 0, 0, 1, 1], [0] * 5, [0, 0, 1, 2, 2]]
