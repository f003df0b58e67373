"""What a replicate does without where the time does not suffice for as many as give an interval to rest on.

One replicate has no interval, and a second of everything may take what five of the steps alone would take. So the
first replicate measures all that was asked for, and a later one leaves out, in this order and only as far as it must:
the solo trials (peaks, and what is measured of an adapter alone), requests with the adapter merged, those that the
model ends, and at last all requests. What it leaves out keeps the samples of the replicates that have it.

Nothing is left out whose interval somebody waits for: of two sides, of a claim, where a precision is asked for, or
where phases are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from harness.records.metrics import METRICS, PHASES
from harness.records.record import Measure, Notice
from harness.records.units import format_count
from harness.run.plan import Group, Plan

ORDER: tuple[Measure, ...] = ("merged", "natural", "requests")
"""What trials that take turns leave out, one after the other."""
SAID: dict[Measure, str] = {
    "peaks": "peaks of memory", "merged": "requests with the adapter merged", "natural": "requests that the model ends",
    "requests": "requests",
}  # fmt: skip
SOUGHT_REPLICATES = 5
"""The time is spread over so many, if that many are planned: fewer give a standard deviation that is itself too
uncertain."""


def thinned(plan: Plan, groups: Sequence[Group], fits: Callable[[Sequence[Group]], bool]) -> tuple[Group, ...]:
    """The groups of a replicate, less as much as it takes to make them fit, or less all that can be left out."""
    thinner = tuple(groups)
    named = set(plan.phases) != set(PHASES)
    sided = any(slot.side for group in groups for slot in group.slots)
    if named or sided or plan.study.protocol.precision is not None:
        return thinner
    for left in _ever_less(plan, thinner):
        if fits(thinner):
            break
        thinner = left
    return thinner


def measures_in(groups: Iterable[Group]) -> frozenset[Measure]:
    """All that is measured in some groups."""
    return frozenset(measure for group in groups for slot in group.slots for measure in slot.measures)


def tell_left_out(left_out: Mapping[int, frozenset[Measure]]) -> tuple[Notice, ...]:
    """What was left out in which replicates, if anything was."""
    if not left_out:
        return ()
    missing = frozenset[Measure]().union(*left_out.values())
    said = ", ".join(word for measure, word in SAID.items() if measure in missing)
    fewer = format_count(len(left_out), "replicate")
    return (
        Notice(
            code="left-out",
            message=f"{fewer} left out {said}: with them fewer than {SOUGHT_REPLICATES} replicates would have fitted "
            "into the minutes that the run may take.",
            remedy="Their numbers are those of the other replicates. Raise --max-minutes, or name the phases that are "
            "to be measured in each by --phase.",
        ),
    )


def _ever_less(plan: Plan, groups: tuple[Group, ...]) -> Iterator[tuple[Group, ...]]:
    names = {name for claim in plan.study.claims for part in claim.parts for name in (part.metric, *part.metrics)}
    claimed = {METRICS[name].phase for name in names if name in METRICS}
    if not plan.study.claims_peaks:
        groups = tuple(group for group in groups if not _is_solo(group) or "cold" in group.slots[0].measures)
        yield groups
    if "generate" in claimed:
        return
    for measure in ORDER:
        groups = tuple(group if _is_solo(group) else _without(measure, group) for group in groups)
        yield groups


def _is_solo(group: Group) -> bool:
    return not group.turns


def _without(measure: Measure, group: Group) -> Group:
    launches = tuple(
        tuple(replace(slot, measures=tuple(one for one in slot.measures if one != measure)) for slot in launch)
        for launch in group.launches
    )
    return replace(
        group, launches=launches, requests=() if measure == "requests" else group.requests,
        natural=() if measure == "natural" else group.natural,
    )  # fmt: skip
