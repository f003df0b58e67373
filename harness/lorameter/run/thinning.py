"""What a replicate does without where the time does not suffice for as many as give an interval to rest on.

One replicate has no interval, and a second of everything may take what five of the steps alone would take. So the
first replicate measures all that was asked for, and a later one leaves out, in this order and only as far as it must:
the isolated trials (peaks, and what is measured of an adapter alone), requests with the adapter merged, those that the
model ends, all requests, and at last the losses on held-out records. What it leaves out keeps the samples of the
replicates that have it. Peaks without isolated trials are those of the trials that take turns, where these can tell
them: on a CPU a peak is that of a process, whatever is live beside it, and no profile is in it where a step was watched
by the spy.

Nothing is left out whose interval somebody waits for: of two sides, of a claim, where a precision is asked for, or
where phases are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from lorameter.records.metrics import METRICS, PEAKS, PHASES
from lorameter.records.record import Measure, Notice, TrialRecord
from lorameter.records.units import format_count
from lorameter.run.plan import Group, Plan, Slot

Part = Measure | Literal["losses"]
"""What is left out or not."""
ORDER: tuple[Measure, ...] = ("merged", "open_ended", "requests")
"""What trials that take turns leave out, one after the other."""
SAID: dict[Part, str] = {
    "peaks": "peaks of memory", "merged": "requests with the adapter merged",
    "open_ended": "requests until EOS", "requests": "requests", "losses": "held-out losses",
}  # fmt: skip
_EVIDENCE: dict[Part, tuple[str, ...]] = {
    "peaks": (*PEAKS["train"], *PEAKS["generate"]), "merged": ("merged_request_time_s",),
    "open_ended": ("open_ended_request_time_s",), "requests": ("request_time_s",), "losses": ("held_out_loss",),
}  # fmt: skip
"""Names that a record holds where its trial has measured that part."""
SOUGHT_REPLICATES = 5
"""The time is spread over so many, if that many are planned: fewer give a standard deviation that is itself too
uncertain."""


def reduce_to_fit(
    plan: Plan,
    groups: Sequence[Group],
    fits: Callable[[Sequence[Group]], bool],
    *,
    peaks_live: bool = False,
) -> tuple[Group, ...]:
    """The groups of a replicate, less as much as it takes to make them fit, or less all that can be left out;
    `peaks_live` says whether trials that take turns can measure their own peaks."""
    thinner = tuple(groups)
    named = set(plan.phases) != set(PHASES)
    sided = any(slot.side for group in groups for slot in group.slots)
    if named or sided or plan.study.protocol.precision is not None:
        return thinner
    for left in _ever_less(plan, thinner, peaks_live):
        if fits(thinner):
            break
        thinner = left
    return thinner


def parts_in(groups: Iterable[Group]) -> frozenset[Part]:
    """All that is measured in some groups."""
    groups = tuple(groups)
    measures: frozenset[Part] = frozenset(one for group in groups for slot in group.slots for one in slot.measures)
    return measures | ({"losses"} if any(group.turns and group.held_out for group in groups) else set())


def may_leave_out(plan: Plan, groups: Sequence[Group], part: Part) -> bool:
    """Whether nobody waits for the interval of this part of what is measured."""
    return part not in parts_in(reduce_to_fit(plan, groups, lambda thinner: False))


def tell_left_out(left_out: Mapping[int, frozenset[Part]], records: Iterable[TrialRecord]) -> tuple[Notice, ...]:
    """What was left out, if anything was, and what of it no replicate measured."""
    if not left_out:
        return ()
    missing = frozenset[Part]().union(*left_out.values())
    held = set[str]().union(*(names for one in records for names in (one.samples, one.values, one.memory)))
    words = {part: word for part, word in SAID.items() if part in missing}
    elsewhere = ", ".join(word for part, word in words.items() if held.intersection(_EVIDENCE[part]))
    nowhere = ", ".join(word for part, word in words.items() if not held.intersection(_EVIDENCE[part]))
    said = ", ".join(words.values())
    fewer = format_count(len(left_out), "replicate")
    return (
        Notice(
            code="measurements-skipped",
            message=f"{fewer} left out {said}: with them fewer than {SOUGHT_REPLICATES} replicates would have fitted "
            f"into the minutes that the run may take.{f' No replicate measured {nowhere}.' if nowhere else ''}",
            remedy=f"{f'The numbers of {elsewhere} are those of the other replicates. ' if elsewhere else ''}Raise "
            "--max-minutes, or name the phases that are to be measured in each by --phase.",
        ),
    )


def _ever_less(plan: Plan, groups: tuple[Group, ...], peaks_live: bool) -> Iterator[tuple[Group, ...]]:
    names = {name for claim in plan.study.claims for part in claim.parts for name in (part.metric, *part.metrics)}
    claimed = {METRICS[name].phase for name in names if name in METRICS}
    if not plan.study.claims_peaks:
        live = tuple(group for group in groups if not _is_solo(group) or "cold" in group.slots[0].measures)
        alone = parts_in(group for group in groups if group not in live)
        groups = tuple(_with_peaks(group) for group in live) if peaks_live and "peaks" in alone else live
        yield groups
    if "generate" not in claimed:
        for measure in ORDER:
            groups = tuple(group if _is_solo(group) else _without(measure, group) for group in groups)
            yield groups
    if not any(METRICS[name].is_loss for name in names if name in METRICS):
        yield tuple(replace(group, held_out=False) for group in groups)


def _is_solo(group: Group) -> bool:
    return not group.turns


def _with_peaks(group: Group) -> Group:
    """The group with the peaks of those of its trials that no profiler has looked at."""

    def with_peaks(slot: Slot) -> Slot:
        taken = slot.instrument == "spy" and "peaks" not in slot.measures and slot.interleaving == "lockstep"
        return replace(slot, measures=(*slot.measures, "peaks")) if taken else slot

    return replace(group, launches=tuple(tuple(map(with_peaks, launch)) for launch in group.launches))


def _without(measure: Measure, group: Group) -> Group:
    launches = tuple(
        tuple(replace(slot, measures=tuple(one for one in slot.measures if one != measure)) for slot in launch)
        for launch in group.launches
    )
    return replace(
        group, launches=launches, requests=() if measure == "requests" else group.requests,
        open_ended=() if measure == "open_ended" else group.open_ended,
    )  # fmt: skip
