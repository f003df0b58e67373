"""Tests of series of records: pairing by replicate, orientation, and excluded trials.

Tests of runs on several sites: a notice about their differences, and the interval of absolute values.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from lorameter.records.record import TrialRecord
from lorameter.stats import estimate_trials
from lorameter.verdicts.notices import site_notices
from lorameter.verdicts.series import Series, compare_series, group_trials


def record(name="a", replicate=0, status="ok", role="variant", step=0.5, **fields):
    samples = {
        "step_time_s": (step, step, step, step), "timed_loss": (4.0, 3.0, 2.0, 1.0), "turn_tokens": (64.0, 64.0),
        "turn_sequences": (4.0, 4.0), "request_time_s": (2.0, 4.0),
    }  # fmt: skip
    return TrialRecord(
        trial=f"r{replicate}-{name}", status=status, name=name, variant=name, role=role, replicate=replicate,
        position=0, interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=samples,
        values={"held_out_loss": 3.0, "new_tokens": 8.0}, **fields,
    )  # fmt: skip


def test_only_trials_that_are_ok_count():
    """An invalid trial is in no estimate and in no pair."""
    records = [record(replicate=i, status="invalid" if i == 1 else "ok") for i in range(3)]
    series = group_trials(records)["a", "variant"]
    assert len(series.records) == 3
    assert series.estimate("step_time_s").replicates == 2
    other = Series(name="b", role="variant", records=tuple(record("b", i, step=0.6) for i in range(3)))
    assert compare_series(series, other, "step_time_s").replicates == 2


def timed(name, replicate, *, share=1.0, step=0.5, **fields):
    """Return a trial of four steps that had `share` of a CPU."""
    one = record(name, replicate, step=step, **fields)
    one.samples["step_cpu_time_s"] = (share * step,) * 4
    return one


def sides(shares, *, step=0.5, slow=0.5, **fields):
    base = tuple(timed("a", i, share=left, step=step * (1 + i / 100), **fields) for i, (left, _) in enumerate(shares))
    other = tuple(
        timed("b", i, share=right, step=slow * (1 + i / 100), **fields) for i, (_, right) in enumerate(shares)
    )
    return Series(name="a", role="variant", records=base), Series(name="b", role="variant", records=other)


def test_pairs_of_disturbed_trials_are_left_out_and_counted():
    """A trial with too little CPU time is dropped with its partner, whatever their times are."""
    base, other = sides([(1, 1)] * 5 + [(0.5, 1), (1, 0.5)])
    found = compare_series(base, other, "step_time_s")
    assert found.replicates == 5
    assert "dropped 2 of 7 pairs: base flagged in 1, candidate in 1" in found.reason


def test_nothing_is_dropped_where_too_little_would_be_left():
    """All pairs are kept if fewer than five would remain."""
    found = compare_series(*sides([(0.5, 1)] * 3 + [(1, 1)] * 4), "step_time_s")
    assert found.replicates == 7
    assert "below 5: kept all" in found.reason


def test_nothing_is_dropped_where_one_side_is_disturbed_more_often():
    """Unbalanced flags could be an effect of the candidate, which may wait where the base computes."""
    found = compare_series(*sides([(1, 0.5)] * 8 + [(1, 1)] * 6), "step_time_s")
    assert found.replicates == 14
    assert "not balanced" in found.reason


@pytest.mark.parametrize(("level", "words"), [("shared-base", "turn by turn"), ("replicates", "by replicate")])
def test_the_pairing_follows_from_how_the_trials_alternated(level, words):
    """A metric of isolated trials is paired by replicate at every interleaving level."""
    base, other = sides([(1, 1)] * 3)
    for series in (base, other):
        turns = tuple(one.replaced(interleaving=level) for one in series.records)
        isolated = tuple(
            one.replaced(samples={"merged_request_time_s": (1.0, 2.0)}, values={}) for one in series.records
        )
        object.__setattr__(series, "records", (*turns, *isolated))
    assert f"paired {words}" in compare_series(base, other, "step_time_s").reason
    assert "paired by replicate" in compare_series(base, other, "merged_request_time_s").reason
    assert base.interleaving("step_time_s") == level


@pytest.mark.parametrize(("level", "pairs"), [("lockstep", 2), ("replicates", 3)])
def test_turns_are_paired_within_one_attempt(level, pairs):
    """Turns of different attempts are not paired; whole trials are paired by replicate."""

    def series(name, attempts):
        records = [record(name, replicate) for replicate in range(3)]
        changed = (one.replaced(attempt=n, interleaving=level) for one, n in zip(records, attempts, strict=True))
        return Series(name=name, role="variant", records=tuple(changed))

    assert compare_series(series("a", (0, 1, 0)), series("b", (0, 0, 0)), "step_time_s").replicates == pairs


def test_only_losses_after_the_most_steps_count():
    """A shorter training has no comparable loss."""
    records = [record("a", replicate) for replicate in range(3)]
    for one, steps in zip(records, (12.0, 8.0, 12.0), strict=True):
        one.values["training_steps"] = steps
    series = Series(name="a", role="variant", records=tuple(records))
    assert [one.replicate for one in series.measuring("held_out_loss")] == [0, 2]
    assert len(series.trials("step_time_s")) == 3


SPEEDS = (0.92, 0.97, 1.03, 1.08)
"""The injected factor of each site's step times."""


def record_sites(name, replicate, site, time_s, **changes):
    found = TrialRecord(
        trial=f"r{replicate}-{name}", status="ok", name=name, variant=name, role="variant", replicate=replicate,
        position=0, interleaving="lockstep", site=site, seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={"step_time_s": (time_s,) * 3},
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


def run_of(speeds):
    return [
        record_sites(name, replicate, f"GPU-{replicate % len(speeds)}", speeds[replicate % len(speeds)] * factor)
        for replicate in range(2 * len(speeds))
        for name, factor in (("plain", 1.0), ("nf4", 1.5))
    ]


def test_a_run_of_several_sites_has_a_notice_of_their_difference():
    """The notice has each site; a run on one site has no notice."""
    (notice,) = site_notices(run_of(SPEEDS))
    assert notice.code == "sites"
    assert "4 sites (step times, from their mean: " in notice.message
    assert "GPU-0 -7.8%" in notice.message
    assert list(site_notices(run_of((1.0,)))) == []
    assert list(site_notices([record_sites("plain", 0, "", 1.0)])) == []


def test_intervals_of_absolute_values_cover_the_mean_of_such_sites():
    """In 2000 simulated studies of 8 replicates on four random sites, 94 to 96 % of the 95 % intervals cover the mean
    speed; intervals that ignore the sites cover it too rarely."""
    random, covered = np.random.default_rng(7), {True: 0, False: 0}
    sites = [f"GPU-{replicate % 4}" for replicate in range(8)]
    for _ in range(2000):
        speeds = random.normal(0, 0.06, 4)[np.arange(8) % 4]
        trials = np.exp(speeds + random.normal(0, 0.02, 8))[:, None]
        for known in covered:
            found = estimate_trials(trials, blocks=sites if known else None)
            covered[known] += found.low <= 1.0 <= found.high
    assert 0.94 <= covered[True] / 2000 <= 0.96
    assert covered[False] / 2000 < 0.88


def test_an_estimate_of_a_run_is_over_its_sites():
    """Each site gives one value; with one site the estimate is over replicates."""
    run = [one for one in run_of(SPEEDS) if one.name == "plain"]
    found = group_trials(run)["plain", "variant"].estimate("step_time_s")
    assert found == dataclasses.replace(estimate_trials([[speed] for speed in SPEEDS]), replicates=8, samples=24)
    (alone,) = {one.estimate("step_time_s") for one in group_trials(run_of((1.0,))[::2]).values()}
    assert alone == estimate_trials([[1.0] * 3] * 2)
