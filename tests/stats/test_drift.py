"""Tests of drift: which changes of level are found in simulated step times, and which are not.

Tests of the warm-up: when simulated step times are steady enough to stop discarding them.

Tests that outliers are counted by Tukey's fences, each in its own trial.

Tests that refusals name the side, the trial, the sample, the value and the remedy.

Tests of `import lorameter.stats`: its exports and its cost.
"""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from lorameter.stats import count_outliers, drifting, is_steady
from lorameter.stats.samples import checked_trials, trial_medians

STEP = np.arange(60)


def drifts(samples, *, tolerance):
    return drifting([samples], tolerance=tolerance)[0]


def share(shape, sd, draws=150, seed=61, tolerance=0.02):
    """Return the share of drifting series with this log shape and normal log noise."""
    rng = np.random.default_rng(seed)
    return np.mean([drifts(np.exp(rng.normal(shape, sd)), tolerance=tolerance) for _ in range(draws)])


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize("sd", [0.003, 0.02, 0.19])
def test_flat_noise_is_not_drift(count, sd):
    """At most one of 25 series without a shift is called drifting, for any noise."""
    assert share(np.zeros(count), sd) <= 0.04


@pytest.mark.parametrize(
    "shape",
    [0.3 * (STEP >= 30), 0.3 * (STEP >= 52), 0.3 * (STEP // 10 % 2), 0.02 * STEP],
    ids=["throttled half-way", "late shift", "alternating", "steadily slower"],
)
def test_a_change_of_level_is_found(shape):
    """A falling clock, alternating levels and steadily rising times are found."""
    assert share(shape, 0.02) >= 0.95


@pytest.mark.parametrize(
    "shape",
    [np.exp(-STEP / 5), 4.0 * (STEP < 1), 0.3 * (STEP < 10), 0.3 * ((STEP >= 20) & (STEP < 30))],
    ids=["decaying", "compiling first step", "leading plateau", "passing burst"],
)
def test_a_slow_start_and_a_passing_burst_are_not_drift(shape):
    """The later level is steady and the faster one."""
    assert share(shape, 0.02) <= 0.08


@pytest.mark.parametrize("where", [1, 2, 30, 58, 59])
def test_a_single_slow_step_is_not_drift(where):
    """A single slow step is not a drift, at any position."""
    assert share(2.0 * (where == STEP), 0.02) <= 0.08


def test_the_tolerance_decides_whether_a_rise_is_drift():
    """A rise by 1.5 % is within a tolerance of 2 % but not within one of 0.5 %."""
    rise = 0.015 * (STEP >= 30)
    assert share(rise, 0.003) <= 0.04
    assert share(rise, 0.003, tolerance=0.005) >= 0.95


@pytest.mark.parametrize(
    ("samples", "message"), [([], "trial 0 has no samples"), ([1.0, 0.0], r"trial 0 sample 1 is 0\.0")]
)
def test_bad_input_is_an_error(samples, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        drifts(samples, tolerance=0.02)


def test_many_series_are_judged_as_each_alone():
    """The result does not depend on the lengths, the order and the levels of the other series."""
    rng = np.random.default_rng(7)
    shapes = [np.zeros(60), 0.3 * (STEP > 40), np.zeros(3), 0.01 * STEP, np.zeros(200), -0.3 * (STEP[:30] > 8)]
    series = [np.exp(rng.normal(shape, 0.02)) for _ in range(20) for shape in shapes]
    found = drifting(series, tolerance=0.02)
    assert found == [drifts(one, tolerance=0.02) for one in series]
    assert 0 < sum(found) < len(found)
    assert drifting([], tolerance=0.02) == []


def first_steady(series, window):
    """Return the number of steps after which `is_steady` is true first."""
    return next((count for count in range(1, len(series) + 1) if is_steady(series[:count], window)), None)


def stops(shape, sd, window, draws=150, seed=63):
    """Return the first steady counts of simulated series."""
    rng = np.random.default_rng(seed)
    return [first_steady(np.exp(rng.normal(shape, sd)).tolist(), window) for _ in range(draws)]


def test_online_waits_for_two_windows():
    """Fewer than two windows are never steady; two flat ones are."""
    assert not is_steady([1.0] * 9, 5)
    assert is_steady([1.0] * 10, 5)


@pytest.mark.parametrize("sd", [0.003, 0.02, 0.1])
def test_online_stops_soon_on_flat_noise(sd):
    """In 95 % of runs, flat noise is steady within one window after the earliest possible step."""
    assert np.mean([stop is not None and stop <= 15 for stop in stops(np.zeros(60), sd, 5)]) >= 0.95


@pytest.mark.parametrize("sd", [0.003, 0.02])
def test_online_continues_while_the_warm_up_decays(sd):
    """A decaying warm-up ends, and not before its remaining excess is below a tenth."""
    counts = stops(np.exp(-STEP / 5), sd, 5)
    assert None not in counts
    assert np.mean([math.exp(-(count - 1) / 5) < 0.1 for count in counts]) >= 0.95


def test_online_ignores_old_steps_and_one_hiccup():
    """Only the last two windows count, and one slow step in either does not decide."""
    assert is_steady([99.0] * 5 + [1.0] * 10, 5)
    assert is_steady([1.0, 1.0, 9.0, 1.0, 1.0] + [1.0] * 5, 5)
    assert is_steady([1.0] * 5 + [1.0, 0.1, 1.0, 1.0, 1.0], 5)


def test_online_tolerance_bounds_the_drop():
    """A drop within the tolerance is steady, a larger one is not, and a rise is."""
    assert is_steady([1.015] * 3 + [1.0] * 3, 3)
    assert not is_steady([1.025] * 3 + [1.0] * 3, 3)
    assert is_steady([1.025] * 3 + [1.0] * 3, 3, tolerance=0.03)
    assert is_steady([1.0] * 3 + [1.5] * 3, 3)


# Quartiles 25 and 75 by linear interpolation: the fences are at -50 and 150.
EVEN = [float(value) for value in range(101)]


@pytest.mark.parametrize(
    ("extremes", "count"), [((50, 148, -48), 0), ((152, 148), 1), ((-52, 152, 230), 3)], ids=["inside", "one", "three"]
)
def test_values_beyond_the_fences_are_counted(extremes, count):
    """Outliers on both sides among many regular values hardly move the quartiles."""
    assert count_outliers([[*EVEN * 40, *extremes]]) == count


def test_normal_noise_has_the_known_share():
    """The known share is 0.7 %."""
    assert 0.005 < count_outliers([np.random.default_rng(51).normal(size=20_000).tolist()]) / 20_000 < 0.009


def test_nan_is_refused():
    """The error has the index of the NaN sample."""
    with pytest.raises(ValueError, match="samples sample 1 is nan"):
        count_outliers([[1.0, math.nan]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.5])
def test_a_sample_that_is_not_a_duration_is_named(bad):
    """A sample that is not finite and positive is refused by side, trial, index and value."""
    with pytest.raises(ValueError, match=rf"base trial 1 sample 2 is {bad!s}: .*leave it out"):
        checked_trials("base", [[1.0, 2.0], [1.0, 2.0, bad]], positive=True)


@pytest.mark.parametrize("nested", [[[1.0, 2.0]], 1.0])
def test_wrong_depth_is_refused(nested):
    """A trial that is not a flat list is refused with the expected form."""
    with pytest.raises(ValueError, match=r"candidate trial 0 is .*one flat list of numbers"):
        checked_trials("candidate", [nested], positive=True)


def test_accepts_lists_arrays_and_exact_numbers():
    """Lists of ints or fractions, tuples and arrays become the same floats, and the input is unchanged."""
    given = np.array([1.0, 2.0])
    arrays = checked_trials("base", [[1, 2], (Fraction(1), Fraction(2)), given], positive=True)
    assert [array.tolist() for array in arrays] == [[1.0, 2.0]] * 3
    arrays[2][0] = 9
    assert given[0] == 1.0


def test_medians_are_those_of_each_trial():
    """Medians are bit-equal, whether computed at once or one by one for trials of different lengths."""
    rng = np.random.default_rng(7)
    for sizes in ([6] * 4, [5] * 4, [1, 2, 3], [8]):
        trials = [rng.lognormal(0, 3, size) for size in sizes]
        assert trial_medians(trials).tolist() == [float(np.median(trial)) for trial in trials]


def test_import_is_cheap():
    """Importing the package with all its exports loads neither numpy nor scipy."""
    program = (
        "import sys; import lorameter.stats as stats; [getattr(stats, name) for name in stats.__all__]; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'numpy', 'scipy', 'torch', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
