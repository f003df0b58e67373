"""What several sites do to the numbers of a run: nothing to ratios, and to absolute values what is said."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from harness.records.record import TrialRecord
from harness.stats import compare_trials
from harness.stats.estimate import estimate_trials
from harness.verdicts.sites import site_effects, site_notices

SPEEDS = (0.92, 0.97, 1.03, 1.08)
"""Planted: by what the step times of each site are multiplied."""


def record(name, replicate, site, time_s, **changes):
    found = TrialRecord(
        trial=f"r{replicate}-{name}", status="ok", name=name, variant=name, role="variant", replicate=replicate,
        position=0, interleaving="lockstep", site=site, seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={"step_time_s": (time_s,) * 3},
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def run_of(speeds):
    return [
        record(name, replicate, f"card-{replicate % len(speeds)}", speeds[replicate % len(speeds)] * factor)
        for replicate in range(2 * len(speeds))
        for name, factor in (("plain", 1.0), ("nf4", 1.5))
    ]


def test_the_planted_speeds_of_sites_are_found():
    """Over all variants, whatever they cost."""
    effects = site_effects(run_of(SPEEDS))
    centre = math.exp(np.mean(np.log(SPEEDS)))
    assert effects == pytest.approx({f"card-{n}": speed / centre - 1 for n, speed in enumerate(SPEEDS)})


def test_a_run_of_several_sites_says_how_they_differ():
    """With each site, and their standard deviation; one site says nothing."""
    (notice,) = site_notices(run_of(SPEEDS))
    assert notice.code == "sites"
    assert "4 sites, which differ by 7.0%" in notice.message
    assert "card-0 -7.8%" in notice.message
    assert list(site_notices(run_of((1.0,)))) == []
    assert list(site_notices([record("plain", 0, "", 1.0)])) == []


def test_a_site_that_differs_from_its_like_is_named():
    """From a tenth away from the median on; of two nobody can say which it is."""
    notices = {notice.code: notice.message for notice in site_notices(run_of((1.0, 1.01, 1.5, 0.99)))}
    assert notices["site-unlike"] == "site card-2 is 49% slower than the median of its like."
    assert [notice.code for notice in site_notices(run_of((1.0, 1.5)))] == ["sites"]


def test_sites_without_a_variant_in_common_are_not_compared():
    """A failed trial counts for nothing, and neither does a variant that one site has not measured."""
    records = [record("plain", 0, "a", 1.0), record("plain", 1, "b", 2.0, status="oom")]
    assert site_effects(records) == {}


@pytest.mark.parametrize("sites", [1, 4])
def test_intervals_of_ratios_cover_on_several_sites_as_on_one(sites):
    """Of 2000 simulated studies of 8 replicates 94 to 96 % hold the true ratio within a 95 % interval, sites of planted
    speeds or not: a site's speed is on both sides of a pair. Absolute values carry it in their interval."""
    random, true, covered, widths = np.random.default_rng(7), 1.05, 0, []
    speeds = np.array(SPEEDS if sites > 1 else (1.0,))
    for _ in range(2000):
        site = speeds[np.arange(8) % sites]
        base = site * np.exp(random.normal(0, 0.02, 8))
        other = site * true * np.exp(random.normal(0, 0.02, 8))
        found = compare_trials([[one] for one in base], [[one] for one in other], pairing="replicate")
        covered += found.low <= true <= found.high
        estimate = estimate_trials([[one] for one in base])
        widths.append(math.log(estimate.high / estimate.low))
    assert 0.94 <= covered / 2000 <= 0.96
    assert bool(np.mean(widths) > 0.08) is (sites > 1)
