"""The edges that every comparison must survive: constant, single, uneven, broken, empty and very long series."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameter.stats import compare_family, compare_trials, estimate_trials

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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_no_bad_sample_becomes_a_verdict(bad, pairing):
    """NaN, infinity, zero and negative times are refused by name, alone and in a family."""
    broken = ([[1.0, 1.0]] * 2, [[1.0, 1.0], [1.0, bad]])
    with pytest.raises(ValueError, match=r"^candidate trial 1 sample 1 is"):
        compare_trials(*broken, pairing=pairing)
    with pytest.raises(ValueError, match="comparison 'step': candidate trial 1 sample 1 is"):
        compare_family({"step": broken}, pairing=pairing)


@pytest.mark.parametrize("values", [[[LARGEST, LARGEST]], [[LARGEST], [LARGEST], [-1.0]], [[LARGEST], [-LARGEST]]])
def test_estimate_without_a_number_is_refused(values):
    """Values whose mean or interval overflows are refused; no infinity and no NaN is returned."""
    with pytest.raises(ValueError, match="check the units"):
        estimate_trials(values)


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
