"""label_outliers: Tukey's fences."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameter.stats import count_outliers, label_outliers

# Quartiles 25 and 75 by linear interpolation: the fences are at -50 and 150 (mild), -125 and 225 (severe).
EVEN = [float(value) for value in range(101)]


def labels_of(*extremes):
    """Labels of values among many even ones, which the extremes hardly move."""
    return label_outliers([*EVEN * 40, *extremes])[-len(extremes) :]


def test_labels_by_distance_from_the_quartiles():
    """Beyond 1.5 interquartile ranges is mild, beyond 3 severe, on both sides."""
    assert labels_of(50, 148, 152, 220, 230, -48, -52, -120, -130) == (
        "none", "none", "mild", "mild", "severe", "none", "mild", "mild", "severe",
    )  # fmt: skip


def test_a_fence_is_inside():
    """A value exactly on a fence is not beyond it."""
    assert label_outliers([1.0, 2.0, 3.0, 4.0, 7.0])[-1] == "none"
    assert label_outliers([1.0, 2.0, 3.0, 4.0, 7.1])[-1] == "mild"


def test_normal_noise_has_the_known_share():
    """Normal noise has 0.7 % labelled in all and next to no severe ones."""
    counts = Counter(label_outliers(np.random.default_rng(51).normal(size=20_000)))
    assert 0.005 < (counts["mild"] + counts["severe"]) / 20_000 < 0.009
    assert counts["severe"] <= 2


def test_constant_samples_have_none():
    """Equal samples are all inside, and any other value is severe then."""
    assert label_outliers([2.0] * 5) == ("none",) * 5
    assert label_outliers([2.0] * 5 + [2.1])[-1] == "severe"


def test_nothing_has_no_labels():
    """No samples, no labels."""
    assert label_outliers([]) == ()


def test_nan_is_refused():
    """A sample that is not a number is refused by its index."""
    with pytest.raises(ValueError, match="samples sample 1 is nan"):
        label_outliers([1.0, math.nan])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=40), st.sampled_from([-4.0, 0.5, 8.0]))
def test_labels_do_not_depend_on_unit_or_sign(samples, factor):
    """One label a sample; a change of unit, or of direction, changes none. Half the samples are never outliers."""
    labels = label_outliers(samples)
    assert len(labels) == len(samples)
    assert labels == label_outliers([sample * factor for sample in samples])
    assert Counter(labels)["none"] >= len(samples) / 2


@given(st.lists(st.lists(st.floats(1e-3, 1e3), max_size=30), max_size=12))
def test_outliers_of_many_trials_are_those_of_each(trials):
    """Counted together or one by one, whatever their lengths; a trial without samples has none."""
    assert count_outliers(trials) == sum(label != "none" for trial in trials for label in label_outliers(trial))
