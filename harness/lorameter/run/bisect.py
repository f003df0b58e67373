"""Finds the step that made a candidate slower by bisection: each comparison with the good end halves the open steps.

A candidate is classified by half of the whole effect, on the log scale: `slow` if the interval of its ratio to the good
end is above that value, `fast` if the interval is below. This threshold is far from both ends, so small steps elsewhere
do not mislead the search. An interval that contains the threshold is inconclusive: the comparison is measured again in
a new run with more replicates. A candidate that stays inconclusive is reported, and the search continues around it.

With n steps and every answer clear, the bad end and the halving take 1 + log2(n) comparisons, rounded up.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from lorameter.errors import UsageError, redact, require
from lorameter.machine.provenance import probe_machine, run_git
from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.run.forecast import latest_runs
from lorameter.run.plan import Plan, list_variants
from lorameter.run.workers.environment import parse_requirements
from lorameter.run.workers.sides import find_commit
from lorameter.stats import Comparison

if TYPE_CHECKING:
    from packaging.version import Version


MAX_FACTOR = 4
"""Maximum factor by which an inconclusive comparison multiplies the replicates."""
Side = Literal["slow", "fast", "open", "not measured"]
Compare = Callable[[str, int], Comparison]
"""Compares a candidate with the good end, using the given number of replicates."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One state of the code or of a library: a revision, or requirements."""

    spec: str
    """Its argument on the command line of `lorameter ab`."""
    label: str


class Look(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison of one candidate with the good end."""

    place: int
    """Index among the candidates; 0 is the good end."""
    label: str
    side: Side
    comparison: Comparison


class Bisection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a search, with its comparisons."""

    looks: tuple[Look, ...]
    """Comparisons in their order."""
    before: Candidate | None = None
    """The last candidate known to be fast; None if no step was searched for."""
    culprit: Candidate | None = None
    """The first candidate known to be slow."""
    between: tuple[Candidate, ...] = ()
    """Inconclusive candidates between `before` and `culprit`; empty if the step is found."""
    ratio: float | None = None
    """Ratio of the culprit to the candidate before it."""
    low: float | None = None
    """Lower end of the ratio's interval, from both comparisons."""
    high: float | None = None
    share: float | None = None
    """Share of the whole effect, on the log scale."""
    conclusion: str

    @property
    def found(self) -> bool:
        """Whether the slow-down is traced to a single step."""
        return self.culprit is not None and not self.between


def bisect(candidates: Sequence[Candidate], compare: Compare, *, replicates: int) -> Bisection:
    """Find the step that made the candidate slower.

    Args:
        candidates: in order, the good end first and the bad end last.
        compare: measures a candidate's spec against the good end.
        replicates: number for one comparison; an inconclusive one gets up to `MAX_FACTOR` times as many.
    """
    looks: list[Look] = []

    def classify(place: int, judge: Callable[[Comparison], Side]) -> Side:
        """The side of a candidate; an inconclusive comparison is repeated with twice the replicates."""
        count, label = replicates, candidates[place].label
        while True:
            result = compare(candidates[place].spec, count)
            side: Side = "not measured" if result.ratio is None or result.verdict == "invalid" else judge(result)
            failed_twice = side == "not measured" and any(look.place == place and look.side == side for look in looks)
            looks.append(Look(place=place, label=label, side=side, comparison=result))
            count *= 2
            if side in ("slow", "fast") or failed_twice or count > MAX_FACTOR * replicates:
                return side

    fast, slow = 0, len(candidates) - 1
    side = classify(slow, lambda comparison: _END_SIDES.get(comparison.verdict, "fast"))
    if side != "slow":
        return Bisection(looks=tuple(looks), conclusion=_NO_STEP[side].format(looks[-1].comparison.verdict))
    known = {slow: looks[-1].comparison}
    whole = _log_ratio(known[slow])[0]
    inconclusive = set[int]()
    while left := [place for place in range(fast + 1, slow) if place not in inconclusive]:
        place = left[(len(left) - 1) // 2]
        side = classify(place, lambda comparison: _judge_middle(comparison, whole / 2))
        if side not in ("slow", "fast"):
            inconclusive.add(place)
            continue
        known[place] = looks[-1].comparison
        fast, slow = (fast, place) if side == "slow" else (place, slow)

    after, half_after = _log_ratio(known[slow])
    before, half_before = _log_ratio(known.get(fast))
    log, half = after - before, math.hypot(half_after, half_before)
    between = tuple(candidates[fast + 1 : slow])
    names = ", ".join(one.label for one in between)
    unclear = f"it is between {candidates[fast].label} and {candidates[slow].label}; inconclusive: {names}"
    return Bisection(
        looks=tuple(looks),
        before=candidates[fast],
        culprit=candidates[slow],
        between=between,
        ratio=math.exp(log),
        low=math.exp(log - half),
        high=math.exp(log + half),
        share=log / whole,
        conclusion=unclear if between else f"{candidates[slow].label} made it slower",
    )


_END_SIDES: dict[str, Side] = {"regressed": "slow", "inconclusive": "open"}
"""Sides of the bad end by its verdict; any other verdict is `fast`."""
_NO_STEP: dict[Side, str] = {
    "open": "the bad end is inconclusive: it is open whether it is slower than the good end",
    "not measured": "the bad end could not be measured",
    "fast": "the bad end is not slower than the good end ({}): there is no step to find",
}


def _judge_middle(comparison: Comparison, middle: float) -> Side:
    """Whether the whole interval is above or below the middle of the effect, a log ratio."""
    if comparison.low is not None and comparison.low > 0 and math.log(comparison.low) > middle:
        return "slow"
    if comparison.high is not None and comparison.high > 0 and math.log(comparison.high) < middle:
        return "fast"
    return "open"


def _log_ratio(comparison: Comparison | None) -> tuple[float, float]:
    """The logarithm of a ratio, and its distance to the farther end of the interval; zeros for the good end (None)."""
    if comparison is None or comparison.ratio is None:
        return 0.0, 0.0
    ratio, low, high = comparison.ratio, comparison.low or comparison.ratio, comparison.high or comparison.ratio
    return math.log(ratio), max(math.log(high / ratio), math.log(ratio / low))


def list_steps(good: str, bad: str, repository: Path) -> tuple[Candidate, ...]:
    """The good end, the steps between, and the bad end.

    Args:
        good: a git revision, or requirements such as "peft==0.19.0".
        bad: a later revision, or later requirements.
        repository: a folder in the repository of the revisions.

    Raises:
        UsageError: the ends are not of one kind or not in order, or the steps between them cannot be listed.
    """
    first, last = (find_commit(word, repository)[0] for word in (good, bad))
    if first and last:
        return _revisions(good, bad, first, last, repository)
    requirements = [parse_requirements(word) for word in (good, bad)]
    if requirements[0] and requirements[1]:
        return _releases(requirements[0], requirements[1])
    unknown = bad if first or requirements[0] else good
    raise UsageError(
        f"bisect: --good {good!r} and --bad {bad!r}: {unknown!r} is neither a revision of {repository} nor a "
        "requirement of an exact version. Name two commits, or two releases of one package as in peft==0.19.0."
    )


def find_earlier_run(plan: Plan, runs: Path) -> Run | None:
    """The newest complete A/B run of this plan among the latest runs on this machine; None if there is none."""
    wanted = (codec.to_json(plan.study), plan.phases, tuple(variant.name for variant in list_variants(plan.arms)))
    specs = {name: side.to_json()["spec"] for name, side in plan.sides.items()}
    for run in latest_runs(probe_machine(), runs):
        manifest = run.manifest
        measured = (manifest.study, tuple(manifest.phases), manifest.selection)
        same_sides = {name: side.get("spec") for name, side in manifest.sides.items()} == specs
        if manifest.status == "complete" and same_sides and measured == wanted:
            return run
    return None


def _revisions(good: str, bad: str, first: str, last: str, repository: Path) -> tuple[Candidate, ...]:
    require(first != last, f"bisect: {good} and {bad} are the same commit. Name two.")
    require(
        run_git(repository, "merge-base", "--is-ancestor", first, last).returncode == 0,
        f"bisect: {good} is not an ancestor of {bad}. Name an ancestor of the bad end.",
    )
    listed = run_git(repository, "log", "--reverse", "--first-parent", "--format=%H %h %s", f"{first}..{last}")
    require(
        listed.returncode == 0 and listed.stdout,
        f"bisect: git lists nothing between {good} and {bad}: {listed.stderr.strip()}.",
    )
    steps = [line.split(" ", 1) for line in listed.stdout.splitlines()]
    candidates = (Candidate(spec=commit, label=redact(label)) for commit, label in steps)
    return (Candidate(spec=first, label=f"{good} ({first[:9]})"), *candidates)


def _releases(good: tuple[str, ...], bad: tuple[str, ...]) -> tuple[Candidate, ...]:
    differing = [(one, other) for one, other in zip(sorted(good), sorted(bad), strict=False) if one != other]
    both = f"{' '.join(good)} and {' '.join(bad)}"
    require(
        len(good) == len(bad) and len(differing) == 1,
        f"bisect: {both} must differ in the version of one package. Name two of its releases.",
    )
    (name, first), (other, last) = (_exact(word) for word in differing[0])
    require(
        name == other and first < last,
        f"bisect: {' and '.join(differing[0])} are not two releases of one package in order. The good one comes first.",
    )
    between = [version for version in _versions(name, first, last) if first < version < last]
    others = [word for word in good if word != differing[0][0]]
    return tuple(
        Candidate(spec=" ".join([f"{name}=={version}", *others]), label=f"{name} {version}")
        for version in (first, *between, last)
    )


def _exact(word: str) -> tuple[str, Version]:
    """The package and the version of `NAME==VERSION`."""
    from packaging.utils import InvalidName, canonicalize_name
    from packaging.version import InvalidVersion, Version

    name, _, version = word.partition("==")
    try:
        return canonicalize_name(name, validate=True), Version(version)
    except (InvalidName, InvalidVersion):
        raise UsageError(f"bisect: {word}: an exact version is needed. Write NAME==VERSION.") from None


def _versions(name: str, first: Version, last: Version) -> list[Version]:
    """The releases on pip's index, in order; pre-releases only if one of the ends is a pre-release."""
    from packaging.version import InvalidVersion, Version

    pre = ["--pre"] if first.is_prerelease or last.is_prerelease else []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", name, *pre, "--disable-pip-version-check", "--no-input"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120.0,
            check=False, start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"bisect: pip cannot list the releases of {name}: {error}. Check its index.") from None
    listed = re.search(r"^Available versions:(.*)$", done.stdout, re.MULTILINE)
    if done.returncode or listed is None:
        reason = redact((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
        raise UsageError(f"bisect: pip cannot list the releases of {name}: {reason}. Check the name and its index.")
    versions: list[Version] = []
    for word in listed[1].split(","):
        with contextlib.suppress(InvalidVersion):  # releases from before PEP 440
            versions.append(Version(word.strip()))
    return sorted(versions)
