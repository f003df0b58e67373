"""Tests of contrasts over the levels of an axis."""

import numpy as np
import pytest

from lorameter.stats.trend import line_change, scores, sizes

ALPHAS = (16.0, 32.0, 64.0, 128.0, 256.0)


def test_a_line_is_recovered():
    """A quantity that grows by 1 % with each doubling changes by four times that from 16 to 256."""
    logs = np.log([1.01**step for step in range(5)]) + np.array([[0.0], [0.3], [-2.0]])
    assert line_change(logs, scores(ALPHAS, "log")) == pytest.approx([np.log(1.01**4)] * 3)


def test_the_line_is_that_of_least_squares():
    """The change is the slope of numpy's fit times the distance between the first and the last level."""
    rng = np.random.default_rng(1)
    logs, positions = rng.normal(0, 1, (4, 6)), scores([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "linear")
    slopes = [np.polyfit(positions, row, 1)[0] for row in logs]
    assert line_change(logs, positions) == pytest.approx(np.array(slopes) * 0.5)


@pytest.mark.parametrize(
    ("levels", "scale", "words"),
    [([0.0, 0.1], "log", "0 has no logarithm"), ([16.0], "log", "two or more"), ([1.0, 1.0], "linear", "each once")],
)
def test_levels_that_make_no_axis_are_refused(levels, scale, words):
    """A level without a logarithm, a single level and a repeated level are refused."""
    with pytest.raises(ValueError, match=words):
        scores(levels, scale)


def test_the_size_of_scatter_around_zero_is_small():
    """A change without a direction has a size near zero; a decrease has the same size as an increase."""
    scatter = np.random.default_rng(2).normal(0, 1, 1000)
    assert abs(sizes(scatter).mean()) < 0.1 < np.abs(scatter).mean()
    assert sizes(np.array([-0.3, -0.1])).tolist() == [0.3, 0.1]
