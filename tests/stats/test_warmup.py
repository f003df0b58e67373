"""Warm-up: what is found in simulated step times, and what is not."""

import math
from collections import Counter

import numpy as np
import pytest

from harness.stats import WarmupResult, is_steady, warmup_end

STEP = np.arange(60)


def found(shape, sd, draws=150, seed=61):
    """Results on series of this log shape under normal log noise."""
    rng = np.random.default_rng(seed)
    return [warmup_end(np.exp(rng.normal(shape, sd))) for _ in range(draws)]


def kinds(results):
    """Share of each kind."""
    return {kind: count / len(results) for kind, count in Counter(one.kind for one in results).items()}


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize("sd", [0.003, 0.02, 0.19])
def test_flat_noise_is_flat(count, sd):
    """Noise without a shift is flat in at least 92 % of series, at any size of the noise, and then drops nothing."""
    results = found(np.zeros(count), sd)
    assert kinds(results)["flat"] >= 0.92
    assert all(one.steps == 0 for one in results if one.kind == "flat")


@pytest.mark.parametrize("sd", [0.003, 0.02])
def test_decaying_warmup_is_dropped(sd):
    """An exponential decay from 2.7 times is dropped up to where it no longer matters, and not far beyond."""
    shape = np.exp(-STEP / 5)
    results = found(shape, sd)
    assert kinds(results)["warmup"] >= 0.95
    median_steps = int(np.median([one.steps for one in results]))
    assert shape[median_steps] < 0.05
    assert median_steps < 30


@pytest.mark.parametrize("sd", [0.003, 0.02, 0.1])
def test_compiling_first_step_is_found(sd):
    """One slow first step is warm-up, and costs no more than one minimal segment."""
    results = found(4.0 * (STEP < 1), sd)
    assert kinds(results)["warmup"] >= 0.92
    assert np.median([one.steps for one in results]) == 3


def test_plateau_ends_where_it_ends():
    """Ten steps at +30 % are dropped to the step."""
    results = found(0.3 * (STEP < 10), 0.02)
    assert np.mean([one == WarmupResult(steps=10, kind="warmup") for one in results]) >= 0.95


def test_throttling_is_a_slowdown():
    """A shift upwards half-way is a slow-down, and the steady state begins there."""
    results = found(0.3 * (STEP >= 30), 0.02)
    assert np.mean([one == WarmupResult(steps=30, kind="slowdown") for one in results]) >= 0.95


@pytest.mark.parametrize(
    "shape",
    [0.3 * (STEP >= 52), 0.3 * (STEP // 10 % 2), 0.02 * STEP],
    ids=["late shift", "alternating", "drift"],
)
def test_no_steady_state(shape):
    """A shift near the end, two alternating levels and a steady drift have no steady state: nothing is left over."""
    results = found(shape, 0.02)
    assert kinds(results)["no_steady_state"] >= 0.95
    assert all(one.steps == 60 for one in results if one.kind == "no_steady_state")


def test_tolerance_bounds_what_is_dropped():
    """A leading plateau at +1.5 % is within the default tolerance of 2 %, and is warm-up for a tolerance of 0.5 %."""
    series = np.exp(np.random.default_rng(64).normal(0.015 * (STEP < 20), 0.003))
    assert warmup_end(series) == WarmupResult(steps=0, kind="flat")
    assert warmup_end(series, tolerance=0.005) == WarmupResult(steps=20, kind="warmup")


@pytest.mark.parametrize("sd", [0.02, 0.1])
def test_passing_burst_is_not_warmup(sd):
    """Ten slow steps in the middle, with the same level before and after, are noise: nothing is dropped."""
    assert kinds(found(0.3 * ((STEP >= 20) & (STEP < 30)), sd))["flat"] >= 0.9


@pytest.mark.parametrize("where", [1, 2, 30, 58, 59])
def test_lone_hiccup_is_not_warmup(where):
    """One slow step that is not the first changes nothing, wherever it falls."""
    assert kinds(found(2.0 * (where == STEP), 0.02))["flat"] >= 0.92


def test_constant_series_is_flat():
    """Without any noise the noise floor stands in, and a thousandth is no shift."""
    assert warmup_end([0.5] * 30) == WarmupResult(steps=0, kind="flat")
    assert warmup_end([0.5005] * 10 + [0.5] * 20, tolerance=0.0) == WarmupResult(steps=0, kind="flat")
    assert warmup_end([0.6] * 10 + [0.5] * 20) == WarmupResult(steps=10, kind="warmup")


def test_too_few_steps_show_nothing():
    """Below two minimal segments no steady state can be shown, and none is claimed."""
    assert warmup_end([1.0] * 5) == WarmupResult(steps=5, kind="no_steady_state")
    assert warmup_end([1.0] * 6) == WarmupResult(steps=0, kind="flat")
    assert warmup_end([1.0] * 9, min_segment=5).kind == "no_steady_state"


def test_unit_does_not_matter():
    """Milliseconds and seconds give the same answer."""
    series = np.exp(np.random.default_rng(62).normal(np.exp(-STEP / 5), 0.05))
    assert warmup_end(series) == warmup_end(series * 1000)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "samples has no samples"),
        ([1.0, 0.0], {}, r"samples sample 1 is 0\.0"),
        ([1.0], {"min_segment": 1}, "min_segment is 1"),
        ([1.0], {"tolerance": -1}, "tolerance is -1"),
    ],
)
def test_bad_input_is_an_error(samples, options, message):
    """Bad input raises with the offender's name."""
    with pytest.raises(ValueError, match=message):
        warmup_end(samples, **options)


def first_steady(series, window):
    """After how many steps `is_steady` first says so."""
    return next((count for count in range(1, len(series) + 1) if is_steady(series[:count], window)), None)


def stops(shape, sd, window, draws=150, seed=63):
    """First steady counts over simulated series."""
    rng = np.random.default_rng(seed)
    return [first_steady(np.exp(rng.normal(shape, sd)).tolist(), window) for _ in range(draws)]


def test_online_waits_for_two_windows():
    """Fewer than two windows are never steady; two flat ones are."""
    assert not is_steady([1.0] * 9, 5)
    assert is_steady([1.0] * 10, 5)


@pytest.mark.parametrize("sd", [0.003, 0.02, 0.1])
def test_online_stops_soon_on_flat_noise(sd):
    """Flat noise is steady within a window of the earliest moment in 95 % of runs."""
    assert np.mean([stop is not None and stop <= 15 for stop in stops(np.zeros(60), sd, 5)]) >= 0.95


@pytest.mark.parametrize("sd", [0.003, 0.02])
def test_online_goes_on_while_it_decays(sd):
    """A decaying warm-up is not left before its remaining excess is below a tenth, and is left in the end."""
    counts = stops(np.exp(-STEP / 5), sd, 5)
    assert None not in counts
    assert np.mean([math.exp(-(count - 1) / 5) < 0.1 for count in counts]) >= 0.95


def test_online_ignores_old_steps_and_one_hiccup():
    """Only the last two windows count, and one slow step in either does not decide."""
    assert is_steady([99.0] * 5 + [1.0] * 10, 5)
    assert is_steady([1.0, 1.0, 9.0, 1.0, 1.0] + [1.0] * 5, 5)
    assert is_steady([1.0] * 5 + [1.0, 0.1, 1.0, 1.0, 1.0], 5)


def test_online_tolerance_bounds_the_drop():
    """A drop within the tolerance is steady, one beyond is not, and a rise is."""
    assert is_steady([1.015] * 3 + [1.0] * 3, 3)
    assert not is_steady([1.025] * 3 + [1.0] * 3, 3)
    assert is_steady([1.025] * 3 + [1.0] * 3, 3, tolerance=0.03)
    assert is_steady([1.0] * 3 + [1.5] * 3, 3)


def test_online_bad_input_is_an_error():
    """A window of one and a sample that is no duration are refused, the sample by its place in the whole series."""
    with pytest.raises(ValueError, match="window is 1"):
        is_steady([1.0, 1.0], 1)
    with pytest.raises(ValueError, match="samples sample 3 is nan"):
        is_steady([1.0, 1.0, 1.0, math.nan], 2)
