"""Tests of the bisection for the slower commit, on constructed ratios without measurements."""

import math

import pytest

from lorameter.report.comparison import describe_bisection
from lorameter.report.terminal import text_of
from lorameter.run.bisect import MOST_TIMES, Candidate, bisect
from lorameter.stats import compare_trials
from lorameter.verdicts.series import verdict_only


def candidates(count):
    return [Candidate(spec=f"c{place}", label=f"commit {place}") for place in range(count + 1)]


class Constructed:
    """A fake lockstep A/B with known true ratios and trials of known scatter around them."""

    def __init__(self, truth, *, spread=0.01, broken=(), seed=1):
        import numpy as np

        self.truth, self.spread, self.broken, self.asked = truth, spread, set(broken), []
        self.rng = np.random.default_rng(seed)

    def __call__(self, spec, replicates):
        place = int(spec.removeprefix("c"))
        self.asked.append((place, replicates))
        if place in self.broken:
            return verdict_only("invalid", "it does not import")
        ratios = [math.exp(self.rng.normal(math.log(self.truth[place]), self.spread)) for _ in range(replicates)]
        return compare_trials([[1.0]] * replicates, [[ratio] for ratio in ratios], pairing="replicate")


@pytest.mark.parametrize("culprit", [1, 9, 16])
def test_one_commit_of_ten_percent_among_sixteen_takes_five_comparisons(culprit):
    """At every position, the bad end and four halvings find the commit."""
    truth = [1.0 if place < culprit else 1.10 for place in range(17)]
    asked = Constructed(truth, seed=culprit)
    found = bisect(candidates(16), asked, replicates=8)
    assert found.found
    assert found.culprit.label == f"commit {culprit}"
    assert found.before.label == f"commit {culprit - 1}"
    assert len(asked.asked) == len(found.looks) <= 5
    assert found.low < 1.10 < found.high
    assert found.share == pytest.approx(1.0, abs=0.3)


def test_an_inconclusive_commit_is_named_and_the_search_continues():
    """A commit with half the effect is on neither side, whatever the number of replicates."""
    truth = [1.0, 1.0, 1.0, 1.0, math.sqrt(1.1), 1.1, 1.1, 1.1, 1.1]
    asked = Constructed(truth, spread=0.02)
    found = bisect(candidates(8), asked, replicates=4)
    assert not found.found
    assert (found.before.label, found.culprit.label) == ("commit 3", "commit 5")
    assert [one.label for one in found.between] == ["commit 4"]
    assert "inconclusive: commit 4" in found.conclusion
    assert asked.asked == [(8, 4), (4, 4), (4, 8), (4, 4 * MOST_TIMES), *asked.asked[4:]]
    assert {replicates for _, replicates in asked.asked[4:]} == {4}, "only the open one is repeated"


def test_a_commit_that_cannot_be_measured_is_skipped():
    """It is tried twice and then skipped; the neighbouring culprit is still found, or both are named."""
    truth = [1.0 if place < 6 else 1.1 for place in range(9)]
    found = bisect(candidates(8), Constructed(truth, broken=[4]), replicates=8)
    assert found.culprit.label == "commit 6"
    assert [look.side for look in found.looks if look.place == 4] == ["not measured"] * 2
    found = bisect(candidates(8), Constructed(truth, broken=[6]), replicates=8)
    assert not found.found
    assert [one.label for one in found.between] == ["commit 6"]


def test_a_bad_end_that_is_not_slower_ends_the_search_at_once():
    """One comparison is made, and the conclusion gives the reason."""
    found = bisect(candidates(16), Constructed([1.0] * 17, spread=0.005), replicates=8)
    assert (found.culprit, found.found, len(found.looks)) == (None, False, 1)
    assert "not slower" in found.conclusion
    faster = bisect(candidates(16), Constructed([1.0] * 16 + [0.8]), replicates=8)
    assert "improved" in faster.conclusion


def test_the_report_begins_with_the_culprit():
    """Each comparison follows with its ratio, its replicates and its side."""
    truth = [1.0 if place < 6 else 1.1 for place in range(9)]
    found = bisect(candidates(8), Constructed(truth, broken=[4]), replicates=8)
    text = text_of(describe_bisection(found, "step time of plain"), width=80, coloured=False)
    assert text.startswith("commit 6 made it slower")
    assert "not measured" in text
    assert "of the whole effect" in text
    assert text.count("commit 4") == 2
