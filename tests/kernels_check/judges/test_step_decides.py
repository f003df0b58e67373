"""Every comparison of what is judged of execution and update decides something."""

import dataclasses

import pytest
import torch

from kernels_check.judges import execution, optimizer
from kernels_check.observation.adapter_layers import lora_layers
from kernels_check.observation.attention_calls import AttentionCall
from kernels_check.observation.compilations import Compilations
from kernels_check.observation.observe import OptimizerSeen

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
AGAIN = dataclasses.replace(FLASH, recomputed=True)
ADAMW = OptimizerSeen(
    classes=("torch.optim.adamw.AdamW",),
    learning_rates=(1e-3,),
    parameters=frozenset(),
    state_bytes=1000,
    paged_bytes=0,
    claims_paged=False,
    fused_requested=None,
    on_cpu=True,
)


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


def but(call, **changes):
    return dataclasses.replace(call, **changes)


@pytest.fixture
def checkpointing(training, seen, entries):
    """Judge from the attention calls, and from which adapter layers were called, and called again."""

    def judge(calls, *, called=4, repeated=0, required=True, modes=None, flagged=False):
        run = training(targets="all-linear")
        names = [layer.name for layer in lora_layers(run.model)]
        run.model.is_activation_checkpointing = flagged
        watched = seen(
            *calls,
            model=run.model,
            modules=entries(*names[:called], again=names[:repeated]),
            modes=modes or {"": True},
        )
        return execution.judge_checkpointing(watched, required).against("checkpointing", required)

    return judge


@pytest.mark.parametrize(
    ("kernels", "observed", "status", "words"),
    [
        ({}, None, "unknown", "no kernel recorded"),
        ({"GEMM-TF32": 2}, True, "active", "2 TF32 and 0 plain"),
        ({"GEMM-TF32": 2, "GEMM-FP32-SIMT": 1}, True, "active", "2 TF32 and 1 plain"),
        ({"GEMM-FP32-SIMT": 3}, False, "absent", "0 TF32 and 3 plain"),
        ({"GEMM-BF16": 3}, False, "absent", "need not contain"),
    ],
)
def test_tf32_is_told_by_kernels(seen, monkeypatch, kernels, observed, status, words):
    """Without any it is unknown; a step of bfloat16 has none of either kind, and the reason says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    judged = execution.judge_tf32(seen(kernels=kernels), True)
    assert (judged.observed, judged.against("tf32", True).status) == (observed, status)
    assert words in judged.reason
    assert ("need not contain" in judged.reason) is ("GEMM-BF16" in kernels)


BREAK = Compilations(breaks=("here",))
REFUSED = Compilations(refused=("guard",))
UNREADABLE = Compilations(unreadable="no record")


@pytest.mark.parametrize(
    ("regions", "lookups", "past", "observed", "wanted", "unwanted", "words"),
    [
        (2, 2, Compilations(), True, "active", "fallback", "look-ups; in this process so far 0 graph breaks"),
        (
            2,
            2,
            BREAK,
            "in pieces: here",
            "active",
            "fallback",
            "look-ups; in this process so far 1 graph breaks (here)",
        ),
        (2, 2, REFUSED, True, "active", "fallback", "1 recompiles refused (guard)"),
        (2, 2, UNREADABLE, None, "unknown", "unknown", "cannot be told: no record"),
        (0, 0, Compilations(), False, "absent", "active", "0 compiler cache look-ups"),
        (0, 0, BREAK, False, "absent", "active", "1 graph breaks (here)"),
        (0, 0, UNREADABLE, False, "absent", "active", "cannot be told: no record"),
        (0, 3, Compilations(), False, "fallback", "active", "look-ups: the code ran eagerly"),
        (0, 3, REFUSED, False, "fallback", "active", "look-ups: the code ran eagerly"),
        (2, 3, REFUSED, "in part", "fallback", "fallback", "look-ups: part of the code ran eagerly"),
        (2, 3, Compilations(complete=False), "in part", "fallback", "fallback", "part of the code ran eagerly"),
        (2, 2, Compilations(complete=False), True, "active", "fallback", "in this process so far at least 0 graph"),
        (2, 3, Compilations(), True, "active", "fallback", "look-ups; in this process so far 0 graph breaks"),
    ],
)
def test_compile_is_told_by_regions(seen, regions, lookups, past, observed, wanted, unwanted, words):
    """A look-up without a region is code that went back to eager; breaks and recompiles are told beside it."""
    watched = seen(compiled_regions=regions, compiler_lookups=lookups, compilations=past)
    for required, status in ((True, wanted), (False, unwanted)):
        judged = execution.judge_compile(watched, required)
        assert (judged.observed, judged.against("compile", required).status) == (observed, status)
        assert words in judged.reason


def test_of_a_step_without_a_compiler_nothing_is_said_of_one(seen):
    """Neither breaks nor recompiles where nothing was ever compiled."""
    assert execution.judge_compile(seen(), None).reason == "0 compiled regions entered, 0 compiler cache look-ups"


def test_modes_are_named_where_something_was_asked(seen):
    """The odd ones with the remedy; without a requirement, without a remedy."""
    mixed = seen(modes={"": True, "a": False, "b": False})
    asked = execution.judge_mode(mixed, "train")
    assert (asked.observed, "not in train mode: a, b" in asked.reason) == ("mixed", True)
    assert "model.train()" in asked.reason
    assert "not in eval mode: the model itself" in execution.judge_mode(mixed, None).reason
    assert "call model" not in execution.judge_mode(mixed, None).reason
    assert "call model" not in execution.judge_mode(seen(), "train").reason


@pytest.mark.parametrize(
    ("calls", "called", "repeated", "status", "words"),
    [
        ((), 0, 0, "unknown", "no layer call was seen"),
        ((), 4, 4, "active", "0 forward calls"),
        ((), 4, 0, "absent", "0 of 4 adapter layers"),
        ((FLASH,), 0, 0, "absent", "1 forward calls for 1 layers (1.00 times)"),
        ((FLASH, AGAIN), 0, 0, "active", "(2.00 times)"),
        ((FLASH, FLASH, AGAIN), 0, 0, "fallback", "only part of the layers recompute"),
        ((FLASH,), 4, 3, "fallback", "only part of the layers recompute"),
        ((FLASH,), 4, 4, "active", "a selective policy keeps the attention"),
        ((FLASH, AGAIN, AGAIN), 4, 4, "active", "(3.00 times)"),
    ],
)
def test_checkpointing_is_told_by_what_ran_again(checkpointing, training, calls, called, repeated, status, words):
    """Attention where it is recomputed, adapter layers where a policy keeps it; a part is not all."""
    check = checkpointing(calls, called=called, repeated=repeated)
    assert check.status == status, check.reason
    assert words in check.reason
    assert ("selective" in check.reason) is (len(calls) < 2 and repeated > 0)


def test_a_flag_that_does_nothing_is_named_with_the_mode(checkpointing, training):
    """In train mode as in eval mode; not where nothing, or the opposite, was required."""
    assert "recomputes in train mode" in checkpointing((FLASH,), flagged=True).reason
    sleeping = checkpointing((FLASH,), flagged=True, modes={"": False})
    assert (sleeping.status, "recomputes in eval mode" in sleeping.reason) == ("fallback", True)
    assert checkpointing((FLASH,), flagged=True, required=False).status == "active"
    assert checkpointing((FLASH, AGAIN), flagged=True).status == "active"
    assert "2 backward" in checkpointing((FLASH, *[but(FLASH, direction="backward")] * 2)).reason


@pytest.mark.parametrize(
    ("operators", "regions", "requested", "required", "status", "words", "absent"),
    [
        ({"aten::_fused_adamw_": 1}, 0, True, True, "active", "1 aten::_fused_adamw_", "build it"),
        ({"aten::_foreach_add_": 1}, 0, None, True, "fallback", "build it with fused=True", "lost"),
        ({"aten::_foreach_add_": 1}, 0, True, True, "fallback", "asked for and lost", "build it"),
        ({"aten::addcdiv_": 4}, 0, None, False, "active", "4 aten::addcdiv_", "build it"),
        ({}, 0, None, False, "active", "no update operator", "compiled"),
        ({}, 1, None, True, "unknown", "may be compiled", "build it"),
        ({"aten::addcdiv_": 4}, 1, None, True, "fallback", "4 aten::addcdiv_", "may be compiled"),
        ({"bitsandbytes::optimizer_update_32bit": 1}, 0, None, True, "not_applicable", "kernels of its own", "build"),
    ],
)
def test_fused_is_told_by_operators(seen, operators, regions, requested, required, status, words, absent):
    """None of them may be compiled away; what was asked for and lost has a remedy of its own."""
    stepped = dataclasses.replace(ADAMW, fused_requested=requested)
    watched = seen(optimizer_ops=operators, compiled_regions=regions, optimizers=(stepped,))
    check = optimizer.judge_fused(watched, required).against("optimizer.fused", required)
    assert check.status == status
    assert words in check.reason
    assert absent not in check.reason


@pytest.mark.parametrize(
    ("paged", "claims", "on_cpu", "required", "status", "words"),
    [
        (500, True, False, 0.5, "active", "never paged"),
        (499, True, False, 0.5, "fallback", "never paged"),
        (1000, True, False, 1.0, "active", None),
        (500, False, False, 0.5, "active", None),
        (0, True, False, 0.1, "absent", "never paged"),
        (0, True, True, 0.1, "absent", "not supported on CPU"),
        (0, False, True, 0.0, "active", None),
    ],
)
def test_paging_is_told_by_bytes(seen, paged, claims, on_cpu, required, status, words):
    """The share itself is enough; the reason explains what a paging optimizer does not page, and no other."""
    stepped = dataclasses.replace(ADAMW, paged_bytes=paged, claims_paged=claims, on_cpu=on_cpu)
    check = optimizer.judge_paged_share(seen(optimizers=(stepped,)), required)
    assert check.against("optimizer.paged_share", required).status == status
    for explanation in ("never paged", "not supported on CPU"):
        assert (explanation in check.reason) is (explanation == words)


def test_without_an_optimizer_nothing_is_judged_of_it(seen):
    """Absent on each of its paths."""
    for judged in (optimizer.judge_fused(seen(), True), optimizer.judge_paged_share(seen(), 0.5)):
        assert judged.against("optimizer.fused", True).status == "absent"
        assert "no torch.optim.Optimizer stepped" in judged.reason
