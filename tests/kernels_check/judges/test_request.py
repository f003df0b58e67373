"""Tests that the attention of a request is judged by its own operators, in the terms of the step's requirement."""

import dataclasses

import pytest
import torch

import kernels_check
from kernels_check.judges.attention import judge_request
from kernels_check.observe.operators import AttentionCall
from kernels_check.observe.profile import StepProfile
from kernels_check.step_watch import REQUEST

FLASH = AttentionCall(op="aten::_scaled_dot_product_flash_attention", backend="flash", direction="forward", mask=False)
CUDNN = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_cudnn_attention", backend="cudnn")
MATH = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_attention_math", backend="math")
BACKWARD = dataclasses.replace(MATH, direction="backward")


@pytest.fixture
def judge():
    """A function that judges the calls or the kernels of a request."""

    def judged(required, *calls, kernels=None):
        seen = StepProfile(attention=calls, fourbit=(), kernels=kernels or {})
        return judge_request(torch.nn.Identity(), seen, required).against(REQUEST, required)

    return judged


@pytest.mark.parametrize(
    ("required", "calls", "status", "observed"),
    [
        ("fused", (FLASH, FLASH), "active", "flash"),
        ("fused", (CUDNN, FLASH), "active", "cudnn+flash"),
        ("flash", (CUDNN,), "active", "cudnn"),
        ("fused", (FLASH, MATH), "fallback", "flash+math"),
        ("flash_attention_2", (MATH,), "fallback", "math"),
        ("eager", (FLASH,), "fallback", "flash"),
        (None, (MATH, FLASH), "active", "flash+math"),
        ("fused", (FLASH, BACKWARD), "active", "flash"),
    ],
)  # fmt: skip
def test_a_request_is_fused_where_a_step_must_be(judge, required, calls, status, observed):
    """Any fused backend is accepted, also one other than the step's; every call of the request counts, and no other."""
    check = judge(required, *calls)
    assert (check.path, check.status, check.observed) == ("request.attention", status, observed)


def test_the_reason_counts_calls_and_masks(judge):
    """The reason also says what prevents a fused backend, where one is required."""
    masked = dataclasses.replace(MATH, mask=True)
    check = judge("fused", FLASH, FLASH, masked)
    assert check.reason.startswith("forward: 2 flash, 1 math; 1 with an explicit mask; likely cause: an explicit mask")
    assert judge("fused", FLASH).reason == "forward: 1 flash"
    assert judge(None, masked).reason == "forward: 1 math; 1 with an explicit mask"
    assert judge("fused", dataclasses.replace(FLASH, mask=None)).reason == "forward: 1 flash"


@pytest.mark.parametrize(("attention", "observed"), [("sdpa", "flash"), ("eager", "eager")])
def test_a_real_request_is_watched(training, attention, observed):
    """Prefill and one decoding step each have one call in each layer."""
    run = training(attention=attention, quant=None)
    run.model.eval()
    asked = []

    @torch.no_grad()
    def request():
        asked.append(1)
        prompt = run.inputs["input_ids"][:1, :6]
        run.model.generate(input_ids=prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)

    check = kernels_check.watch_request(run.model, request, observed)
    assert check.met, check.reason
    layers = run.model.config.num_hidden_layers
    assert check.reason.startswith(f"forward: {2 * layers} {observed}")
    assert len(asked) == 1
    other = "eager" if observed == "flash" else "fused"
    check = kernels_check.watch_request(run.model, request, other)
    assert (check.status, check.observed) == ("fallback", observed)
