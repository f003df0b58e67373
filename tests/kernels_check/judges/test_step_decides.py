"""Every comparison of what is judged of execution and update decides something."""

import dataclasses

import pytest
import torch
from torch import nn

from kernels_check.judges import execution, optimizer
from kernels_check.observe.calls import Calls, ModuleCall
from kernels_check.observe.compile import Compilations
from kernels_check.observe.operators import AttentionCall
from kernels_check.observe.optimizer import GroupSeen, OptimizerSeen, Write

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


def but(call, **changes):
    return dataclasses.replace(call, **changes)


class Block(nn.Module):
    """A block of two layers of weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


class Stack(nn.Module):
    """Two blocks and a head."""

    is_activation_checkpointing = False

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(2, 2)


def log(*called, again=(), thread=0):
    """Calls by name, each inside the nearest of those before it; a gradient comes back to all."""
    made, last = [], {}
    for name, in_backward in [*((name, False) for name in called), *((name, True) for name in again)]:
        around = [last[one] for one in last if one == "" or name.startswith(f"{one}.")] if not in_backward else []
        if not in_backward:
            last[name] = len(made)
        caller = max((one for one in around if made[one].names != (name,)), default=None)
        entry = {"names": (name,), "caller": caller, "training": True, "with_grad": True, "thread": thread}
        made.append(ModuleCall(in_backward=in_backward, **entry))
    forward = frozenset(number for number, call in enumerate(made) if not call.in_backward)
    return Calls(all=tuple(made), thread=0, differentiable=forward)


def parts(*blocks):
    return [name for block in blocks for name in (block, f"{block}.first", f"{block}.second")]


ZERO, ONE = "layers.0", "layers.1"
BOTH = ["", *parts(ZERO, ONE), "head"]


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
GRADIENTS = {"layers.0.first.weight": None, "layers.1.first.weight": None}


@pytest.mark.parametrize(
    ("called", "entered", "gradients", "observed", "share", "wanted", "unwanted", "words"),
    [
        ([], [None], GRADIENTS, True, 1.0, "active", "fallback", "2 of 2 blocks ran in compiled code"),
        ([""], [0], GRADIENTS, True, 1.0, "active", "fallback", "2 of 2 blocks"),
        (["", ZERO, ONE, "head"], [1, 2], {}, True, 1.0, "active", "fallback", "2 of 2 blocks"),
        (["", "head"], [0, 0], GRADIENTS, True, 1.0, "active", "fallback", "2 of 2 blocks"),
        (["", ZERO, *parts(ONE), "head"], [1], {}, "in part", 0.5, "fallback", "fallback", "eager: layers.1"),
        (["", *parts(ONE), "head"], [0], GRADIENTS, "in part", 0.5, "fallback", "fallback", "eager: layers.1"),
        (["", *parts(ZERO), ONE, "head"], [2, 4], {}, "in part", 0.5, "fallback", "fallback", "in part: layers.0"),
        (BOTH, [None], {}, False, 0.0, "absent", "active", "1 regions outside of its blocks, as of a loss"),
        (BOTH, [0], {}, False, 0.0, "absent", "active", "1 regions outside"),
        (BOTH, [7], {}, False, 0.0, "fallback", "fallback", "0 of 2 blocks"),
        (BOTH, [], {}, False, 0.0, "absent", "active", "0 compiled regions entered"),
    ],
)
def test_compile_is_told_by_blocks(seen, called, entered, gradients, observed, share, wanted, unwanted, words):
    """Every block, in whatever way it was compiled; a loss of its own is none."""
    watched = seen(model=Stack(), modules=log(*called), entered=tuple(entered), gradients=gradients)
    for required, status in ((True, wanted), (False, unwanted)):
        judged = execution.judge_compile(watched, required)
        assert (judged.observed, judged.against("compile", required).status) == (observed, status), judged.reason
        assert words in judged.reason
    least = execution.judge_compiled_share(watched, 0.5)
    assert (least.observed, least.satisfies) == (share, share >= 0.5)


@pytest.mark.parametrize(
    ("regions", "lookups", "past", "observed", "wanted", "words"),
    [
        (2, 2, BREAK, "in pieces: here", "active", "2 look-ups; 2 of 2 blocks"),
        (2, 2, REFUSED, True, "active", "1 recompiles refused (guard)"),
        (2, 2, UNREADABLE, None, "unknown", "are unknown: no record"),
        (2, 2, Compilations(complete=False), True, "active", "in this process so far at least 0 graph"),
        (0, 0, UNREADABLE, False, "absent", "are unknown: no record"),
        (0, 3, Compilations(), False, "fallback", "look-ups: the code ran eagerly"),
        (0, 3, REFUSED, False, "fallback", "look-ups: the code ran eagerly"),
    ],
)
def test_breaks_and_refusals_are_told_beside_the_blocks(seen, regions, lookups, past, observed, wanted, words):
    """A look-up without a region is code that went back to eager."""
    called = ["", ZERO, ONE, "head"] if regions else BOTH
    entered = (1, 2) if regions else ()
    watched = seen(model=Stack(), modules=log(*called), entered=entered, lookups=lookups, compilations=past)
    judged = execution.judge_compile(watched, True)
    assert (judged.observed, judged.against("compile", True).status) == (observed, wanted), judged.reason
    assert words.replace("2 look-ups", "2 compiler cache look-ups") in judged.reason


FIRST = but(FLASH, region=1)
AGAIN = but(FIRST, recomputed=True)


@pytest.mark.parametrize(
    ("attention", "flagged", "status", "share", "words"),
    [
        ([FIRST, AGAIN], False, "active", 1.0, "2 forward calls for 1 layers"),
        ([FIRST, FIRST, AGAIN], False, "fallback", 0.5, "3 forward calls for 2 layers"),
        ([FIRST], False, "absent", 0.0, "1 forward calls"),
        ([FIRST], True, "unknown", None, "may keep the attention"),
        ([], False, "unknown", None, "no attention in it was seen"),
    ],
)
def test_in_compiled_code_checkpointing_is_told_by_attention(seen, attention, flagged, status, share, words):
    """No call is seen there; where attention does not tell, it is unknown."""
    model = Stack()
    model.is_activation_checkpointing = flagged
    watched = seen(*attention, model=model, modules=log(""), entered=(0,), gradients=GRADIENTS)
    judged = execution.judge_checkpointing(watched, True)
    assert judged.against("checkpointing", True).status == status, judged.reason
    assert words in judged.reason
    assert execution.judge_checkpointed_layers(watched, 0.5).observed == share


PLAIN = {"optimizer": "AdamW", "index": 0, "has_fused": True, "built_with": False}
FUSED, FOREACH, LOOP, LIBRARY = (
    "aten::_fused_adamw_",
    "aten::_foreach_addcdiv_",
    "aten::addcdiv_",
    "bitsandbytes::optimizer_x",
)


def wrote(op, *addresses):
    return Write(op=op, tensors=tuple((address, 0) for address in addresses))


def group(*addresses, **changes):
    return GroupSeen(parameters=tuple((address, 0) for address in addresses), **PLAIN | changes)


@pytest.mark.parametrize(
    ("writes", "groups", "required", "status", "words", "absent"),
    [
        ([wrote(FUSED, 1, 2)], [group(1, 2)], True, "active", "2 of 2 parameters updated by fused", "build it"),
        ([wrote(FUSED, 1, 2)], [group(1, 2)], False, "fallback", "2 of 2", "build it"),
        (
            [wrote(FUSED, 1), wrote(LOOP, 2)],
            [group(1), group(2, index=1)],
            True,
            "fallback",
            "group 1 of AdamW",
            "lost",
        ),
        ([wrote(FUSED, 1), wrote(LOOP, 2)], [group(1), group(2, index=1)], False, "fallback", "1 of 2", "build it"),
        ([wrote(FUSED, 1)], [group(1, 2)], True, "unknown", "of 1 parameters no update was seen", "lost"),
        ([wrote(FUSED, 1)], [group(1, 2)], False, "fallback", "1 of 2", "build it"),
        ([wrote(FUSED, 1), wrote(LOOP, 2)], [group(1, 2, 3)], True, "fallback", "1 of 3", "lost"),
        ([wrote(FOREACH, 1, 2)], [group(1, 2)], True, "fallback", "build it with fused=True", "lost"),
        ([wrote(FOREACH, 1, 2)], [group(1, 2, built_with=True)], True, "fallback", "asked for and lost", "build it"),
        (
            [wrote(LOOP, 1)],
            [group(1, optimizer="Muon", has_fused=False)],
            True,
            "fallback",
            "no fused version",
            "build it",
        ),
        ([wrote(LOOP, 1), wrote(LOOP, 2)], [group(1, 2)], False, "active", "2 aten::addcdiv_", "build it"),
        ([wrote(LOOP, 1)], [group(1, 2)], False, "unknown", "of 1 parameters no update was seen", "build it"),
        ([], [group(1)], True, "unknown", "wrote no parameter by an operator", "build it"),
        ([], [group(1)], False, "unknown", "no update operator", "build it"),
        ([], [group()], False, "unknown", "no parameter had a gradient", "build it"),
        ([], [], False, "unknown", "no optimizer stepped in the watched call", "build it"),
        ([wrote("aten::_foreach_mul_", 8)], [group(1)], False, "unknown", "no update operator", "foreach"),
        ([wrote(LIBRARY, 1)], [group(1)], True, "not_applicable", "kernels of its own", "build it"),
        ([wrote(LIBRARY, 1), wrote(LOOP, 2)], [group(1), group(2)], True, "fallback", "0 of 2", "lost"),
    ],
)
def test_fused_is_told_by_parameters(seen, writes, groups, required, status, words, absent):
    """Each by what wrote it; what was lost has a remedy of its own, and so has what has no such version."""
    watched = seen(writes=tuple(writes), updated=tuple(groups), optimizers=(ADAMW,))
    check = optimizer.judge_fused(watched, required).against("optimizer.fused", required)
    assert check.status == status, check.reason
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
