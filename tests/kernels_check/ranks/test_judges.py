"""What ranks say of themselves is judged together: one training, each its part, and who differs is named."""

from __future__ import annotations

import dataclasses

import pytest

from kernels_check.check import Check
from kernels_check.ranks.facts import Gradient, RankFacts
from kernels_check.ranks.judges import judge_ranks, merge_checks

ROWS = ("a", "b", "c", "d")


def gradient(own, exchanged, *, sharded=False, coarse=False, size=10.0):
    return Gradient(own=own, exchanged=exchanged, sharded=sharded, size=size, coarse=coarse)


def fact(rank, **changes):
    """A healthy rank of two, by DDP."""
    facts = RankFacts(
        rank=rank, ranks=2, rows=ROWS[2 * rank : 2 * rank + 2], whole=ROWS, base={"w": (100, 100), "n": (1, 1)},
        adapter={"a": "same"}, gradients={"a": gradient((3.0, 5.0)[rank], 4.0)}, repeated=(5.0,) * 4,
        base_losses=(6.0,) * 4,
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def judged(*facts, strategy="ddp"):
    return {check.path: check for check in judge_ranks(facts, strategy)}


def test_a_healthy_training_passes_every_path():
    """Each path is judged as required, and met."""
    checks = judged(fact(0), fact(1))
    assert set(checks) == {"ranks.data", "ranks.gradients", "ranks.adapters", "ranks.steady"}
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
def test_data_of_a_step_is_shared_out_once(changes, words):
    """Twice the same, foreign, missing and differing sequences are told apart."""
    check = judged(fact(0), fact(1, **changes))["ranks.data"]
    assert check.status == "fallback"
    assert words in check.reason


def test_a_sequence_that_the_data_holds_twice_is_no_fault():
    """What counts is how often a step holds it."""
    whole = ("a", "b", "a", "b")
    assert judged(*(fact(rank, whole=whole, rows=("a", "b")) for rank in range(2)))["ranks.data"].met


@pytest.mark.parametrize(
    ("exchanged", "words"),
    [
        ((8.0, 8.0), "divided by 1 and not by their number, 2"),
        ((2.0, 2.0), "divided by 4 and not by their number, 2"),
        ((3.0, 5.0), "keep each rank's own gradient, which was not exchanged: a"),
        ((-7.0, 1.0), "not the mean over 2 ranks: 1 of 1 parameters, a"),
    ],
)
def test_gradients_are_the_mean_over_ranks(exchanged, words):
    """A wrong divisor is named, and so is an exchange that did not take place."""
    facts = (fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], exchanged[rank])}) for rank in range(2))
    check = judged(*facts)["ranks.gradients"]
    assert check.status == "fallback"
    assert words in check.reason


def test_parts_of_a_sharded_gradient_are_one_whole():
    """Each rank has a part, and the parts together are the mean."""
    facts = (fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], (1.5, 2.5)[rank], sharded=True)}) for rank in (0, 1))
    assert judged(*facts)["ranks.gradients"].met


@pytest.mark.parametrize(("parts", "divisor"), [((3.0, 5.0), "1"), ((0.75, 1.25), "4")])
def test_parts_of_a_sharded_gradient_that_were_divided_by_another_number_are_a_fault(parts, divisor):
    """Their sum is that of the ranks' own over it."""
    facts = (fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], parts[rank], sharded=True)}) for rank in (0, 1))
    check = judged(*facts)["ranks.gradients"]
    assert check.status == "fallback"
    assert f"divided by {divisor} and not by their number, 2" in check.reason


def test_what_is_as_far_off_as_is_borne_passes():
    """A thousandth of the gradient's norm, from the mean and from what a rank had made; and no more."""

    def status(own, exchanged):
        facts = (fact(rank, gradients={"a": gradient(own[rank], exchanged[rank], size=1000.0)}) for rank in range(2))
        return judged(*facts)["ranks.gradients"]

    assert status((3.0, 5.0), (5.0, 5.0)).met
    assert not status((3.0, 5.0), (5.001, 5.001)).met
    assert "keep each rank's own gradient" in status((-100.0, 100.0), (-99.0, 101.0)).reason
    assert "keep each rank's own gradient" not in status((-100.0, 100.0), (-98.9, 101.0)).reason


def test_a_gradient_that_is_gone_after_the_exchange_was_divided_by_no_number():
    """It is not the mean, whatever became of it."""
    facts = (fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], 0.0)}) for rank in range(2))
    check = judged(*facts)["ranks.gradients"]
    assert check.status == "fallback"
    assert "not the mean over 2 ranks: 1 of 1 parameters, a" in check.reason


def test_ranks_that_train_unlike_parameters_are_not_compared():
    """Nor are those that train none."""
    others = {"b": gradient(3.0, 4.0)}
    check = judged(fact(0), fact(1, gradients=others))["ranks.gradients"]
    assert (check.status, check.reason) == ("unknown", "the ranks do not train the same parameters")
    check = judged(fact(0, gradients={}), fact(1, gradients={}))["ranks.gradients"]
    assert (check.status, check.reason) == ("unknown", "nothing trains")


def test_a_mean_in_16_bits_is_rounded():
    """What is a fault in float32 is rounding there."""
    for coarse in (True, False):
        facts = (fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], 4.1, coarse=coarse)}) for rank in range(2))
        assert judged(*facts)["ranks.gradients"].met is coarse


def test_gradients_that_nobody_saw_pass_nothing():
    """Gradients of zero on every rank leave the question open."""
    facts = (fact(rank, gradients={"a": gradient(0.0, 0.0, size=0.0)}) for rank in range(2))
    assert judged(*facts)["ranks.gradients"].status == "unknown"


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("own", "exchanged", "size", "words"),
    [
        ((NAN, 5.0), (NAN, NAN), (NAN, 10.0), "1 of 1 parameters have no finite gradient: a"),
        ((INFINITE, 5.0), (4.0, 4.0), (INFINITE, 10.0), "1 of 1 parameters have no finite gradient: a"),
        ((3.0, 5.0), (4.0, NAN), (10.0, 10.0), "not the mean over 2 ranks: 1 of 1 parameters, a"),
        ((3.0, 5.0), (NAN, 4.0), (10.0, 10.0), "not the mean over 2 ranks: 1 of 1 parameters, a"),
    ],
)
def test_what_is_no_number_is_no_mean(own, exchanged, size, words):
    """Nothing is close to it, and nothing far."""
    facts = (fact(rank, gradients={"a": gradient(own[rank], exchanged[rank], size=size[rank])}) for rank in range(2))
    check = judged(*facts)["ranks.gradients"]
    assert check.status == "fallback"
    assert words in check.reason


def test_a_gradient_that_was_not_seen_is_none_of_zero():
    """It is there after the exchange: where it came from is unknown, however well the others fit."""
    for late, status in ((0.0, "active"), (2.0, "unknown")):
        facts = (
            fact(rank, gradients={"a": gradient((3.0, 5.0)[rank], 4.0), "b": gradient(0.0, late, size=0.0)})
            for rank in range(2)
        )
        check = judged(*facts)["ranks.gradients"]
        assert check.status == status
        assert ("1 had a gradient of zero" in check.reason) is (status == "active")


def test_an_adapter_that_differs_is_named():
    """With the rank and the parameters."""
    check = judged(fact(0), fact(1, adapter={"a": "other"}))["ranks.adapters"]
    assert "rank 1 has another adapter than rank 0: 1 of 1 parameters differ, a" in check.reason


HALF = {"w": (50, 100), "n": (1, 1)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"w": (100, 100), "n": (1, 1)}}, "2 of 2 parameters of the base lie whole on every rank, 100%"),
        ({"base": {"w": (40, 100), "n": (1, 1)}}, "the parts of w on 2 ranks are not its whole"),
        ({"base": HALF, "four_bit": {"w": 50}}, "1 of 1 weights in 4 bits take more since they are sharded: w"),
    ],
)
def test_a_base_is_sharded_and_keeps_its_bits(changes, words):
    """Each rank holds its part, the parts are the whole, and half a byte is kept for each weight in 4 bits."""
    check = judged(fact(0, **changes), fact(1, **changes), strategy="fsdp2")["ranks.sharded"]
    assert check.status == "fallback"
    assert words in check.reason


def test_a_sharded_base_in_4_bits_passes():
    """Norms may lie whole."""
    facts = [fact(rank, base=HALF, four_bit={"w": 200}) for rank in range(2)]
    check = judged(*facts, strategy="fsdp2")["ranks.sharded"]
    assert check.met
    assert "1 weights still in 4 bits" in check.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {"w": (49, 98), "n": (2, 2)}},  # whole is a fiftieth, and no more is borne
        {"base": HALF, "four_bit": {"w": 199}},  # of an odd number of weights the last has a byte of its own
    ],
)
def test_what_a_sharded_base_may_have_just_so(changes):
    """At the bounds it is as it should be."""
    assert judged(fact(0, **changes), fact(1, **changes), strategy="fsdp2")["ranks.sharded"].met


@pytest.mark.parametrize("changes", [{"base": HALF}, {"four_bit": {"w": 200}}])
def test_a_loss_that_moves_for_another_reason_has_no_cause_that_is_known(changes):
    """Weights in 4 bits that are whole, or shards of others, are not what FSDP2 and bitsandbytes do to each other."""
    check = judged(fact(0), fact(1, base_losses=(5.0, 5.1), **changes))["ranks.steady"]
    assert check.status == "fallback"
    assert "quant_state" not in check.reason


def test_a_loss_may_move_by_how_a_device_adds():
    """A ten-thousandth of it, and no more."""
    assert judged(fact(0), fact(1, repeated=(10000.0, 10001.0)))["ranks.steady"].met
    assert not judged(fact(0), fact(1, repeated=(10000.0, 10001.1)))["ranks.steady"].met


def test_a_loss_that_moves_with_nothing_updated_is_a_fault_with_its_known_cause():
    """The cause is told where the base is in 4 bits and sharded, and nowhere else."""
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
    return Check(path=path, required=required, observed=observed, status=status, reason="said")


def test_checks_of_ranks_become_those_of_the_worst_which_says_who_differs():
    """A path that one rank fails is failed, with what each found; one that a rank has no row of is unknown."""
    (merged,) = merge_checks([[check(4, "active")], [check(16, "fallback")]])
    assert merged.status == "fallback"
    assert "the ranks differ: rank 0: 4 (active); rank 1: 16 (fallback)" in merged.reason
    assert merge_checks([[check(4, "active")], [check(4, "active")]]) == [check(4, "active")]
    assert merge_checks([[check(16, "fallback")], [check(16, "fallback")]]) == [check(16, "fallback")]
    (lacking,) = merge_checks([[check(4, "active")], []])
    assert lacking.status == "unknown"
    assert "no row of rank 1" in lacking.reason
    free = check(None, "not_applicable", required=None)
    assert merge_checks([[check(3, "active", required=None)], [free]])[0].observed == 3
