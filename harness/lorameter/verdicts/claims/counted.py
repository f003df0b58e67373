"""Judges parts of claims that need no test: counted quantities, which are exact, and peaks of training memory.

A peak takes one of a few values (`lorameter.stats.compare_bytes`), so it is not tested: the ratios of the replicates
have a range, and a claim holds if the whole range is below the claimed ratio, and fails if none of it is.

On a CPU the peak is the resident memory of the process, including the interpreter and the libraries. These are part of
both sides and dilute a saving: an observed saving is real, but its absence proves nothing. So on a CPU a claim is
supported or not judged, and never refuted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from lorameter.records.metrics import PEAKS, RSS_AT_START
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_bytes, format_ratio
from lorameter.studies.claim import PEAK, ClaimPart, format_level
from lorameter.studies.study import Study
from lorameter.verdicts.claims.parts import (
    Judgement,
    NotJudgedError,
    PartResult,
    check_count,
    check_levels,
    describe_decision,
    make_result,
    part_pair,
)
from lorameter.verdicts.series import Groups

_DEVICE, _HOST = PEAKS["train"]


def judge_counts(part: ClaimPart, groups: Groups, study: Study) -> PartResult:
    """Judge whether the smallest value of each level is above the largest value of the previous level.

    Memory counts come from isolated trials, of which a run may have few; the requirement of two replicates applies to
    the run. Raises `NotJudgedError` if levels or the quantity were not measured.
    """
    axis, quantity, levels = part.axis, part.metric, study.levels(part.axis)
    check_levels(axis, levels, groups)
    series = [groups[name, "variant"].ok for _, name in levels]
    replicates = set.intersection(*({record.replicate for record in one} for one in series))
    check_count(len(replicates))
    found = [
        {source[quantity] for record in one for source in (record.values, record.memory) if quantity in source}
        for one in series
    ]
    if not all(found):
        raise NotJudgedError(f"{quantity} was not measured at every level of {axis}. Measure with the phase train.")
    texts = [" to ".join(f"{value:,.0f}" for value in sorted({min(values), max(values)})) for values in found]
    named = (f"{text} at {format_level(level)}" for text, (level, _) in zip(texts, levels, strict=True))
    values_text = f"{texts[0]} at every level of {axis}" if len(set(texts)) == 1 else f"by {axis}, {', '.join(named)}"
    rises = all(max(before) < min(after) for before, after in itertools.pairwise(found))
    reason = f"{quantity}: {values_text}"
    return make_result(part, "supported" if rises else "refuted", reason, replicates=len(replicates))


def judge_peaks(part: ClaimPart, groups: Groups, study: Study) -> PartResult:
    """Judge a part about memory, whose rule is "lowers" or "costs-at-most".

    Raises `NotJudgedError` unless both variants have peaks of two replicates, and on a CPU if the resident memory of
    the process may hide a saving or a cost.
    """

    def records_of(name: str, role: str = "variant") -> tuple[TrialRecord, ...]:
        return groups[name, role].ok if (name, role) in groups else ()  # type: ignore[index]

    without, name = part_pair(part, study)
    sides = [records_of(name), records_of(without)]
    on_device = any(_DEVICE in record.memory for side in sides for record in side)
    kind = part.metric if part.metric != PEAK else _DEVICE if on_device else _HOST
    resident = kind.startswith("host_")
    ours, theirs = (_peaks(side, kind) for side in sides)
    both = ours.keys() & theirs.keys()
    check_count(len(both))
    control, reference = _peaks(records_of(study.reference, "control"), kind), _peaks(records_of(study.reference), kind)
    # The difference of the reference from itself widens the range, because all trials are observed in the same way.
    control_ratios = [control[replicate] / reference[replicate] for replicate in control.keys() & reference.keys()]
    distance = max([1.0, *control_ratios, *(1 / ratio for ratio in control_ratios)])
    ratios = [ours[replicate] / theirs[replicate] for replicate in both]
    low, high = min(ratios) / distance, max(ratios) * distance
    ratio = max(ours[one] for one in both) / max(theirs[one] for one in both)
    what = f"{'device' if on_device else 'resident'} peak" if part.metric == PEAK else kind
    sentence = (
        f"{what} {_sizes(ours.values())} in {name}, {_sizes(theirs.values())} in {without}, "
        f"×{format_ratio(ratio, low, high)} by the range of the replicates"
    )
    if resident and not control:
        raise NotJudgedError(
            f"{sentence}: the reference was not measured twice, so the scatter of resident peaks is not "
            "known. Measure its control too."
        )
    verdict = _decide(part, low, high)
    words = describe_decision(part, verdict)
    if resident:
        start_sizes = [record.memory[RSS_AT_START] for record in sides[0] if RSS_AT_START in record.memory]
        start_note = f", {format_bytes(max(start_sizes))} of which it begins with" if start_sizes else ""
        saving = part.rule == "lowers"
        if verdict != ("supported" if saving else "refuted"):
            lost = "a saving can be lost, so it refutes" if saving else "a cost can be lost, so it supports"
            raise NotJudgedError(
                f"{sentence}: on a CPU the peak is the resident memory of the process{start_note}, in which {lost} "
                "nothing. Measure on a GPU."
            )
        words += f", although the process holds more (on a CPU the peak is its resident memory{start_note})"
    about = f"{name} / {without}"
    found = {"ratio": ratio, "low": low, "high": high, "replicates": len(both)}
    return make_result(part, verdict, f"{sentence}: {words}", about=about, **found)


def _decide(part: ClaimPart, low: float, high: float) -> Judgement:
    """Decide by the range of the ratios: completely on one side of the claimed ratio, or inconclusive."""
    lowers = part.rule == "lowers"
    limit = 1 - part.by if lowers else 1 + part.by
    if high < limit or (high == limit and not lowers):
        return "supported"
    return "refuted" if low > limit or (low == limit and lowers) else "inconclusive"


def _peaks(records: Iterable[TrialRecord], kind: str) -> dict[int, int]:
    """The peak of each replicate, if measured."""
    return {record.replicate: record.memory[kind] for record in records if record.memory.get(kind)}


def _sizes(peaks: Iterable[int]) -> str:
    low, high = format_bytes(min(peaks)), format_bytes(max(peaks))
    return high if low == high else f"{low} to {high}"
