"""The words of findings: those of variants, those of sides, and the sentence for what cannot be told."""

from __future__ import annotations

import dataclasses

import pytest

from harness.report.words import say_effect, say_open, title_of, title_of_ratio, write_finding
from harness.stats import MOST_ADVISED, Comparison, compare_trials

OPEN = Comparison(
    verdict="inconclusive", ratio=0.92, low=0.39, high=2.18, reason="r", replicates=3, replicates_needed=400, mde80=2.12
)  # fmt: skip


def found(verdict):
    return dataclasses.replace(OPEN, verdict=verdict)


@pytest.mark.parametrize(
    ("metric", "worse", "better"),
    [
        ("step_time_s", "slower", "faster"),
        ("tokens_per_s", "slower", "faster"),
        ("host_peak_train_bytes", "larger", "smaller"),
        ("held_out_loss", "higher", "lower"),
        ("energy_per_step_j", "higher", "lower"),
        ("mfu", "lower", "higher"),
        ("another project's", "slower", "faster"),
    ],
)
def test_variants_are_slower_or_faster_and_candidates_regress_or_improve(metric, worse, better):
    """In the words of what is measured; the verdict that programs know stays beside it."""
    cells = [write_finding(found(verdict), metric, 0.05, "variants") for verdict in ("regressed", "improved")]
    assert [(cell.verdict, cell.said) for cell in cells] == [("regressed", worse), ("improved", better)]
    sides = [write_finding(found(verdict), metric, 0.05, "sides") for verdict in ("regressed", "improved")]
    assert [cell.said or cell.verdict for cell in sides] == ["regressed", "improved"]


def test_equivalent_says_within_what():
    """Computed bytes are equal, and not within anything."""
    assert write_finding(found("equivalent"), "step_time_s", 0.05, "sides").said == "equivalent ±5 %"
    assert write_finding(found("equivalent"), "linear_weights_bytes", 0.0, "sides").said == "equal"


def test_what_cannot_be_told_is_a_sentence():
    """What it may be, what would have been seen, and another way than hundreds of replicates."""
    said = say_open(OPEN, "step_time_s", "separate")
    assert said == (
        "Cannot tell: between 61 % faster and 118 % slower; only 212 % would have been seen. "
        "Use `lorameter ab`, or stop other work."
    )


@pytest.mark.parametrize("level", ["shared-base", "lockstep", "replicates", "separate"])
@pytest.mark.parametrize("needed", [2, MOST_ADVISED, MOST_ADVISED + 1, 10_000, None])
def test_nobody_is_advised_more_replicates_than_anybody_takes(level, needed):
    """Up to fifty the number is said, beyond another way, at each level one that helps there."""
    said = say_open(dataclasses.replace(OPEN, replicates_needed=needed), "step_time_s", level)
    advised = level != "separate" and needed is not None and needed <= MOST_ADVISED
    assert (f"Measure {needed} replicates" in said) is advised
    assert "stop other work" in said.lower()


def test_one_replicate_says_so():
    """There is no interval to speak of."""
    single = compare_trials([[1.0]], [[1.1]], pairing="replicate")
    assert say_open(single, "step_time_s", "lockstep") == "Cannot tell: one replicate gives no interval. Measure 5."


def test_an_effect_is_said_in_per_cent_with_its_interval():
    """Above 1 is worse, whichever way the metric goes."""
    slower = dataclasses.replace(OPEN, ratio=1.039, low=1.037, high=1.042)
    assert say_effect(slower, "tokens_per_s") == "3.9 % slower [+3.7 %, +4.2 %]"
    smaller = dataclasses.replace(OPEN, ratio=0.8, low=0.8, high=0.8)
    assert say_effect(smaller, "host_peak_train_bytes") == "20 % smaller [−20 %, −20 %]"
    assert say_effect(dataclasses.replace(OPEN, ratio=None), "step_time_s") == ""


def test_the_ratio_of_a_rate_is_named_a_slow_down():
    """It is turned over, so that above 1 is worse; a kind of memory has a name for people."""
    assert title_of_ratio("tokens_per_s") == "real tokens/s, slow-down"
    assert title_of_ratio("step_time_s") == "step time"
    assert title_of("device_peak_allocated_generate_bytes") == "device peak allocated, generation"
    assert title_of("somebody's own") == "somebody's own"


def test_a_cold_start_is_told_to_take_no_turns():
    """It is an interpreter of its own: no level of interleaving has it beside another."""
    found = dataclasses.replace(OPEN, replicates_needed=None)
    assert "interleave" not in say_open(found, "cold_start_time_s", "replicates")
    assert "interleave" in say_open(found, "step_time_s", "replicates")
