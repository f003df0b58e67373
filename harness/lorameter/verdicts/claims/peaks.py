"""A promise of less memory, judged by the peaks of training.

A peak takes one of a few values (`lorameter.stats.memory`), so there is no test on it: the ratios of the replicates
have a range, and a promise holds if all of it lies below what was promised, and fails if none does.

On a CPU the peak is the resident memory of the process, with the interpreter and the libraries that it begins with.
They are on both sides and dilute whatever is saved: a saving that shows in spite of them is one, and one that does not
show says nothing. So there a promise is borne out or not judged, and never refuted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorameter.records.metrics import PEAKS, RSS_AT_START
from lorameter.records.record import Role, TrialRecord
from lorameter.records.units import format_bytes, format_count, format_ratio
from lorameter.studies.claim import PEAK, ClaimPart
from lorameter.studies.study import Study
from lorameter.verdicts.claims.values import LEAST_SHARED, NotJudgedError, pair_of
from lorameter.verdicts.series import Groups

_DEVICE, _HOST = PEAKS["train"]
_ROLES: tuple[Role, ...] = ("variant", "control")
Verdict = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakFinding:
    """What the peaks say of a part."""

    verdict: Verdict
    ratio: float
    """Largest peak with the engine, or at the second level, over the largest without it, or at the first."""
    low: float
    """Of the range that the trials leave, no confidence interval."""
    high: float
    replicates: int
    reason: str


def judge_peaks(part: ClaimPart, groups: Groups, study: Study) -> PeakFinding:
    """The finding on a part about memory, whose rule is "lowers" or "costs-at-most".

    Raises `NotJudgedError` without peaks of two replicates of both, and where a process's resident memory hides what is
    asked for: on a CPU a saving that does not show, and a cost that does not.
    """
    names = tuple(reversed(pair_of(part, study)))
    sides = [groups[name, "variant"].ok if (name, "variant") in groups else () for name in names]
    itself, twin = (groups.get((study.reference, role)) for role in _ROLES)
    on_device = any(_DEVICE in record.memory for side in sides for record in side)
    kind = part.metric if part.metric != PEAK else _DEVICE if on_device else _HOST
    resident = kind.startswith("host_")
    ours, theirs = (_peaks(side, kind) for side in sides)
    both = ours.keys() & theirs.keys()
    title = "peak memory" if part.metric == PEAK else kind
    if len(both) < LEAST_SHARED:
        raise NotJudgedError(
            f"{title}: {format_count(len(both), 'replicate')} measured it on both sides: a claim is never judged from "
            f"fewer than {LEAST_SHARED}. Measure on, or again with --replicates 5."
        )
    control, reference = (_peaks(one.ok, kind) if one is not None else {} for one in (twin, itself))
    ratio = max(ours[one] for one in both) / max(theirs[one] for one in both)
    low, high = _range(ours, theirs, both, _apart(control, reference))
    what = f"{'device' if on_device else 'resident'} peak" if part.metric == PEAK else kind
    said = (
        f"{what} {_sizes(ours.values())} in {names[0]}, "
        f"{_sizes(theirs.values())} in {names[1]}, ×{format_ratio(ratio, low, high)} by the range of the replicates"
    )
    if resident and not control:
        raise NotJudgedError(
            f"{said}: the reference was not measured twice, so how far a resident peak is from itself is not known. "
            "Measure it with its control."
        )
    verdict, words = _decided(part, low, high)
    if resident and verdict != ("supported" if part.rule == "lowers" else "refuted"):
        raise NotJudgedError(f"{said}: {_diluted(part, sides[0])}. Measure on a GPU.")
    said = f"{said}: {words}{_in_spite(sides[0]) if resident else ''}"
    return PeakFinding(verdict=verdict, ratio=ratio, low=low, high=high, replicates=len(both), reason=said)


def _decided(part: ClaimPart, low: float, high: float) -> tuple[Verdict, str]:
    """By the range of the ratios: all of it on one side of what was promised, or open."""
    share = f"{100 * part.by:.3g} %"
    if part.rule == "lowers":
        least = 1 - part.by
        if high < least:
            return "supported", f"a fall of more than {share}"
        return ("refuted", f"no fall of more than {share}") if low >= least else _open(f"a fall of more than {share}")
    most = 1 + part.by
    if high <= most:
        return "supported", f"a rise of {share} at most"
    return ("refuted", f"a rise of more than {share}") if low > most else _open(f"a rise of more than {share}")


def _open(what: str) -> tuple[Verdict, str]:
    return "inconclusive", f"open whether that is {what}"


def _peaks(records: Iterable[TrialRecord], kind: str) -> dict[int, int]:
    """The peak of each replicate that measured one."""
    return {record.replicate: record.memory[kind] for record in records if record.memory.get(kind)}


def _apart(control: Mapping[int, int], reference: Mapping[int, int]) -> float:
    """By how much the reference differs from itself in a replicate, as a ratio of 1 or more."""
    ratios = [control[one] / reference[one] for one in control.keys() & reference.keys()]
    return max([1.0, *ratios, *(1 / one for one in ratios)])


def _range(
    ours: Mapping[int, int], theirs: Mapping[int, int], both: Collection[int], apart: float
) -> tuple[float, float]:
    """The least and the greatest ratio of a replicate, wider by what the reference differs from itself in one: trials
    of one replicate are watched by the same instrument, which takes memory as well."""
    ratios = [ours[one] / theirs[one] for one in both]
    return min(ratios) / apart, max(ratios) * apart


def _sizes(peaks: Iterable[int]) -> str:
    low, high = format_bytes(min(peaks)), format_bytes(max(peaks))
    return high if low == high else f"{low} to {high}"


def _born(records: Iterable[TrialRecord]) -> str:
    births = [record.memory[RSS_AT_START] for record in records if RSS_AT_START in record.memory]
    return f", {format_bytes(max(births))} of which it begins with" if births else ""


def _in_spite(records: Iterable[TrialRecord]) -> str:
    return f", although the process holds more (on a CPU the peak is its resident memory{_born(records)})"


def _diluted(part: ClaimPart, records: Iterable[TrialRecord]) -> str:
    lost = ("a saving", "refutes") if part.rule == "lowers" else ("a cost", "supports")
    return (
        f"on a CPU the peak is the resident memory of the process{_born(records)}, in which {lost[0]} can be lost, so "
        f"it {lost[1]} nothing"
    )
