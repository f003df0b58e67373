"""Rounds a process and processes: the number that gives the narrowest interval in a given time."""

import math
import random

import pytest

from lorameter.stats.allocation import optimal_rounds


def simulate(between, within, *, processes, rounds, seed):
    """Values of processes that differ by `between` and whose rounds scatter by `within` (standard deviations)."""
    draw = random.Random(seed)
    return [
        [centre + draw.gauss(0, within) for _ in range(rounds)]
        for centre in (draw.gauss(0, between) for _ in range(processes))
    ]


@pytest.mark.parametrize(("between", "within", "process_s", "round_s"), [
    (0.01, 0.03, 40.0, 2.0), (0.03, 0.03, 90.0, 10.0), (0.02, 0.08, 5.0, 5.0),
])  # fmt: skip
def test_the_optimum_is_found_from_what_was_seen(between, within, process_s, round_s):
    """The closed form of the true variances, from many simulated processes."""
    seen = simulate(between, within, processes=4000, rounds=8, seed=1)
    expected = math.sqrt(process_s / round_s) * within / between
    assert optimal_rounds(seen, process_s=process_s, round_s=round_s) == pytest.approx(expected, rel=0.1)


def test_no_other_number_gives_a_narrower_interval():
    """The variance of the mean that a given time buys, at the optimum and at a half and twice of it."""
    between, within, process_s, round_s = 0.01, 0.04, 30.0, 2.0
    best = optimal_rounds(
        simulate(between, within, processes=4000, rounds=8, seed=2), process_s=process_s, round_s=round_s
    )

    def variance(rounds):
        return (between**2 + within**2 / rounds) * (process_s + rounds * round_s)

    assert variance(best) < min(variance(best / 2), variance(2 * best))


def test_processes_that_do_not_differ_are_not_worth_starting():
    """As many rounds as there are."""
    assert optimal_rounds([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], process_s=1.0, round_s=1.0) == math.inf


@pytest.mark.parametrize("seen", [[], [[0.1, 0.2]], [[0.1, 0.2], [0.1]]])
def test_too_little_says_nothing(seen):
    """One process has no differences between processes, and one round none within."""
    assert optimal_rounds(seen, process_s=1.0, round_s=1.0) is None
    assert optimal_rounds([[0.1, 0.2], [0.3, 0.2]], process_s=0.0, round_s=1.0) is None
