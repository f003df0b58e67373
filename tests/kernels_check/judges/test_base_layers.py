"""Storage, precision and stillness of the base are proved from its tensors."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu

from kernels_check.judges import base_layers
from kernels_check.observation.adapter_layers import adapter_layers
from kernels_check.observation.storage import read_storage


def _bases(run):
    return [layer.base for layer in adapter_layers(run.model)]


def test_bits_per_weight_tell_double_quantisation(training):
    """4.127 bits with nested scales, 4.500 without."""
    for double, bits in ((True, 4.127), (False, 4.5)):
        for base in _bases(training(double=double)):
            stored = read_storage(base)
            assert stored.bits == 4
            assert stored.double_quant is double
            assert abs(stored.bits_per_weight - bits) < 0.01


def test_fp4_is_not_nf4(training):
    """The library's default type is caught, and every layer is named or counted."""
    check = training(quant="fp4").check("base.quant_type", "nf4")
    assert (check.status, check.observed) == ("fallback", "fp4")
    assert "0 of 4 targeted layers: nf4" in check.reason
    assert "q_proj (fp4)" in check.reason


def test_missing_double_quantisation_is_seen(training):
    """Plain float32 scales are no double quantisation."""
    check = training(double=False).check("base.double_quant", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert training(double=False).check("base.double_quant", False).met


def test_float32_compute_is_seen(training):
    """An explicit float32, and an unset dtype that follows a float32 model."""
    check = training(compute="float32").check("base.compute_dtype", "bfloat16")
    assert (check.status, check.observed) == ("fallback", "float32")
    check = training(compute=None, dtype="float32").check("base.compute_dtype", "bfloat16")
    assert (check.status, check.observed) == ("fallback", "float32")


def test_an_unset_compute_dtype_is_read_after_the_first_forward(training):
    """bitsandbytes sets it from its first input."""
    assert training(compute=None, dtype="bfloat16").check("base.compute_dtype", "bfloat16").met


def test_a_float32_origin_is_noted(training):
    """Backward dequantises to the dtype that the base was loaded in."""
    check = training(dtype="float32").check("base.compute_dtype", "bfloat16")
    assert check.met
    assert "backward dequantises to float32" in check.reason


def test_one_unquantised_target_is_named(training):
    """Three of four targets in 4 bits are not a 4-bit base."""
    run = training(unquantised=("lm_head", "layers.1.self_attn.v_proj"))
    check = run.check("base.bits", 4)
    assert check.status == "fallback"
    assert check.observed == "16+4"
    assert "3 of 4 targeted layers: 4" in check.reason
    assert "layers.1.self_attn.v_proj (16)" in check.reason


def test_untargeted_layers_do_not_matter(training):
    """lm_head stays in float by design."""
    assert training().check("base.bits", 4).met


def test_bytes_that_do_not_add_up_prove_nothing(training):
    """A layer that only claims to be packed is unknown, with both numbers."""
    run = training()
    weight = _bases(run)[0].weight
    state = weight.quant_state
    weight.data = torch.zeros(128, 128, dtype=torch.uint8)
    stored = read_storage(_bases(run)[0])
    weight.quant_state = state
    assert stored.bits is None
    assert stored.problem == "16384 bytes for 16384 weights, 4-bit takes 8192"


def test_int8_weights_count_as_eight_bits(training):
    """LLM.int8 is recognised and stays frozen, although its scales move to the module in the first forward."""

    def to_int8(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    run = training(quant=to_int8)
    assert run.check("base.bits", 8).met
    assert run.check("base.quant_type", "int8").met
    assert run.check("base.frozen", True).met
    check = run.check("base.bits", 4)
    assert (check.status, check.observed) == ("fallback", 8)


def test_unknown_storage_is_not_guessed_at():
    """An integer weight of an unfamiliar class, or no weight at all, has no known bits."""
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert read_storage(layer).bits is None
    assert read_storage(torch.nn.Identity()).bits is None


def test_a_bias_cast_by_the_forward_is_no_training(training):
    """bitsandbytes rewrites a float32 bias in the compute dtype at the first forward; the reason says so."""
    run = training()
    base = _bases(run)[0]
    base.bias = torch.nn.Parameter(torch.full((128,), 0.1), requires_grad=False)
    check = run.check("base.frozen", True)
    assert base.bias.dtype == torch.float32  # as it was found
    assert check.met
    assert "cast once by the forward" in check.reason
    assert "q_proj.base_layer.bias" in check.reason


def test_a_step_in_eval_mode_that_repacks_the_base_is_seen(training):
    """Nothing about a base whose bytes moved under the step is called frozen or double quantised."""
    run = training()
    if not _bases(run)[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes does not repack")
    run.model.eval()
    check = run.check("base.frozen", True)
    assert check.status == "unknown"
    assert "repacked Linear4bit weights in place" in check.reason
    assert "packed_cpu" in run.check("base.gemm_path", "dequantize").observed
    assert run.check("base.double_quant", True).status != "active"


def test_packed_weights_of_an_eval_forward_are_recognised(training, seen):
    """Still 4 bits, but the nested scales are gone and double quantisation can no longer be told."""
    run = training()
    base = _bases(run)[0]
    # By hand, as an eval forward would on a CPU with AVX512_BF16.
    base.weight.data, base.weight.quant_state = _convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    stored = read_storage(base)
    assert (stored.bits, stored.double_quant, stored.compute_dtype) == (4, None, "bfloat16")
    assert stored.packed_for_cpu
    finding = base_layers.judge_double_quant(seen(model=run.model), True)
    assert finding.against("base.double_quant", True).status == "unknown"
    assert "repacked in place" in finding.reason
    bits = base_layers.judge_bits(seen(model=run.model), 4)
    assert bits.against("base.bits", 4).status == "active"
    assert "repacked in place" in bits.reason


def test_a_trainable_base_parameter_is_named(training):
    """A norm left trainable is no frozen base."""
    run = training()
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)
    run.optimizer.add_param_group({"params": [norm], "lr": 0.1})
    check = run.check("base.frozen", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert "1 base parameters require gradients: base_model.model.model.norm.weight" in check.reason
    assert "received a gradient" in check.reason
    assert "given to the optimizer" in check.reason
    assert "1 changed over 2 steps: base_model.model.model.norm.weight" in check.reason


def test_a_base_changed_behind_autograd_is_seen(training):
    """The hash sees what no flag shows: packed bytes overwritten in place."""
    run = training()

    def step():
        run.step()
        _bases(run)[0].weight.data[0] += 1

    check = run.check("base.frozen", True, step)
    assert check.status == "fallback"
    assert "changed over 2 steps" in check.reason


def test_one_element_of_a_large_base_is_seen(training):
    """Everything is hashed, however large: one number of one row is enough, and the reason says what was."""
    run = training(quant=None)
    run.model.base_model.model.store = torch.nn.Embedding(4096, 512)
    run.model.base_model.model.store.requires_grad_(False)
    assert run.check("base.frozen", True).reason.startswith("every byte of 8.5 MiB")

    def step():
        run.step()
        run.model.base_model.model.store.weight.data[2049, 311] += 1e-3

    check = run.check("base.frozen", True, step)
    assert check.status == "fallback"
    assert "1 changed over 2 steps: base_model.model.store.weight" in check.reason


def test_the_gemm_path_of_training_is_dequantize(training):
    """On a CPU every training product dequantises first; asking for the fused kernel fails."""
    run = training(targets="all-linear")
    check = run.check("base.gemm_path", "dequantize")
    assert check.met
    assert "14 dequantize" in check.reason
    assert run.check("base.gemm_path", "fused").status == "fallback"


def test_the_gemm_path_of_a_float_base_is_not_applicable(training):
    """There is no 4-bit product."""
    assert training(quant=None).check("base.gemm_path", "dequantize").status == "not_applicable"
