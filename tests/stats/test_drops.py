"""Tests of kept_pairs: it drops whole pairs by their flags only, and never too many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorameter.stats import kept_pairs

flags = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


def test_a_flag_on_either_side_drops_the_pair():
    """A flag on either side drops the pair, and the flags of both sides are counted."""
    result = kept_pairs([False, True, False, True, False], [False, False, True, True, False], least=2)
    assert result.kept == (0, 4)
    assert (result.base_flagged, result.candidate_flagged, result.refused, result.balanced) == (2, 2, False, True)
    assert result.reason == "dropped 3 of 5 pairs: base flagged in 2, candidate in 2"


def test_refuses_to_leave_too_little():
    """All pairs are kept if fewer than the minimum would remain, and the reason has both numbers."""
    result = kept_pairs([True, False, True, False], [False] * 4, least=3)
    assert (result.kept, result.refused) == ((0, 1, 2, 3), True)
    assert result.reason == "dropping the 2 flagged of 4 pairs would leave 2, below 3: kept all"


@pytest.mark.parametrize(("one_sided", "balanced"), [(5, True), (6, False)])
def test_one_sided_flags_are_not_balanced(one_sided, balanced):
    """Six flags on one side are significant at 5 %; five are not."""
    result = kept_pairs([False] * 20, [True] * one_sided + [False] * (20 - one_sided), least=5)
    assert result.balanced == balanced
    assert ("not balanced" in result.reason) == (not balanced)


def test_balance_is_rarely_denied_to_equal_sides():
    """Sides with equal flag rates are called unbalanced in at most 5 % of runs."""
    rng = np.random.default_rng(95)
    denied = [not kept_pairs(*(rng.random((2, 40)) < 0.3), least=2).balanced for _ in range(600)]
    assert np.mean(denied) <= 0.05


@settings(max_examples=100, deadline=None)
@given(flags, st.integers(1, 10))
def test_every_pair_is_kept_or_flagged(pairs, least):
    """The kept pairs are the clean ones in order, or all; the result is symmetric in the sides."""
    base, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = kept_pairs(base, candidate, least=least), kept_pairs(candidate, base, least=least)
    clean = tuple(index for index, pair in enumerate(pairs) if pair == (False, False))
    assert one.kept == (tuple(range(len(pairs))) if one.refused else clean)
    assert one.refused or len(one.kept) >= min(least, len(pairs))
    assert (one.kept, one.balanced, one.base_flagged) == (other.kept, other.balanced, other.candidate_flagged)
    discordant = [a for a, b in pairs if a != b]
    assert one.balanced == (not discordant or stats.binomtest(sum(discordant), len(discordant), 0.5).pvalue > 0.05)


@pytest.mark.parametrize(
    ("base", "candidate", "least", "message"),
    [
        ([True], [True, False], 1, "base has 1 flags and candidate 2"),
        ([True], [1], 1, "candidate flag 0 is 1: "),
        ([None], [True], 1, "base flag 0 is None"),
        ([True], [True], 0, "least is 0"),
    ],
)
def test_bad_input_is_an_error(base, candidate, least, message):
    """Bad input raises an error that names the offending value."""
    with pytest.raises(ValueError, match=message):
        kept_pairs(base, candidate, least=least)
