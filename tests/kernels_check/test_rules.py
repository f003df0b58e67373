"""Kernel names land in the right rule, and nowhere else."""

import re

import pytest

from kernels_check.rules import classify, load_rules, normalise, validated_against

# Shapes of the names in the notes on kernels: torch 2.13 and bitsandbytes 0.50.2 binaries, published GPU traces.
NAMES = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128_4x1x1_kernel0_0": "ATT-CUDNN",
    "cudnn_generated_oss_sdpa_sm100_flash_fprop_f16": "ATT-CUDNN",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_1": "ATT-CUDNN",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm100FlashAttentionForwardSm100_object_at_0x7f": "ATT-FA4",
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90"
    "<2, cute::tuple<cute::C<1>>>>>>(flash::Params)": "ATT-FA3",
    "void flash::prepare_varlen_num_blocks_kernel<1, true>(int)": "ATT-FA3",
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t>, false, true, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)": (
        "ATT-SDPA-FLASH"
    ),
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<x>(p)": "ATT-SDPA-FLASH",
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>, false, true>(flash::Flash_fwd_params)": "ATT-FA2",
    "void flash::flash_fwd_splitkv_combine_kernel<x>(flash::Flash_fwd_params)": "ATT-FA2",
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128>, false>(Flash_fwd_params)": "ATT-FA2-VENDORED",
    "void xformers_flash::flash_bwd_convert_dq_kernel<x>(p)": "ATT-FA2-VENDORED",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<x>::Params)": "ATT-EFFICIENT",
    "fmha_cutlassB_f32_aligned_64x64_k32_dropout_sm80(PyTorchMemEffAttention::x)": "ATT-EFFICIENT",
    "triton_tem_fused_flex_attention_0": "ATT-FLEX",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>(float*, float const*)": (
        "ATT-SOFTMAX-LOG"
    ),
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>(float*, float const*)": (
        "ATT-SOFTMAX"
    ),
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, "
    "at::native::(anonymous namespace)::LogSoftMaxForwardEpilogue>(float*)": "ATT-SOFTMAX-LOG",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, "
    "at::native::(anonymous namespace)::SoftMaxForwardEpilogue>(float*)": "ATT-SOFTMAX",
    "void gemm_4bit_simt<__nv_bfloat16, 3>(int, int)": "BNB-GEMM4",
    "void gemm_4bit_sm80_m16n8k16<__nv_bfloat16>(int, int)": "BNB-GEMM4",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)": "BNB-DEQ-NF4",
    "void kDequantizeBlockwise<__nv_bfloat16, (int)512, (int)64, (int)8, (int)1>(float*)": "BNB-DEQ-FP4",
    "void kDequantizeBlockwise<float, 512, 64, 8, 0>(float*)": "BNB-DEQ-8BIT",
    "void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int)": "BNB-GEMV-OLD",
    "void kfunc<float, 0>(float*, float*, float, long)": "BNB-FILL",
    "void kOptimizer32bit2State<float, 3>(float*)": "BNB-OPT32",
    "void kOptimizerStatic8bit2StateBlockwise<float, 3, 256, 1>(float*)": "BNB-OPT8",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>,"
    " at::native::FusedAdamMathFunctor<float, 4, 1, false>>(x)": "OPT-TORCH-FUSED",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>, x>(y)": (
        "OPT-TORCH-FOREACH"
    ),
    "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16": "GEMM-TF32",
    "ampere_sgemm_128x64_tn": "GEMM-FP32-SIMT",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "GEMM-BF16",
    "_rms_norm_forward_kernel": "LIGER",
    "triton_poi_fused_add_0": "INDUCTOR",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "NCCL",
    "ncclKernel_AllReduce_RING_LL_Sum_float": "NCCL",
    "Memcpy DtoD (Device -> Device)": "MEM",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)": "ATEN",
}


@pytest.mark.parametrize(("kernel", "rule"), NAMES.items(), ids=lambda value: value[:40])
def test_a_known_name_lands_in_its_rule(kernel, rule):
    """cuDNN before flash, log-softmax (the loss) before softmax, namespaces kept apart."""
    found = classify(kernel)
    assert found is not None
    assert found.name == rule


def test_an_unknown_name_stays_unclassified():
    """A renamed kernel must surface, not be filed under a neighbour."""
    assert classify("my_new_attention_kernel_v7") is None


def test_both_spellings_of_template_arguments_are_one_name():
    """nsys and ncu print casts where Kineto prints numbers."""
    assert normalise("void k<(int)128, (bool)1>(int)") == "k<128, 1>(int)"
    assert normalise("f((anonymous namespace)::g)") == "f((anonymous namespace)::g)"


def test_rules_are_stamped_complete_and_unique():
    """Every rule compiles, explains itself and has a grade; the table says what it was validated against."""
    rules = load_rules()
    assert len({rule.name for rule in rules}) == len(rules) > 30
    for rule in rules:
        re.compile(rule.pattern)
        assert rule.meaning
        assert set(rule.evidence.replace(", ", "")) <= set("XBSGID")
    assert {"torch", "bitsandbytes"} <= set(validated_against())
