"""A promise of less memory, judged by the peaks of training.

A peak takes one of a few values (`harness.stats.memory`), so there is no test on it: the ratios of the replicates have
a range, and a promise holds if all of it lies below what was promised, and fails if none does.

On a CPU the peak is the resident memory of the process, with the interpreter and the libraries that it begins with.
They are on both sides and dilute whatever is saved: a saving that shows in spite of them is one, and one that does not
show says nothing. So there a promise is borne out or not judged, and never refuted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from harness.records.metrics import BIRTH, PEAKS
from harness.records.record import TrialRecord
from harness.records.units import format_bytes, format_ratio
from harness.studies.claim import Part
from harness.studies.study import Study
from harness.verdicts.claims.values import LEAST_SHARED, NotJudgedError
from harness.verdicts.series import Groups

_DEVICE, _HOST = PEAKS["train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakFinding:
    """What the peaks say of a part."""

    verdict: Literal["supported", "refuted", "inconclusive"]
    ratio: float
    """Largest peak with the engine over the largest without it."""
    low: float
    """Of the range that the trials leave, no confidence interval."""
    high: float
    replicates: int
    reason: str


def judge_peaks(part: Part, groups: Groups, study: Study) -> PeakFinding:
    """The finding on a part whose rule is "lowers".

    Raises `NotJudgedError` without peaks of two replicates of both, and on a CPU where no saving shows.
    """
    assert study.engine is not None  # the axis of the part says so
    names = study.engine.variant, study.reference
    sides = [groups[name, "variant"].ok if (name, "variant") in groups else () for name in names]
    twin = groups[study.reference, "control"].ok if (study.reference, "control") in groups else ()
    on_device = any(_DEVICE in record.memory for side in sides for record in side)
    kind = _DEVICE if on_device else _HOST
    ours, theirs, control = (_peaks(side, kind) for side in (*sides, twin))
    both = ours.keys() & theirs.keys()
    if len(both) < LEAST_SHARED:
        counted = f"{len(both)} replicate{'' if len(both) == 1 else 's'}"
        raise NotJudgedError(
            f"peak memory: {counted} measured it with the engine and without: a claim is never judged from fewer than "
            f"{LEAST_SHARED}. Measure on, or again with --replicates 5."
        )
    ratio = max(ours[one] for one in both) / max(theirs[one] for one in both)
    low, high = _range(ours, theirs, control, both)
    said = (
        f"{'device' if on_device else 'resident'} peak {_sizes(ours.values())} in {names[0]}, "
        f"{_sizes(theirs.values())} in {names[1]}, ×{format_ratio(ratio, low, high)} by the range of the replicates"
    )
    if not on_device and not control:
        raise NotJudgedError(
            f"{said}: the reference was not measured twice, so how far a resident peak is from itself is not known. "
            "Measure it with its control."
        )
    least, share = 1 - part.by, f"{100 * part.by:.3g} %"
    verdict: Literal["supported", "refuted", "inconclusive"]
    if high < least:
        verdict, said = "supported", f"{said}: a fall of more than {share}{'' if on_device else _in_spite(sides[0])}"
    elif not on_device:
        raise NotJudgedError(f"{said}: {_diluted(sides[0])}. Measure on a GPU.")
    elif low >= least:
        verdict, said = "refuted", f"{said}: no fall of more than {share}"
    else:
        verdict, said = "inconclusive", f"{said}: open whether that is a fall of more than {share}"
    return PeakFinding(verdict=verdict, ratio=ratio, low=low, high=high, replicates=len(both), reason=said)


def _peaks(records: Iterable[TrialRecord], kind: str) -> dict[int, int]:
    """The peak of each replicate that measured one."""
    return {record.replicate: record.memory[kind] for record in records if record.memory.get(kind)}


def _range(
    ours: Mapping[int, int], theirs: Mapping[int, int], control: Mapping[int, int], both: Collection[int]
) -> tuple[float, float]:
    """The least and the greatest ratio of a replicate, wider by what the reference differs from itself in one: trials
    of one replicate are watched by the same instrument, which takes memory as well."""
    ratios = [ours[one] / theirs[one] for one in both]
    apart = [control[one] / theirs[one] for one in control.keys() & theirs.keys()]
    wider = max([1.0, *apart, *(1 / one for one in apart)])
    return min(ratios) / wider, max(ratios) * wider


def _sizes(peaks: Iterable[int]) -> str:
    low, high = format_bytes(min(peaks)), format_bytes(max(peaks))
    return high if low == high else f"{low} to {high}"


def _born(records: Iterable[TrialRecord]) -> str:
    births = [record.memory[BIRTH] for record in records if BIRTH in record.memory]
    return f", {format_bytes(max(births))} of which it begins with" if births else ""


def _in_spite(records: Iterable[TrialRecord]) -> str:
    return f", in spite of what the process holds beside it (on a CPU the peak is its resident memory{_born(records)})"


def _diluted(records: Iterable[TrialRecord]) -> str:
    return (
        f"on a CPU the peak is the resident memory of the process{_born(records)}, in which a saving can be lost, so "
        "it refutes nothing"
    )
