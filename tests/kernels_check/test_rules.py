"""Tests that each kernel name matches the right rule and no other, in any spelling."""

import json
import re
from pathlib import Path

import pytest

from kernels_check.rules import (
    CATEGORIES,
    attention_backend,
    classify,
    classify_operator,
    load_rules,
    normalise,
    read_facts,
)

# Kernel names from torch 2.13 and bitsandbytes 0.50.2 binaries and from published GPU traces.
NAMES = json.loads((Path(__file__).parent / "trace_names.json").read_text())
KERNELS = [(name, rule) for rule, names in NAMES["kernels"].items() for name in names]
OPERATORS = [(name, rule) for rule, names in NAMES["operators"].items() for name in names]


def spell_as_nsys(name):
    """Return the name as nsys prints it.

    nsys writes a cast before a number in a template, `<unnamed>` for the anonymous namespace, and `const` before the
    type instead of after it; it also writes `>>` without a space.
    """
    name = name.replace("(anonymous namespace)", "<unnamed>")
    name = re.sub(r"(?<=[<\s])(-?\d+)(?:ul|u|l)?(?=[,>])", r"(int)\1", name)
    name = re.sub(r"(?<=[<\s])true(?=[,>\s])", "(bool)1", name)
    name = re.sub(r"(?<=[<\s])false(?=[,>\s])", "(bool)0", name)
    return re.sub(r"(\w+) const\*", r"const \1 *", name).replace("> >", ">>").replace("> >", ">>")


def test_a_known_name_matches_its_rule():
    """Each name matches the rule of its library, also in nsys's spelling. Where two rules fit, cuDNN precedes flash,
    and log-softmax (the loss) precedes softmax."""
    spellings = [(spelling, rule) for kernel, rule in KERNELS for spelling in (kernel, spell_as_nsys(kernel))]
    found = [(spelling, getattr(classify(spelling), "name", None)) for spelling, _ in spellings]
    assert found == spellings
    found = [(operator, getattr(classify_operator(operator), "name", None)) for operator, _ in OPERATORS]
    assert found == OPERATORS


@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        ("flash_attn::_flash_attn_varlen_forward", "flash_attention_2"),
        ("_flash_attn2_cuda_9f8e::varlen_fwd", "flash_attention_2"),
        ("flash_attn_3::fwd", "flash_attention_3"),
        ("aten::_scaled_dot_product_cudnn_attention_backward", "cudnn"),
        ("aten::_scaled_dot_product_efficient_attention", "efficient"),
        ("SafeSoftmaxBackward0", "math"),
        ("aten::_softmax", None),
        ("aten::_log_softmax", None),
        ("aten::scaled_dot_product_attention", None),
        ("my::operator", None),
    ],
)
def test_an_operator_names_its_attention(operator, backend):
    """The backend follows from pip and hub namespaces, cuDNN precedes flash, and a plain softmax operator shows no
    backend."""
    assert attention_backend(operator) == backend


def test_every_rule_is_reached():
    """Each rule has a name that it matches and that no earlier rule matches."""
    assert [rule.name for rule in load_rules("rules") if rule.name not in NAMES["kernels"]] == []
    assert [rule.name for rule in load_rules("operators") if rule.name not in NAMES["operators"]] == []


@pytest.mark.parametrize(
    "kernel",
    [
        *("my_new_attention_kernel_v7", "device_kernel", "", "flash", "softmax", "_ZN13pytorch_flash16flash_fwd"),
        *("_fwd_kernel", "embedding_forward_kernel", "rms_norm_kernel", "quantized_matmul_kernel"),
        *("chunk_cross_entropy_fwd_kernel", "void my_kernel<thrust::tuple<int> >(int)"),
        "kernel_cutlass_kernel_BlackwellFusedMultiHeadAttentionForward",
        "void cutlass::device_kernel<cutlass::fmha::kernel::Sm100FmhaFwdKernelTma<cutlass::gemm::Shape> >(int)",
        "void tensorrt_llm::kernels::mmha::masked_multihead_attention_kernel<float>(int)",
        "void flashinfer::mla::BatchMLAPageAttentionKernel<float>(int)",
    ],
)
def test_an_unknown_name_stays_unclassified(kernel):
    """A renamed kernel, or a name that many projects use, stays unclassified."""
    assert classify(kernel) is None


def test_both_spellings_of_template_arguments_are_one_name():
    """nsys and ncu print casts where Kineto prints numbers, and write the unnamed namespace differently."""
    assert normalise("void k<(int)128, (bool)1>(int)") == "k<128, 1>(int)"
    assert normalise("k<(unsigned long long)3, (a::<unnamed>::E)5, (b::X<int>)-2>(T1)") == "k<3, 5, -2>(T1)"
    assert normalise("f((anonymous namespace)::g)") == "f((anonymous namespace)::g)"
    assert normalise("void a::<unnamed>::f<a::<unnamed>::T<(int)2>>(T1)") == (
        "a::(anonymous namespace)::f<a::(anonymous namespace)::T<2>>(T1)"
    )


@pytest.mark.parametrize("table", ["rules", "operators"])
def test_rules_are_complete_and_unique(table):
    """Every rule compiles and has a meaning, a grade and a category."""
    rules = load_rules(table)
    assert len({rule.name for rule in rules}) == len(rules) > 15
    for rule in rules:
        re.compile(rule.pattern)
        assert rule.meaning
        assert {rule.category, *rule.finer} <= set(CATEGORIES)
        assert set(re.findall(r"\w", rule.evidence)) <= set("XBSGID") != set()
        assert (rule.backend is not None) == (rule.category == "attention")


@pytest.mark.parametrize(
    ("part", "category"),
    [
        ("direct_copy_kernel_cuda", "copy"), ("CatArrayBatchedCopy", "copy"), ("FillFunctor", "copy"),
        ("nll_loss_forward", "loss"), ("CUDAFunctor_add", "elementwise"), ("liger_cross_entropy", "loss"),
        ("_swiglu_forward", "elementwise"), ("triton_tem_fused_addmm", "matmul"), ("triton_mm_4", "matmul"),
        ("triton_red_fused__log_softmax", "loss"), ("triton_poi_fused_add", "elementwise"),
        ("triton_tem_fused_flex", "attention"), ("Memset", "copy"), ("LogSoftMaxForwardEpilogue", "loss"),
        ("kQuantizeBlockwiseSmall", "other"), ("_gemv_nf4_kernel", "matmul"), ("ncclDevKernel", "communication"),
        ("FusedAdamMathFunctor", "optimizer"), ("kdequant_mm_int32_fp16", "dequantize"),
        ("_ce_bwd_kernel", "loss"), ("_rope_kernel", "elementwise"), ("_swiglu_bwd_kernel", "elementwise"),
        ("_chunked_cross_entropy", "loss"), ("_rope_embedding", "elementwise"), ("weight_dequant_kernel", "dequantize"),
        ("_w8a8_block_fp8_matmul", "matmul"), ("_swiglu_kernel_forward", "matmul"), ("_fused_down_proj", "matmul"),
        ("_jsd_kernel", "loss"), ("_layer_norm_forward_kernel", "elementwise"), ("compute_dot_do_o", "attention"),
        ("fmhaSm100", "attention"), ("_lh_bwd_pre", "attention"), ("_neighborhood_mask", "attention"),
        ("nchwToNhwcKernel", "copy"), ("nhwcToNchwKernel", "copy"), ("tensorTransformGeneric", "copy"),
        ("bn_fw_tr", "elementwise"), ("conv2d_grouped_direct", "matmul"), ("fprop_implicit_gemm", "matmul"),
        ("Cijk_", "matmul"), ("igemm_fwd", "matmul"), ("batched_transpose", "copy"), ("SubTensorOpWith", "copy"),
        ("MIOpenBatchNorm", "elementwise"), ("Op2dTensorLite", "elementwise"), ("Im2d2Col", "copy"),
        ("naive_conv", "matmul"), ("Rmsnorm2dFwd", "elementwise"),
        ("kernel_batched_gemm_xdlops", "matmul"), ("ck_tile::UniversalGemm", "matmul"), ("__amd_rocclr", "copy"),
        ("DeviceRadixSort", "elementwise"), ("rocprim", "elementwise"), ("transformer_engine", "elementwise"),
        ("dot_kernel<", "matmul"), ("gemmk1", "matmul"),
    ],
)  # fmt: skip
def test_a_kernel_name_decides_its_category(part, category):
    """One rule may cover kernels of several categories: an eager ATen kernel may be a copy or the loss."""
    names = [name for name, _ in KERNELS if part in name]
    assert names
    for name in names:
        rule = classify(name)
        assert rule is not None
        assert rule.category_of(name) == category
    assert category in CATEGORIES


def _read_facts(kernel):
    rule = classify(kernel)
    assert rule is not None
    return read_facts(kernel, rule)


def test_both_spellings_give_the_same_properties():
    """Number format, causality and direction do not depend on the tool that printed the name."""
    assert [kernel for kernel, _ in KERNELS if _read_facts(kernel) != _read_facts(spell_as_nsys(kernel))] == []


def _find_kernel(rule, *parts):
    return next(name for name in NAMES["kernels"][rule] if all(part in name for part in parts))


@pytest.mark.parametrize("rule", ["ATT-SDPA-FLASH", "ATT-FA2", "ATT-FA2-VENDORED"])
def test_flash_kernel_names_show_dtype_and_causality(rule):
    """Is_causal is the second template argument after Kernel_traits, and the first one in split-KV kernels; kernels
    that combine or convert do not have it."""
    causal = _read_facts(_find_kernel(rule, "flash_fwd_kernel", "bfloat16_t"))
    assert (causal.dtype, causal.causal, causal.direction) == ("bfloat16", True, "forward")
    full = _read_facts(_find_kernel(rule, "flash_fwd_kernel", "half_t"))  # the preceding argument, dropout, is on
    assert (full.dtype, full.causal) == ("float16", False)
    assert _read_facts(_find_kernel(rule, "splitkv_kernel")).causal is False
    assert _read_facts(_find_kernel(rule, "splitkv_combine")).causal is None
    backward = _read_facts(_find_kernel(rule, "dq_dk_dv"))
    assert (backward.dtype, backward.causal, backward.direction) == ("bfloat16", True, "backward")
    assert _read_facts(_find_kernel(rule, "convert_dq")) == _read_facts(_find_kernel(rule, "dot_do_o"))


@pytest.mark.parametrize(
    ("rule", "part", "direction"),
    [
        ("ATT-CUDNN", "compute_dot_do_o_specialized", "backward"), ("ATT-CUDNN", "convert_dq", "backward"),
        ("ATT-CUDNN", "fmha_reduce_head", "backward"), ("ATT-CUDNN", "lean_reduction", "forward"),
        ("ATT-TRTLLM", "fmhaSm100a", "forward"), ("ATT-LIGER", "_grad_attn", "backward"),
        ("ATT-TRITON", "22FmhaBwdOGradDotOKernel", "backward"), ("ATT-TRITON", "13FmhaFwdKernel", "forward"),
        ("ATT-UNSLOTH", "_lh_bwd_pre", "backward"), ("ATT-CUDNN", "knob_7_64x128x128", None),
    ],
)  # fmt: skip
def test_names_show_the_direction(rule, part, direction):
    """Helper kernels of cuDNN have a direction, and so have kernels whose names abbreviate it."""
    assert _read_facts(_find_kernel(rule, part)).direction == direction


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (_find_kernel("BNB-DEQ-NF4", "<__nv_bfloat16"), "bfloat16"),
        (_find_kernel("BNB-DEQ-NF4", "<float"), "float32"),
        (_find_kernel("BNB-GEMM4", "<__half"), "float16"),
        (_find_kernel("BNB-GEMM4", "<float"), "float32"),
        (_find_kernel("ATT-EFFICIENT", "F_bf16"), "bfloat16"),
        (_find_kernel("ATT-EFFICIENT", "B_f32"), "float32"),
        (_find_kernel("ATT-CUDNN", "fort_native"), None),
        (_find_kernel("ATT-SOFTMAX", "warp_forward"), "bfloat16"),
        (_find_kernel("ATT-SOFTMAX", "cunn_SoftMaxForward<"), "float32"),
        (_find_kernel("GEMM-TF32"), "tf32"),
        (_find_kernel("GEMM-FP32-SIMT"), "float32"),
        (_find_kernel("GEMM-BF16", "nvjet"), "bfloat16"),
        (_find_kernel("GEMM-FP16", "nvjet"), "float16"),
        (_find_kernel("GEMM-OTHER", "gemvx"), "bfloat16"),
        (_find_kernel("GEMM-BF16", "bf16f32_bf16f32"), "bfloat16"),
        (_find_kernel("GEMM-FP16", "f16f32_f16f32"), "float16"),
        (_find_kernel("GEMM-FP32-SIMT", "gemmSN"), "float32"),
        (_find_kernel("GEMM-OTHER", "gemmSN", "bfloat16"), "bfloat16"),
        ("void gemmSN_TN_kernel<float, 128, 16, 2, 4, 2, 2, true>(x)", None),
        (_find_kernel("GEMM-OTHER", "gemmk1"), "float32"),
        (_find_kernel("GEMM-OTHER", "dot_kernel"), "bfloat16"),
        (_find_kernel("GEMM-OTHER", "reduce_1Block"), "float32"),
        (_find_kernel("GEMM-FP4", "nvjet"), "float4"),
        (_find_kernel("GEMM-FP4", "e2m1"), "float4"),
        (_find_kernel("GEMM-FP8"), "float8"),
        (_find_kernel("TRITON-MXFP4", "_p_"), "bfloat16"),
        ("_matmul_ogs_NNT_fp16xfp16xmxfp4_16x256x128x1", "float16"),
        (_find_kernel("GEMM-AMD", "B_BS"), "bfloat16"),
        (_find_kernel("GEMM-AMD", "BBS"), "bfloat16"),
        (_find_kernel("GEMM-AMD", "HHS"), "float16"),
        (_find_kernel("GEMM-AMD", "_SB_"), "float32"),
        ("Cijk_Ailk_Bljk_DB_MT64x64x8_SN", "float64"),
        (_find_kernel("GEMM-AMD", "F8BS"), "float8"),
        ("Cijk_Alik_Bljk_B8F8S_BH_MT64x64x64", "float8"),
        (_find_kernel("GEMM-AMD", "I8II"), None),
        (_find_kernel("ATT-TRTLLM", "QkvBfloat16"), "bfloat16"),
        ("fmhaSm100fKernel_QkvFp16OFp16H128PagedKvCausalP64", "float16"),
        (_find_kernel("ATT-TRTLLM", "QE4m3"), "float8"),
        (_find_kernel("MEM"), None),
        ("void flash::flash_bwd_convert_dq_kernel<x>(float*)", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_kernel_names_show_the_compute_dtype(kernel, dtype):
    """The template's type counts, not that of a parameter. cuDNN writes f16 for bfloat16 too, so f16 in its names does
    not show the dtype."""
    assert _read_facts(kernel).dtype == dtype
