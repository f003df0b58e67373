"""The attention that ran is told from the attention that was asked for."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels_check.judges.attention import judge_backend


def test_fused_accepts_the_flash_of_the_cpu(training):
    """Any implementation that never writes the scores counts as fused; calls are counted per direction."""
    check = training().check("attention.backend", "fused")
    assert (check.status, check.observed) == ("active", "flash")
    assert "forward: 2 flash; backward: 2 flash; 2 of 2 attention layers" in check.reason


def test_a_router_softmax_is_not_attention(training):
    """Experts are chosen by a softmax over fewer dimensions than attention scores have."""
    run = training()
    for name, module in run.model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(
                lambda module, inputs, output: output * output.softmax(-1).sum(-1, keepdim=True)
            )
    check = run.check("attention.backend", "flash")
    assert (check.status, check.observed) == ("active", "flash")


def test_eager_can_be_required(training):
    """A baseline that wants eager gets it, and SDPA does not pass for it."""
    assert training(attention="eager").check("attention.backend", "eager").met
    assert training().check("attention.backend", "eager").status == "fallback"


def test_eager_reports_the_dtype_of_the_scores_and_its_mask(training):
    """The softmax is upcast to float32 inside; the product before it ran in bfloat16, under an added mask."""
    run = training(attention="eager")
    assert run.check("attention.dtype", "bfloat16").met
    assert run.check("attention.mask", "explicit").met


def test_a_mix_is_a_fallback_with_counts(training):
    """One layer on math among flash layers is not flash."""
    run = training()
    layer = next(module for name, module in run.model.named_modules() if name.endswith("layers.1.self_attn"))
    original = layer.forward

    def forward(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return original(*args, **kwargs)

    layer.forward = forward
    check = run.check("attention.backend", "fused")
    assert (check.status, check.observed) == ("fallback", "flash+math")
    assert "forward: 1 flash, 1 math" in check.reason


def test_dtype_is_that_of_the_inner_operator_under_autocast(training):
    """A float32 model under autocast runs its attention in bfloat16."""
    run = training(quant=None, dtype="float32")

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.step()

    assert run.check("attention.dtype", "bfloat16", step).met
    check = run.check("attention.dtype", "bfloat16")
    assert (check.status, check.observed) == ("fallback", "float32")


def test_kernels_alone_prove_a_backend(seen):
    """Under CUDA-graph replay no operator is recorded."""
    replayed = seen(kernels={"ATT-CUDNN": 4, "GEMM-BF16": 9})
    finding = judge_backend(replayed, "fused")
    assert finding.against("attention.backend", "fused").status == "active"
    assert judge_backend(replayed, "flash").against("attention.backend", "flash").status == "fallback"


def test_no_evidence_is_unknown_not_active(seen):
    """A compiled step may hide its attention entirely."""
    finding = judge_backend(seen(regions=1), "fused")
    assert finding.against("attention.backend", "fused").status == "unknown"
    assert "compiled" in finding.reason
