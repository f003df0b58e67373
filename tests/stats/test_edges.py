"""The edges that every comparison must survive: constant, single, uneven, broken, empty and very long series."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameter.stats import compare_bytes, compare_family, compare_trials, estimate_trials

LARGEST = 1.7976931348623157e308
PAIRINGS = ["turn", "replicate", "none"]
durations = st.floats(1e-6, 1e6)
trials = st.integers(1, 5).flatmap(
    lambda samples: st.lists(st.lists(durations, min_size=samples, max_size=samples), min_size=4, max_size=4)
)


@pytest.fixture(scope="module")
def million():
    """A million noisy step times."""
    return np.random.default_rng(99).lognormal(-3.0, 0.2, 10**6)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_million_samples_a_trial(pairing, million):
    """A million samples a trial are compared, and do not make up for the two replicates that they come from."""
    result = compare_trials([million, million], [million * 1.5, million * 1.51], pairing=pairing)
    assert (result.verdict, result.replicates) == ("regressed", 2)
    assert result.ratio == pytest.approx(1.505, rel=1e-3)
    assert compare_trials([million], [million * 2], pairing=pairing).verdict == "inconclusive"


def test_a_million_samples_elsewhere(million):
    """Estimate, family and peaks take a million samples too."""
    assert estimate_trials([million, million]).samples == 2 * 10**6
    assert compare_family({"step": ([million] * 2, [million] * 2)}, pairing="turn")["step"].verdict == "equivalent"
    assert compare_bytes(million, million, tolerance=0).verdict == "equivalent"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_no_bad_sample_becomes_a_verdict(bad, pairing):
    """NaN, infinity, zero and negative times are refused by name, alone and in a family."""
    broken = ([[1.0, 1.0]] * 2, [[1.0, 1.0], [1.0, bad]])
    with pytest.raises(ValueError, match=r"^candidate trial 1 sample 1 is"):
        compare_trials(*broken, pairing=pairing)
    with pytest.raises(ValueError, match="comparison 'step': candidate trial 1 sample 1 is"):
        compare_family({"step": broken}, pairing=pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_family_with_constants_and_single_replicates(pairing):
    """In a family a constant decides by its point and a single replicate stays open, without an error."""
    pairs = {"one": ([[1.0]], [[2.0]]), "slow": ([[1.0]] * 3, [[2.0]] * 3), "same": ([[1.0]] * 3, [[1.0]] * 3)}
    found = {name: one.verdict for name, one in compare_family(pairs, pairing=pairing).items()}
    same = "inconclusive" if pairing == "none" else "equivalent"
    assert found == {"one": "inconclusive", "slow": "regressed", "same": same}


def test_unpaired_with_one_constant_side():
    """Welch takes a side without variance, and sides of unequal count."""
    result = compare_trials([[1.0]] * 2, [[1.2], [1.21], [1.19], [1.2], [1.2]], pairing="none")
    assert (result.verdict, result.replicates) == ("regressed", 2)


def test_constant_estimate_is_a_point():
    """Replicates that do not differ give an interval of no width."""
    estimate = estimate_trials([[0.3]] * 4)
    assert estimate.low == pytest.approx(0.3, rel=1e-12)
    assert estimate.high == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("values", [[[LARGEST, LARGEST]], [[LARGEST], [LARGEST], [-1.0]], [[LARGEST], [-LARGEST]]])
def test_estimate_without_a_number_is_refused(values):
    """Values whose mean or interval overflows are refused; no infinity and no NaN is returned."""
    with pytest.raises(ValueError, match="check the units"):
        estimate_trials(values)


def test_bytes_without_a_ratio_are_refused():
    """Peaks whose ratio no float holds are refused, not reported as an infinite ratio."""
    with pytest.raises(ValueError, match="check the units"):
        compare_bytes([5e-324], [LARGEST], tolerance=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(trials, trials), min_size=1, max_size=4))
def test_family_is_never_bolder_than_its_members(pairs):
    """What Holm calls regressed or improved is so alone too, and each result is strict JSON."""
    named = {
        str(index): (base, [(other * len(one))[: len(one)] for one, other in zip(base, candidate, strict=True)])
        for index, (base, candidate) in enumerate(pairs)
    }
    for name, result in compare_family(named, pairing="turn").items():
        json.dumps(asdict(result), allow_nan=False)
        if result.verdict in ("regressed", "improved"):
            assert compare_trials(*named[name], pairing="turn").verdict == result.verdict


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**50), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**50), min_size=1, max_size=6),
    st.floats(0, 2),
)
def test_bytes_swap_and_count_only_their_peak(base, candidate, tolerance):
    """Swapping sides turns the verdict over, order does not matter, and smaller peaks do not count."""
    one, other = (compare_bytes(*sides, tolerance=tolerance) for sides in ((base, candidate), (candidate, base)))
    assert other.verdict == {"regressed": "improved", "improved": "regressed"}.get(one.verdict, one.verdict)
    only_peaks = compare_bytes([max(base)], [max(candidate)], tolerance=tolerance)
    assert (only_peaks.verdict, only_peaks.ratio) == (one.verdict, one.ratio)
