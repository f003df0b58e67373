"""Tests of the calibration of a machine: rates, power and costs of constructed runs with known noise."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

import lorameter.verdicts.calibrate
from lorameter.errors import InvalidRunError
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.stats import replicates_to_see
from lorameter.verdicts.calibrate import EFFECTS, calibrate, planned_effects

TURNS = 9


@pytest.fixture
def ab_run(small_study):
    """A function that makes an A/B run of `plain` whose log ratios have mean log(`ratio`) and standard deviation `sd`.

    Both hold exactly, over all replicates. The machine varies by 30 % between replicates, for all arms equally.
    `change` changes each record and drops it by returning None.
    """

    def make(*, ratio=1.05, sd=0.01, replicates=24, level="lockstep", change=lambda record: record):
        rng = random.Random(5)

        def scatter():
            values = np.array([rng.gauss(0, 1) for _ in range(replicates)])
            return sd * (values - values.mean()) / values.std(ddof=1)

        machine = [0.1 * math.exp(rng.gauss(0, 0.3)) for _ in range(replicates)]
        arms = (("base", "variant", 0 * scatter()), ("base", "control", scatter()),
                ("candidate", "variant", math.log(ratio) + scatter()))  # fmt: skip
        records = [
            TrialRecord(
                trial=f"r{replicate}-plain-{side}-{role}", status="ok", name="plain", side=side, role=role, position=0,
                variant=small_study.variant("plain").id, replicate=replicate, seed=replicate, interleaving=level,
                started_unix_s=100.0 + 10 * replicate, wall_time_s=10.0, turn_lengths=(1,) * TURNS,
                samples={
                    "step_time_s": tuple(
                        machine[replicate] * math.exp(logs[replicate]) * factor for factor in turn_noise
                    ),
                },
            )
            for replicate in range(replicates)
            for turn_noise in [[math.exp(rng.gauss(0, 0.3)) for _ in range(TURNS)]]
            for side, role, logs in arms
        ]  # fmt: skip
        kept = tuple(changed for record in records if (changed := change(record)) is not None)
        manifest = Manifest(
            run="ab", study=codec.to_json(small_study), phases=("train",), interleaving=level, seed=0,
            order=tuple(record.trial for record in kept), created_unix_s=1.0, fingerprint="f", status="complete",
            provenance={"device_name": "Test CPU"}, sides={"base": {"label": "a"}, "candidate": {"label": "b"}},
        )  # fmt: skip
        return Run(path=Path("ab"), manifest=manifest, records=kept)

    return make


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Reduce the draws, so that shares are precise to a few per cent in a tenth of the time."""
    monkeypatch.setattr(lorameter.verdicts.calibrate, "DRAWS", 200)


@pytest.fixture
def plain(small_study):
    """The variant of these runs."""
    return small_study.variant("plain")


def test_a_slow_down_is_found_without_false_alarms(ab_run, plain):
    """A slow-down of 5 % at a standard deviation of 1 % is found by nearly every gate, and identical code is
    equivalent."""
    result = calibrate(ab_run(), plain)
    assert [rate.replicates for rate in result.rates] == [5, 8, 12, 12]
    assert result.rates[-1].used < 6  # it ends when it is decided
    assert all(rate.false_alarms < 0.02 for rate in result.rates)
    assert all(rate.found > 0.97 for rate in result.rates)
    assert all(rate.equivalent > 0.97 for rate in result.rates)
    assert (result.identical.verdict, result.injected.verdict) == ("equivalent", "regressed")
    assert result.injected.ratio == pytest.approx(1.05)
    assert result.interleaving == "lockstep"
    assert (result.run, result.device, result.replicates) == ("ab", "Test CPU", 24)


def test_costs_follow_from_the_scatter_and_the_time(ab_run, plain):
    """The cost of each effect follows from the noncentral t, in minutes of this run's replicates; its tolerance is
    below the effect."""
    result = calibrate(ab_run(sd=0.02), plain)
    assert result.seconds_per_replicate == pytest.approx(10.0)
    assert [cost.effect for cost in result.prices] == list(EFFECTS)
    assert [cost.tolerance for cost in result.prices] == [0.005, 0.01, 0.01]
    for cost in result.prices:
        assert cost.replicates == replicates_to_see(cost.effect, result.sd, tolerance=cost.tolerance)
        assert cost.minutes == pytest.approx(cost.replicates * 10 / 60)
    assert result.prices[0].replicates > result.prices[1].replicates > result.prices[2].replicates
    lines = planned_effects(result)
    assert lines[0].startswith(f"1 %: {result.prices[0].replicates} replicates")
    assert "tolerance of 0.5 %" in lines[0]
    assert "tolerance" not in lines[2]


def test_too_few_replicates_are_refused(ab_run, plain):
    """Gates of 5 replicates need more than 5 to draw from; the error gives the present number."""
    assert calibrate(ab_run(replicates=6), plain).replicates == 6
    with pytest.raises(InvalidRunError, match=r"run ab: 5 replicates ok.*needs 6"):
        calibrate(ab_run(replicates=5), plain)


def test_trials_that_are_not_ok_do_not_count(ab_run, plain):
    """Failed trials of any arm do not count as replicates or in the rates; gates are limited to the replicates of both
    pairs."""

    def fail_late_trials(side, role):
        def change(record):
            late = record.replicate >= 8 and (record.side, record.role) == (side, role)
            return record.replaced(status="crashed") if late else record

        return change

    for arm in (("candidate", "variant"), ("base", "control"), ("base", "variant")):
        result = calibrate(ab_run(change=fail_late_trials(*arm)), plain)
        assert [rate.replicates for rate in result.rates] == [5]
    assert calibrate(ab_run(change=fail_late_trials("base", "control")), plain).replicates == 8
