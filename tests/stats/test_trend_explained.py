"""Tests of the share of scatter that another quantity explains."""

import numpy as np
import pytest

from lorameter.stats import explained_share


def blocks(noise, replicates=5, points=40):
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 50, (replicates, points)).astype(float)
    return list(zip(tokens, 0.02 * tokens + rng.normal(0, noise, tokens.shape), strict=True))


def test_a_line_explains_everything():
    """If time is proportional to tokens the share is one, and its interval stays within [0, 1]."""
    share = explained_share(blocks(0.0))
    assert (share.value, share.low, share.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (share.replicates, share.points) == (5, 200)


def test_noise_is_not_explained():
    """Noise with equal variance halves the share; the interval covers the true share."""
    share = explained_share(blocks(0.02 * 13.0))
    assert 0 < share.low < 0.5 < share.high < 1


def test_replicates_without_a_share_are_left_out():
    """Two points, equal x and equal y give no share; without other replicates there is none."""
    silent = [([1, 2], [1, 2]), ([5, 5, 5], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])]
    assert explained_share(silent) is None
    one = explained_share([*silent, ([1, 2, 3], [1, 3, 2])])
    assert (one.value, one.low, one.high, one.replicates) == (pytest.approx(0.25), None, None, 1)
