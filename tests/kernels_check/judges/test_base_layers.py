"""Tests that the tensors of the base prove its storage, its precision and that it is frozen."""

import pytest
import torch

from kernels_check.observe.adapter import adapter_layers


def _bases(run):
    return [layer.base for layer in adapter_layers(run.model)]


def test_an_unset_compute_dtype_is_read_after_the_first_forward(training):
    """bitsandbytes sets an unset compute dtype from its first input."""
    assert training(compute=None, dtype="bfloat16").check("base.compute_dtype", "bfloat16").met


def test_a_bias_cast_by_the_forward_is_no_training(training):
    """bitsandbytes casts a float32 bias to the compute dtype in the first forward; the reason says so."""
    run = training()
    base = _bases(run)[0]
    base.bias = torch.nn.Parameter(torch.full((128,), 0.1), requires_grad=False)
    check = run.check("base.frozen", True)
    assert check.met
    assert "cast once by the forward" in check.reason
    assert "q_proj.base_layer.bias" in check.reason


def test_a_step_in_eval_mode_that_repacks_the_base_is_seen(training):
    """A base whose bytes change during the step is not called frozen or double quantised."""
    run = training()
    if not _bases(run)[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes does not repack")
    run.model.eval()
    check = run.check("base.frozen", True)
    assert check.status == "unknown"
    assert "repacked Linear4bit weights in place" in check.reason
    assert "packed_cpu" in run.check("base.gemm_path", "dequantize").observed
    assert run.check("base.double_quant", True).status != "active"


def test_the_gemm_path_of_a_float_base_is_not_applicable(training):
    """A float base has no 4-bit product."""
    assert training(quant=None).check("base.gemm_path", "dequantize").status == "not_applicable"
