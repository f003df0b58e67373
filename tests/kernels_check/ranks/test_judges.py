"""Tests that the reports of all ranks are judged together: one training, with a part on each rank, and differing ranks
are named.

Tests of how a rank spends a step, from the intervals of its events.
"""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels_check import ranks
from kernels_check.check import Check
from kernels_check.judges.ranks import PATHS
from kernels_check.observe.ranks import Gradient, RankEvidence
from kernels_check.ranks import STEPS, RankFacts, judge_ranks, merge_checks, profile_steps, read_times

ROWS = ("a", "b", "c", "d")
NAN = float("nan")


def gradient(own, exchanged, *, sharded=False, coarse=False, size=10.0):
    return Gradient(own=own, exchanged=exchanged, sharded=sharded, size=size, coarse=coarse)


def fact(rank, **changes):
    """Return the facts of a healthy rank of two under DDP."""
    facts = RankFacts(
        rank=rank, rows=ROWS[2 * rank : 2 * rank + 2], whole=ROWS, base={"w": (100, 100), "n": (1, 1)},
        repeated=(5.0,) * 4, base_losses=(6.0,) * 4,
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def judged(*facts, strategy="ddp"):
    return {check.path: check for check in judge_ranks(facts, strategy)}


def test_a_healthy_training_passes_every_path():
    """Each path is required and met."""
    checks = judged(fact(0), fact(1))
    assert set(checks) == {"ranks.data", "ranks.steady"}
    assert all(check.required is True and check.met for check in checks.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": ("a", "b")}, "ranks 0 and 1 train on the same data: 2 of their 2 sequences"),
        ({"rows": ("c", "x")}, "rank 1 was given other data: 1 of its 2 sequences"),
        ({"rows": ("c",)}, "1 of the 4 sequences of a step were given to no rank"),
        ({"whole": ("e", "f", "g", "h")}, "rank 1 trains on other data than rank 0"),
    ],
)
def test_each_sequence_of_a_step_goes_to_one_rank(changes, words):
    """The reason distinguishes repeated, foreign, missing and differing sequences."""
    check = judged(fact(0), fact(1, **changes))["ranks.data"]
    assert check.status == "fallback"
    assert words in check.reason


def gradient_finding(*own_and_exchanged, **more):
    """Return the finding on the gradient of one parameter, from each rank's own gradient and the gradient that its
    optimizer got."""
    ranks = [
        RankEvidence(
            rank=rank,
            gradients={
                "a": gradient(own, exchanged, **more),
                "b": gradient(9.0, 9.0, coarse=more.get("coarse", False)),
            },
        )
        for rank, (own, exchanged) in enumerate(own_and_exchanged)
    ]
    return PATHS["ranks.gradients"].judge(SimpleNamespace(ranks=ranks), True)


@pytest.mark.parametrize(
    ("given_to", "observed", "words"),
    [
        (((3.0, 4.0), (5.0, 4.0)), True, "the mean over 2 ranks, of 2 parameters"),
        (((3.0, 3.0), (5.0, 5.0)), False, "keep each rank's own gradient, which was not exchanged: a, b"),
        (((3.0, -7.0), (5.0, 1.0)), False, "not the mean over 2 ranks: 2 of 2 parameters, a"),
        (((3.0, 4.0), (5.0, 0.0)), False, "not the mean over 2 ranks"),
        (((3.0, NAN), (5.0, 4.0)), False, "not the mean over 2 ranks"),
    ],
)
def test_gradients_are_the_mean_over_ranks(given_to, observed, words):
    """A missing exchange is named, and NaN is not a mean."""
    found = gradient_finding(*given_to)
    assert (found.observed, words in found.reason) == (observed, True), found.reason


@pytest.mark.parametrize(
    ("factor", "sharded", "observed", "words"),
    [
        (2.0, False, False, "divided by 1 and not by their number, 2"),
        (2.0, True, False, "divided by 1 and not by their number, 2"),
        (1.0, True, True, "the mean over 2 ranks, of 1 parameters"),
        (0.25, False, True, "the mean over 2 ranks times 0.25, as clipping or a scaler does"),
    ],
)
def test_a_sum_is_not_a_mean_and_clipping_is_not_a_fault(factor, sharded, observed, words):
    """All gradients may be scaled by one factor; the parts of a sharded gradient are added up."""
    parts = (1.5, 2.5) if sharded else (4.0, 4.0)
    ranks = [
        RankEvidence(rank=rank, gradients={"a": gradient(own, factor * part, sharded=sharded)})
        for rank, (own, part) in enumerate(zip((3.0, 5.0), parts, strict=True))
    ]
    found = PATHS["ranks.gradients"].judge(SimpleNamespace(ranks=ranks), True)
    assert (found.observed, words in found.reason) == (observed, True), found.reason


def test_a_mean_in_16_bits_is_rounded():
    """A difference that is a fault in float32 is rounding in 16 bits."""
    assert gradient_finding((3.0, 4.1), (5.0, 4.1), coarse=True).observed is True
    assert gradient_finding((3.0, 4.1), (5.0, 4.1)).observed is False


def test_an_unobserved_gradient_is_unknown():
    """A gradient that exists only after the exchange, or on no rank, is unknown; a non-finite one is a fault."""
    assert gradient_finding((0.0, 2.0), (0.0, 2.0), size=0.0).status == "unknown"
    assert "1 had a gradient of zero" in gradient_finding((0.0, 0.0), (0.0, 0.0), size=0.0).reason
    assert "no finite gradient: a" in gradient_finding((NAN, NAN), (5.0, NAN), size=NAN).reason


def test_an_adapter_that_differs_is_named():
    """The reason has the rank and the parameters; adapters that cannot be compared are unknown."""
    ranks = [RankEvidence(rank=rank, adapter={"a": f"of {rank}"}) for rank in range(2)]
    assert (
        "rank 1 has another adapter than rank 0: 1 of 1 parameters differ, a"
        in PATHS["ranks.adapters"].judge(SimpleNamespace(ranks=ranks), True).reason
    )
    flat = [RankEvidence(rank=rank, flat=True) for rank in range(2)]
    assert PATHS["ranks.adapters"].judge(SimpleNamespace(ranks=flat), True).status == "unknown"


HALF = {"w": (50, 100), "n": (1, 1)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"w": (100, 100), "n": (1, 1)}}, "2 of 2 parameters of the base are whole on every rank, 100%"),
        ({"base": {"w": (40, 100), "n": (1, 1)}}, "the parts of w on 2 ranks do not add up to the whole"),
        ({"base": HALF, "four_bit": {"w": 50}}, "1 of 1 4-bit weights take more than 4 bits after sharding: w"),
    ],
)
def test_a_base_is_sharded_and_keeps_its_bits(changes, words):
    """Each rank holds its part, the parts add up to the whole, and a 4-bit weight takes half a byte."""
    check = judged(fact(0, **changes), fact(1, **changes), strategy="fsdp2")["ranks.sharded"]
    assert check.status == "fallback"
    assert words in check.reason


def test_a_sharded_base_in_4_bits_passes():
    """Norms may be unsharded."""
    facts = [fact(rank, base=HALF, four_bit={"w": 200}) for rank in range(2)]
    check = judged(*facts, strategy="fsdp2")["ranks.sharded"]
    assert check.met
    assert "1 weights still in 4 bits" in check.reason


def test_a_loss_that_changes_without_an_update_is_a_fault_with_its_known_cause():
    """The cause is named only for a sharded 4-bit base."""
    moved = {"base_losses": (4.93485, 4.93347, 4.90823, 4.87422)}
    sharded = fact(1, base=HALF, four_bit={"w": 200}, **moved)
    check = judged(fact(0), sharded, strategy="fsdp2")["ranks.steady"]
    assert "rank 1: silently wrong from the second forward on" in check.reason
    assert "is 4.93485, 4.93347" in check.reason
    assert 'repair = "quant_state"' in check.reason
    assert "quant_state" not in judged(fact(0), fact(1, **moved))["ranks.steady"].reason
    assert judged(fact(0, base_losses=()), fact(1, base_losses=()))["ranks.steady"].met  # parts of the base train
    for losses in ("repeated", "base_losses"):
        assert not judged(fact(0), fact(1, **{losses: (5.0, float("nan"))}))["ranks.steady"].met


def check(observed, status, *, required=4, path="base.bits"):
    return Check(path=path, required=required, observed=observed, status=status, reason="a reason")


def test_the_worst_check_of_the_ranks_counts_and_names_those_that_differ():
    """A path that fails on one rank fails, with the finding of each rank; a path that a rank does not report is
    unknown."""
    (merged,) = merge_checks([[check(4, "active")], [check(16, "fallback")]])
    assert merged.status == "fallback"
    assert "the ranks differ: rank 0: 4 (active); rank 1: 16 (fallback)" in merged.reason
    assert merge_checks([[check(4, "active")], [check(4, "active")]]) == [check(4, "active")]
    assert merge_checks([[check(16, "fallback")], [check(16, "fallback")]]) == [check(16, "fallback")]
    (unreported,) = merge_checks([[check(4, "active")], []])
    assert unreported.status == "unknown"
    assert "rank 1 has no check of it" in unreported.reason
    unrequired = check(None, "not_applicable", required=None)
    assert merge_checks([[check(3, "active", required=None)], [unrequired]])[0].observed == 3


def test_a_step_without_exchange_is_all_own_time():
    """A single rank waits for no other rank and passes a barrier before each step."""
    barriers = []
    share = profile_steps(lambda: time.sleep(0.02), lambda: barriers.append(1))
    assert len(barriers) == STEPS
    assert share.exchange_s == share.exposed_s == 0
    assert 0.02 <= share.own_s <= share.step_s  # the smallest of the steps, and their mean


CPU, GPU = "DeviceType.CPU", "DeviceType.CUDA"


def event(name, begin_s, end_s, *, thread=1, device=CPU, marked=False):
    """Return an event of the profiler, in microseconds."""
    span = SimpleNamespace(start=begin_s * 1e6, end=end_s * 1e6)
    return SimpleNamespace(name=name, time_range=span, thread=thread, device_type=device, is_user_annotation=marked)


def on_cpu(at_s):
    """Return a step of one second: it computes, and gloo exchanges for 0.4 s from the middle on, of which 0.3 s are
    waited for; gloo's thread adds the parts."""
    return [
        event(ranks._STEP, at_s, at_s + 1, marked=True),
        event("aten::mul", at_s, at_s + 0.6),
        event("aten::addmm", at_s + 0.1, at_s + 0.2),
        event("gloo:all_reduce", at_s + 0.5, at_s + 0.9, thread=2, marked=True),
        event("aten::add_", at_s + 0.6, at_s + 0.9, thread=2),
        event("aten::add_", at_s + 0.9, at_s + 1),
    ]


def on_gpu(at_s):
    """Return the same step on a GPU, whose host only launches; host ranges are GPU ranges as well."""
    return [
        event(ranks._STEP, at_s, at_s + 1, marked=True),
        event(ranks._STEP, at_s, at_s + 1, device=GPU, marked=True),
        event("aten::mul", at_s, at_s + 1),
        event("gemm_bf16", at_s, at_s + 0.6, device=GPU),
        event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", at_s + 0.5, at_s + 0.9, device=GPU),
        event("nccl:all_reduce", at_s + 0.5, at_s + 0.9, device=GPU, marked=True),
        event("adamw", at_s + 0.9, at_s + 1, device=GPU),
    ]


@pytest.mark.parametrize(("make_step", "on_device"), [(on_cpu, False), (on_gpu, True)])
def test_exchange_is_separated_from_concurrent_computation(make_step, on_device):
    """For gloo and NCCL, each of two steps has 0.4 s of exchange, of which 0.1 s are hidden."""
    share = read_times([*make_step(3.0), *make_step(7.0)], on_device=on_device)
    times = {name: getattr(share, name) for name in ("step_s", "exchange_s", "exposed_s", "own_s")}
    assert times == pytest.approx({"step_s": 1.0, "exchange_s": 0.4, "exposed_s": 0.3, "own_s": 0.7})


def test_the_own_time_of_a_rank_is_the_least_of_its_steps():
    """Other load adds to some steps only; shares are those of the mean step."""
    late = [event("aten::mul", 7.6, 8.0)]
    share = read_times([*on_cpu(3.0), *on_cpu(7.0), *late], on_device=False)
    assert share.own_s == pytest.approx(0.7)
    assert share.exposed_s == pytest.approx((0.3 + 0.0) / 2)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("gloo:broadcast", CPU), ("nccl:reduce_scatter", CPU), ("nccl:all_reduce", GPU),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", GPU),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", GPU),
    ],
)  # fmt: skip
def test_exchanges_are_known_by_their_names(name, device):
    """The names are those of torch's process groups, and the newer and older ones of NCCL's kernels."""
    events = [
        event(ranks._STEP, 0.0, 1.0),
        event("gemm", 0.0, 0.5, device=GPU),
        event(name, 0.5, 1.0, device=device),
    ]
    assert read_times(events, on_device=True).exchange_s == pytest.approx(0.5)


def test_a_session_without_a_gpu_kernel_has_no_times(monkeypatch):
    """Without GPU events all time would count as the rank's own, whatever it waited for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ranks, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))
    assert profile_steps(lambda: torch.ones(8) @ torch.ones(8), lambda: None) is None
