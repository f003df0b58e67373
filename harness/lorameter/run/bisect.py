"""Which step of many made it slower: each is compared to the good end in one job, half of what is left at a time.

A step lies on one side or the other of the middle of the whole effect, on the log scale: `slow` if the interval of its
ratio to the good end lies above it, `fast` if below. So a step is told from its neighbours by half of what is sought,
and small steps elsewhere mislead nobody. An interval that holds the middle is an open question: more replicates are
spent there, and only there, each time in a job of its own whose result stands alone. What stays open is named, and the
search goes on around it.

With n steps and every answer clear, the bad end and the halving take 1 + log2(n) comparisons, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.stats import Comparison

MOST_TIMES = 4
"""So many times the replicates are spent on an open question, at most."""
Side = Literal["slow", "fast", "open", "not measured"]
Compare = Callable[[str, int], Comparison]
"""The comparison of a candidate with the good end, in so many replicates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One state of the thing: a revision, or requirements."""

    spec: str
    """The word by which an A/B knows it."""
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One comparison of one candidate with the good end."""

    place: int
    """Among the candidates; 0 is the good end."""
    label: str
    side: Side
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What was found, and by which comparisons."""

    looks: tuple[Look, ...]
    """In the order in which they were made."""
    before: Candidate | None = None
    """The last candidate that is known to be fast; None where there is nothing to find."""
    culprit: Candidate | None = None
    """The first that is known to be slow."""
    between: tuple[Candidate, ...] = ()
    """What lies between them and could not be told; empty where the step is found."""
    ratio: float | None = None
    """The culprit over the one before it."""
    low: float | None = None
    """Lower end of its interval, of both comparisons together."""
    high: float | None = None
    share: float | None = None
    """Of the whole effect, on the log scale."""
    conclusion: str

    @property
    def found(self) -> bool:
        """Whether it is one step."""
        return self.culprit is not None and not self.between


def bisect(candidates: Sequence[Candidate], compare: Compare, *, replicates: int) -> Bisection:
    """Find the step that made it slower.

    Args:
        candidates: in order, the good end first and the bad end last.
        compare: measures a candidate's spec against the good end.
        replicates: of a comparison; up to `MOST_TIMES` as many where it leaves its question open.

    Raises:
        ValueError: fewer than two candidates.
    """
    if len(candidates) < 2:
        raise ValueError("a good and a bad end are needed")
    looks: list[Look] = []
    known: dict[int, Comparison] = {}
    bad = len(candidates) - 1
    whole = _look_at_the_end(candidates, compare, replicates, looks)
    if whole is None:
        return Bisection(looks=tuple(looks), conclusion=_no_effect(looks[-1]))
    known[bad] = whole
    middle = math.log(_ratio(whole)) / 2
    fast, slow, closed = 0, bad, set[int]()
    while left := [place for place in range(fast + 1, slow) if place not in closed]:
        place = left[(len(left) - 1) // 2]
        found = _settle(candidates, place, compare, replicates, middle, looks)
        if found is None:
            closed.add(place)
            continue
        known[place] = looks[-1].comparison
        fast, slow = (fast, place) if found == "slow" else (place, slow)
    return _conclude(candidates, looks, known, fast, slow)


def _look_at_the_end(
    candidates: Sequence[Candidate], compare: Compare, replicates: int, looks: list[Look]
) -> Comparison | None:
    """The whole effect; None where the bad end is not slower, or nobody can tell."""
    bad = len(candidates) - 1
    for count in _efforts(replicates):
        found = compare(candidates[bad].spec, count)
        slower = found.verdict == "regressed"
        side: Side = "slow" if slower else "open" if found.verdict == "inconclusive" else "fast"
        looks.append(Look(place=bad, label=candidates[bad].label, side=_told(found, side), comparison=found))
        if slower:
            return found
        if found.verdict not in ("inconclusive", "invalid"):
            return None
    return None


def _settle(
    candidates: Sequence[Candidate], place: int, compare: Compare, replicates: int, middle: float, looks: list[Look]
) -> Side | None:
    """On which side of the middle a candidate lies; None where that stays open or it cannot be measured."""
    for count in _efforts(replicates):
        found = compare(candidates[place].spec, count)
        side: Side = "open"
        if found.low is not None and found.low > 0 and math.log(found.low) > middle:
            side = "slow"
        elif found.high is not None and found.high > 0 and math.log(found.high) < middle:
            side = "fast"
        looks.append(Look(place=place, label=candidates[place].label, side=_told(found, side), comparison=found))
        if looks[-1].side in ("slow", "fast"):
            return side
        if found.ratio is None and len(looks) > 1 and looks[-2].place == place and looks[-2].comparison.ratio is None:
            break  # a second try has no number either
    return None


def _efforts(replicates: int) -> Iterator[int]:
    """Replicates of the first comparison, and of those that follow while its question is open."""
    count = replicates
    while count <= MOST_TIMES * replicates:
        yield count
        count *= 2


def _told(found: Comparison, side: Side) -> Side:
    """What has no ratio was not measured, whatever it is."""
    return "not measured" if found.ratio is None or found.verdict == "invalid" else side


def _ratio(found: Comparison) -> float:
    assert found.ratio is not None  # of what regressed
    return found.ratio


def _no_effect(last: Look) -> str:
    if last.side == "open":
        return "the bad end leaves the question open: it cannot be told whether it is slower than the good end"
    if last.side == "not measured":
        return "the bad end could not be measured"
    return f"the bad end is not slower than the good end ({last.comparison.verdict}): there is no step to find"


def _conclude(
    candidates: Sequence[Candidate], looks: Sequence[Look], known: dict[int, Comparison], fast: int, slow: int
) -> Bisection:
    before, after = known.get(fast), known[slow]
    log = math.log(_ratio(after)) - (0.0 if before is None else math.log(_ratio(before)))
    half = math.hypot(_half(after), 0.0 if before is None else _half(before))
    share = log / math.log(_ratio(known[len(candidates) - 1]))
    between = tuple(candidates[fast + 1 : slow])
    if between:
        names = ", ".join(one.label for one in between)
        conclusion = f"it lies between {candidates[fast].label} and {candidates[slow].label}: {names} could not be told"
    else:
        conclusion = f"{candidates[slow].label} made it slower"
    return Bisection(
        looks=tuple(looks),
        before=candidates[fast],
        culprit=candidates[slow],
        between=between,
        ratio=math.exp(log),
        low=math.exp(log - half),
        high=math.exp(log + half),
        share=share,
        conclusion=conclusion,
    )


def _half(found: Comparison) -> float:
    """Half the interval, on the log scale, to its farther end."""
    if found.low is None or found.high is None or found.ratio is None:
        return 0.0
    return max(math.log(found.high / found.ratio), math.log(found.ratio / found.low))
