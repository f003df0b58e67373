"""Verified runs drawn at random train on like their twins that were never verified."""

import bitsandbytes as bnb
import pytest
import torch
from negative_controls.random_run import check_restored
from torch import nn

from kernels_check import verify

SEEDS, BLOCK = 200, 25


@pytest.fixture
def trained():
    """A model, its optimizer, and one step of them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(3, 4)).pow(2).sum().backward()
        optimizer.step()

    return model, optimizer, step


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_runs_drawn_at_random_equal_their_twins(first):
    """After a spied step, state and the next three losses are those of a run that was never watched."""
    assert not [told for seed in range(first, first + BLOCK) if (told := check_restored(seed))]


def test_runs_drawn_at_random_equal_their_twins_under_the_profiler():
    """The profiler leaves a run as it was as well."""
    assert not [told for seed in range(SEEDS, SEEDS + 12) if (told := check_restored(seed, "profile"))]


@pytest.mark.parametrize("instrument", ["spy", "profile"])
def test_sparse_gradients_come_back(instrument):
    """A sparse gradient is judged, and one that was there before keeps identity and value."""
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    words = torch.tensor([1, 2, 2])
    model(words).sum().backward()
    gradient, before = model[0].weight.grad, model[0].weight.grad.to_dense()

    def step():
        model(words).pow(2).sum().backward()
        optimizer.step()

    verify(model, step, {}, instrument=instrument)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)


def test_layers_that_share_an_adapter_keep_no_hook(training):
    """One lora_A in two layers is watched once, under both names, and let go."""
    run = training()
    first, second = (module for name, module in run.model.named_modules() if name.endswith("q_proj"))
    second.lora_A["default"] = first.lora_A["default"]
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad])
    assert run.check("lora.attached").observed is True
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_a_frozen_parameter_changed_in_place_is_reported_and_not_restored(trained):
    """Control: the base is too large to be copied, and ``base.frozen`` says that it changed."""
    model, _, step = trained
    model[0].weight.requires_grad_(False)

    def change():
        step()
        model[0].weight.add_(1)

    before = model[0].weight.clone()
    checks = {check.path: check for check in verify(model, change, {}, instrument="spy")}
    assert checks["base.frozen"].observed is False
    assert not torch.equal(model[0].weight, before)


def test_weights_packed_by_an_evaluation_step_are_unpacked_again(training):
    """bitsandbytes repacks 4-bit weights in place in evaluation, after which no gradient passes through them."""
    run = training()
    layer = next(module for name, module in run.model.named_modules() if name.endswith("q_proj.base_layer"))
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512_BF16, so nothing is packed")
    before = layer.weight.data.clone()

    def evaluate():
        run.model.eval()
        with torch.no_grad():
            run.model(**run.inputs)

    run.verify({}, evaluate)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data, before)
    run.step()


def test_the_digest_leaves_memory_that_can_be_resized(trained):
    """Some trainers free and allocate the memory of weights themselves."""
    model, _, step = trained
    verify(model, step, {}, instrument="spy")
    model[0].weight.untyped_storage().resize_(128)


def test_eight_bit_scales_that_move_in_the_first_forward_move_back(training):
    """LLM.int8 before its first step: its scales lie on the weight again, and nothing of the base has changed."""

    def to_int8(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    run, twin = training(quant=to_int8), training(quant=to_int8)
    layer = next(module for name, module in run.model.named_modules() if name.endswith("q_proj.base_layer"))
    scales = layer.weight.SCB
    assert run.check("base.frozen", True).met
    assert layer.weight.SCB is scales
    assert layer.state.SCB is None
    run.losses.clear()
    for _ in range(2):
        torch.manual_seed(2)
        run.step()
        torch.manual_seed(2)
        twin.step()
    assert run.losses == twin.losses
