"""Tests of runs on several sites: a notice about their differences, and the interval of absolute values."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import numpy as np

from lorameter.records.record import TrialRecord
from lorameter.stats.estimate import estimate_trials
from lorameter.verdicts.series import group_trials
from lorameter.verdicts.sites import site_notices

SPEEDS = (0.92, 0.97, 1.03, 1.08)
"""The injected factor of each site's step times."""


def record(name, replicate, site, time_s, **changes):
    found = TrialRecord(
        trial=f"r{replicate}-{name}", status="ok", name=name, variant=name, role="variant", replicate=replicate,
        position=0, interleaving="lockstep", site=site, seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={"step_time_s": (time_s,) * 3},
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


def run_of(speeds):
    return [
        record(name, replicate, f"GPU-{replicate % len(speeds)}", speeds[replicate % len(speeds)] * factor)
        for replicate in range(2 * len(speeds))
        for name, factor in (("plain", 1.0), ("nf4", 1.5))
    ]


def test_a_run_of_several_sites_has_a_notice_of_their_difference():
    """The notice has each site and the standard deviation; a run on one site has no notice."""
    (notice,) = site_notices(run_of(SPEEDS))
    assert notice.code == "sites"
    assert "4 sites, which differ by 7.0% [4.0%, 26.1%] (standard deviation of their step times, wi" in notice.message
    assert "GPU-0 -7.8%" in notice.message
    assert list(site_notices(run_of((1.0,)))) == []
    assert list(site_notices([record("plain", 0, "", 1.0)])) == []


def test_a_site_that_differs_from_the_median_is_named():
    """The notice names a site that is at least 10 % from the median; with two sites it names none."""
    notices = {notice.code: notice.message for notice in site_notices(run_of((1.0, 1.01, 1.5, 0.99)))}
    assert notices["node-mismatch"] == "site GPU-2 is 49% slower than the median of its like."
    assert [notice.code for notice in site_notices(run_of((1.0, 1.5)))] == ["sites"]


def scattered(*sites):
    """Return a run of one variant with the given log times of the replicates on each site."""
    return [
        record("plain", replicate, f"card-{site}", math.exp(log))
        for site, logs in enumerate(sites)
        for replicate, log in enumerate(logs, 10 * site)
    ]


def test_scatter_of_replicates_is_not_a_difference_of_sites():
    """The scatter of the replicates is subtracted from the difference of sites; with one replicate on each it is
    unknown and stays in."""
    for sites, said in (
        (((-0.01, 0.01), (0.09, 0.11)), "differ by 7.0%"),
        (((-0.05, 0.05), (-0.04, 0.06)), "differ by 0.0% [0.0%,"),
        (((0.0,), (0.1,)), "differ by 7.1% [3.2%, 225.6%] (standard deviation of their step times, with what"),
    ):
        (notice,) = site_notices(scattered(*sites))
        assert said in notice.message


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
