"""Every comparison of what is judged of attention decides something."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kernels_check.judges import attention
from kernels_check.observe.calls import Calls, ModuleCall
from kernels_check.observe.operators import AttentionCall

BARE = torch.nn.Identity()
FLASH = AttentionCall(
    op="aten::_scaled_dot_product_flash_attention",
    backend="flash",
    direction="forward",
    dtype="bfloat16",
    mask=False,
    causal=True,
    dropout=0.0,
    grouped=False,
    head_size=64,
)
MATH = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_attention_math", backend="math")


def model(**config):
    """Something with a configuration."""
    bare = torch.nn.Identity()
    bare.config = SimpleNamespace(**config)
    return bare


@pytest.fixture
def backend(seen):
    """Judge the backend of some calls."""

    def judge(required, *calls, of=BARE, entered=(), grads=(True, True)):
        more = {}
        if entered:  # each name an entry into the model of its own, numbered from 1
            of = torch.nn.ModuleDict({name: torch.nn.Identity() for name in entered})
            made = {"caller": None, "training": True, "in_backward": False, "thread": 0}
            entries = [ModuleCall(names=(n,), with_grad=g, **made) for n, g in zip(entered, grads, strict=True)]
            more["modules"] = Calls(all=(ModuleCall(names=("",), with_grad=False, **made), *entries))
        return attention.judge_backend(seen(*calls, model=of, **more), required).against("attention.backend", required)

    return judge


def but(which, /, **changes):
    return dataclasses.replace(which, **changes)


def test_calls_of_compiled_code_must_be_a_multiple_of_the_layers(backend):
    """No module is known there: each entry must have called as many as the configuration announces."""
    flash = but(FLASH, region=1)
    two = model(num_hidden_layers=2)
    assert backend("flash", flash, flash, of=two).met
    other = but(flash, region=2)
    assert backend("flash", flash, flash, other, other, of=two).met
    assert backend("flash", flash, other, of=two).status == "unknown"  # one entry in pieces, or two without a layer
    for wrong, status in ((1, "fallback"), (3, "fallback"), (4, "unknown")):
        check = backend("flash", *[flash] * wrong, of=two)
        assert check.status == status
        assert f"{wrong} calls in an entry into compiled code are not those of 2 attention layers" in check.reason
    assert not backend("flash", flash, of=model(num_hidden_layers=0)).met
    unknown = backend("flash", flash)
    assert not unknown.met
    assert "an unknown number of attention layers" in unknown.reason
    assert backend("flash", flash, but(flash, recomputed=True), of=model(num_hidden_layers=1)).met
    assert not backend("flash", but(flash, recomputed=True), of=model(num_hidden_layers=1)).met


def test_recomputed_calls_alone_prove_no_forward_pass(backend):
    """Nor do they make up for one."""
    again = but(FLASH, recomputed=True)
    assert "only recomputed ones" in backend("flash", again, again).reason
    assert not backend("flash", again, again).met
    assert backend("flash", FLASH, FLASH, again, again).met


@pytest.mark.parametrize(
    ("call", "words", "absent"),
    [
        (but(MATH, dtype="float64"), "float64", "look for"),
        (but(MATH, dropout=0.1), "attention dropout is on", "look for"),
        (but(MATH, mask=True), "an explicit mask", "look for"),
        (but(MATH, head_size=257), "head size above 256", "look for"),
        (but(MATH, head_size=256), "look for", "head size above"),
        (but(MATH, head_size=None), "look for", "head size above"),
        (but(MATH, dtype="float32"), "look for", "dtype float32"),
        (but(MATH, backend="eager"), "load it with 'sdpa'", "look for"),
    ],
)
def test_the_cause_is_what_the_inputs_show(backend, call, words, absent):
    """On a CPU, where float32 is no cause."""
    reason = backend("flash", call).reason
    assert words in reason
    assert absent not in reason


def test_float32_is_a_cause_on_cuda(backend, monkeypatch):
    """With or without grouped heads; bfloat16 is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "dtype float32 (CUDA's flash and cuDNN refuse it)" in backend("flash", but(MATH, dtype="float32")).reason
    assert "grouped" in backend("flash", but(MATH, dtype="float32", grouped=True)).reason
    assert "dtype float32" not in backend("flash", MATH).reason


def test_the_dtype_is_that_of_forward_calls_that_tell_it(seen):
    """Backward calls, and calls without a dtype, prove nothing."""
    judged = attention.judge_dtype(seen(but(FLASH, direction="backward"), but(FLASH, dtype=None)), None)
    assert judged.status == "unknown"
    backward = but(FLASH, direction="backward", dtype="float32")
    assert attention.judge_dtype(seen(FLASH, backward), None).observed == "bfloat16"


@pytest.mark.parametrize(
    ("mask", "causal", "observed", "status"),
    [
        (True, False, "explicit", None),
        (False, True, "causal", None),
        (False, False, "none", None),
        (None, True, "causal", None),
        (None, False, "unknown", "unknown"),
        (False, None, "unknown", "unknown"),
    ],
)
def test_the_mask_is_what_the_operator_was_given(seen, mask, causal, observed, status):
    """What it does not tell is unknown."""
    judged = attention.judge_mask(seen(but(FLASH, mask=mask, causal=causal), but(FLASH, direction="backward")), None)
    assert (judged.observed, judged.status) == (observed, status)
    assert ("pass no attention_mask" in judged.reason) is (observed == "explicit")


def test_kernels_alone_must_all_be_accepted(seen):
    """One of two backends is not the required one; any fused one is fused; others are not attention."""

    def judge(required, **kernels):
        named = {name.replace("_", "-"): count for name, count in kernels.items()}
        return attention.judge_backend(seen(kernels=named, model=BARE), required).against("attention.backend", required)

    assert judge("flash", ATT_SDPA_FLASH=2, GEMM_BF16=1).met
    assert not judge("flash", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert judge("fused", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert not judge("fused", ATT_FLEX=2).met
    assert judge("flash", GEMM_BF16=1).status == "unknown"


@pytest.mark.parametrize(
    ("required", "status"), [(None, "unknown"), ("explicit", "unknown"), ("causal", "fallback"), ("none", "fallback")]
)
def test_what_one_call_does_not_tell_is_unknown_unless_another_differs(seen, required, status):
    """As required so far is no verdict; one that is otherwise is."""
    calls = but(FLASH, mask=True), but(FLASH, mask=None, causal=False)
    judged = attention.judge_mask(seen(*calls), required)
    assert judged.against("attention.mask", required).status == status
    assert "unknown for 1 call" in judged.reason


@pytest.mark.parametrize("judge", [attention.judge_backend, attention.judge_dtype, attention.judge_mask])
def test_attention_of_a_pass_that_failed_is_said_and_not_judged(seen, judge):
    """Where that is all there is, the model ran none."""
    made = {"names": ("",), "caller": None, "training": True, "in_backward": False, "thread": 0, "with_grad": True}
    modules = Calls(all=(ModuleCall(**made), ModuleCall(**made)), failed=frozenset({0}))
    failed, sound = but(MATH, call=0, dtype="float32", mask=True), but(FLASH, call=1)
    alone = judge(seen(failed, modules=modules), None)
    assert (alone.observed, alone.present) == (None, False)
    assert alone.reason.endswith("; not judged: 1 in passes that failed (1 math)")
    assert judge(seen(failed, sound, modules=modules), None).observed == judge(seen(FLASH), None).observed
    assert "failed" not in judge(seen(FLASH), None).reason
