"""Tests on constructed evidence of what only CUDA or compiled code shows."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kernels_check.judges import attention, execution, optimizer
from kernels_check.observe.operators import AttentionCall
from kernels_check.observe.profile import OptimizerRecord

FLASH = AttentionCall(
    op="aten::_scaled_dot_product_flash_attention", backend="flash", direction="forward", dtype="bfloat16", mask=False,
    causal=True, dropout=0.0, grouped=False, head_size=64,
)  # fmt: skip
MATH = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_attention_math", backend="math")
COMPILED = dataclasses.replace(FLASH, region=1)
AGAIN = dataclasses.replace(COMPILED, recomputed=True)


def model(**config):
    """A module with a configuration."""
    bare = torch.nn.Identity()
    bare.config = SimpleNamespace(**config)
    return bare


@pytest.mark.parametrize(
    ("kernels", "required", "status"),
    [
        ({"ATT-SDPA-FLASH": 2, "GEMM-BF16": 1}, "flash", "active"),
        ({"ATT-SDPA-FLASH": 2, "ATT-CUDNN": 1}, "flash", "fallback"),
        ({"ATT-SDPA-FLASH": 2, "ATT-CUDNN": 1}, "fused", "active"),
        ({"ATT-FLEX": 2}, "fused", "fallback"),
        ({"GEMM-BF16": 1}, "flash", "unknown"),
    ],
)
def test_kernels_decide_where_no_operator_was_recorded(make_observation, kernels, required, status):
    """Under CUDA graphs all attention kernels must be accepted, and other kernels do not count as attention."""
    judged = attention.judge_backend(make_observation(kernels=kernels, model=torch.nn.Identity()), required)
    assert judged.against("attention.backend", required).status == status


@pytest.mark.parametrize(
    ("calls", "layers", "status"),
    [
        ([COMPILED] * 2, 2, "active"),
        ([COMPILED, AGAIN], 1, "active"),
        ([AGAIN], 1, "fallback"),
        ([COMPILED], 2, "fallback"),
        ([COMPILED] * 4, 2, "unknown"),
        ([COMPILED], 0, "fallback"),
    ],
)
def test_calls_in_compiled_code_must_be_those_of_all_layers(make_observation, calls, layers, status):
    """Compiled code hides the modules, so that the number of calls is compared with the configuration."""
    judged = attention.judge_backend(make_observation(*calls, model=model(num_hidden_layers=layers)), "flash")
    assert judged.against("attention.backend", "flash").status == status, judged.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"dropout": 0.1}, "attention dropout is on"),
        ({"mask": True}, "an explicit mask"),
        ({"head_size": 257}, "head size above 256"),
        (
            {"dtype": "float32", "grouped": True},
            "dtype float32 (CUDA's flash and cuDNN refuse it, and memory-efficient",
        ),
        ({}, "nothing in the inputs forbids it"),
    ],
)
def test_the_likely_cause_is_in_the_inputs(make_observation, monkeypatch, changes, words):
    """The reason names the input that the CUDA backends do not support."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = dataclasses.replace(MATH, **changes)
    assert words in attention.judge_backend(make_observation(call, model=torch.nn.Identity()), "flash").reason


@pytest.mark.parametrize(
    ("required", "status"), [(None, "unknown"), ("explicit", "unknown"), ("causal", "fallback"), ("none", "fallback")]
)
def test_a_mask_that_one_call_hides_is_unknown_unless_another_differs(make_observation, required, status):
    """A hidden mask is unknown even if the visible calls agree with the requirement; a call that differs is a
    fallback."""
    calls = dataclasses.replace(FLASH, mask=True), dataclasses.replace(FLASH, mask=None, causal=False)
    assert attention.judge_mask(make_observation(*calls), required).against("attention.mask", required).status == status


@pytest.mark.parametrize(
    ("kernels", "observed", "status", "words"),
    [
        ({}, None, "unknown", "no kernel recorded"),
        ({"GEMM-TF32": 2, "GEMM-FP32-SIMT": 1}, True, "active", "2 TF32 and 1 plain"),
        ({"GEMM-FP32-SIMT": 3}, False, "absent", "0 TF32 and 3 plain"),
        ({"GEMM-BF16": 3}, False, "absent", "need not contain"),
    ],
)
def test_tf32_is_judged_by_kernels(make_observation, monkeypatch, kernels, observed, status, words):
    """TF32 is unknown without kernels; a bfloat16 step has neither kind, and the reason says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    judged = execution.judge_tf32(make_observation(kernels=kernels), True)
    assert (judged.observed, judged.against("tf32", True).status) == (observed, status)
    assert words in judged.reason


@pytest.mark.parametrize(
    ("calls", "flagged", "status", "share"),
    [
        ([COMPILED, AGAIN], False, "active", 1.0),
        ([COMPILED, COMPILED, AGAIN], False, "fallback", 0.5),
        ([COMPILED], False, "absent", 0.0),
        ([COMPILED], True, "unknown", None),
        ([], False, "unknown", None),
    ],
)
def test_checkpointing_in_compiled_code_is_judged_by_attention(make_observation, calls, flagged, status, share):
    """Modules in compiled code call no hook; checkpointing is unknown where attention calls do not show it."""
    block = torch.nn.Module()
    block.first, block.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    stack = torch.nn.Module()
    stack.layers, stack.is_activation_checkpointing = torch.nn.ModuleList([block]), flagged
    watched = make_observation(*calls, model=stack, entered=(0,), gradients={"layers.0.first.weight": None})
    judged = execution.judge_checkpointing(watched, True)
    assert judged.against("checkpointing", True).status == status, judged.reason
    assert execution.judge_checkpointed_layers(watched, 0.5).observed == share


@pytest.mark.parametrize(
    ("paged", "on_cpu", "required", "status", "words"),
    [
        (500, False, 0.5, "active", "never paged"),
        (499, False, 0.5, "fallback", "never paged"),
        (0, False, 0.1, "absent", "never paged"),
        (0, True, 0.1, "absent", "not supported on CPU"),
    ],
)
def test_paging_is_judged_by_bytes(make_observation, paged, on_cpu, required, status, words):
    """The reason explains which state a paged optimizer does not page."""
    stepped = OptimizerRecord(
        classes=("bitsandbytes.optim.PagedAdamW",), learning_rates=(1e-3,), parameters=frozenset(), state_bytes=1000,
        paged_bytes=paged, claims_paged=True, fused_requested=None, on_cpu=on_cpu,
    )  # fmt: skip
    check = optimizer.judge_paged_share(make_observation(optimizers=(stepped,)), required)
    assert check.against("optimizer.paged_share", required).status == status
    assert words in check.reason
