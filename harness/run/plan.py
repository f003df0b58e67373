"""The plan: every trial of a run in the order in which it will be measured, made before anything runs.

Drift of a machine (heat, neighbours) is slower than a replicate and faster than a run. So each replicate holds all
variants once, in an order shuffled by a recorded seed: drift then falls on all variants alike, and the trials of a
replicate are paired. The reference is measured twice under two names (the A/A control): what the harness says of that
pair is what it would say of no difference at all.

A `Group` is what is live together. At `replicates` that is one process with one trial; at `lockstep` a process for
each trial and at `shared-base` one process for all of them, and their steps take turns. What needs a process that is
alone (peaks of memory, cold starts, a merged adapter on a base that others share) is then measured by further, solo
trials of the same replicate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError
from harness.records import codec
from harness.records.metrics import PHASES
from harness.records.record import Instrument, Interleaving, Measure, Role, Side
from harness.studies.study import Study
from harness.studies.variant import Variant

CONTROL_SUFFIX = "control"
_PHASE_MEASURES: dict[Measure, str] = {
    "steps": "train",
    "requests": "generate",
    "natural": "generate",
    "merged": "generate",
    "peaks": "train",
    "cold": "cold",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One trial in the plan."""

    trial: str
    variant: Variant
    role: Role
    replicate: int
    position: int
    seed: int
    interleaving: Interleaving
    measures: tuple[Measure, ...]
    instrument: Instrument = "profile"
    side: Side = ""
    arm: str = ""
    """Which of the run's executors hosts the trial; a run without sides has one, unless its variants differ in
    threads."""
    injected_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that are live together: `launches` are the processes, each with its trials.

    `turns`, `requests` and `natural` are the orders of turns in training and in either kind of request: each entry is
    one round over all trials of the group, by trial id.
    """

    replicate: int
    launches: tuple[tuple[Slot, ...], ...]
    turns: tuple[tuple[str, ...], ...] = ()
    requests: tuple[tuple[str, ...], ...] = ()
    natural: tuple[tuple[str, ...], ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All trials of the group."""
        return tuple(slot for launch in self.launches for slot in launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run measures, in order."""

    study: Study
    members: tuple[tuple[Variant, Role], ...]
    phases: tuple[str, ...]
    interleaving: Interleaving
    why: str
    """Why this level of interleaving."""
    groups: tuple[Group, ...]

    def study_json(self) -> dict[str, Any]:
        """The study as it stands in the run's manifest."""
        return dict(codec.to_json(self.study))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All trials in their order."""
        return tuple(slot for group in self.groups for slot in group.slots)


def members_of(study: Study, select: Sequence[str] = ()) -> tuple[tuple[Variant, Role], ...]:
    """The variants to measure and the control; the reference stays in whatever is selected. Raises `UsageError`."""
    chosen = {study.variant(name).name for name in select} or {variant.name for variant in study.variants}
    reference = study.variant(study.reference)
    variants = [variant for variant in study.variants if variant.name in chosen | {reference.name}]
    members: list[tuple[Variant, Role]] = [(variant, "variant") for variant in variants]
    return (*members, (reference, "control"))


def make_plan(
    study: Study,
    *,
    select: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
    interleaving: Interleaving = "replicates",
    why: str = "asked for",
) -> Plan:
    """Replicates × variants, shuffled inside each replicate by `protocol.seed`, with the A/A control.

    Args:
        study: what to measure.
        select: names of variants; empty for all. The reference and its control are measured whatever is selected.
        phases: "train", "generate", "cold"; training always runs, since the others need its adapter.
        interleaving: the level of alternation (`harness.run.levels` picks one).
        why: the reason for that level, for the report.

    Raises:
        UsageError: an unknown variant or phase.
    """
    members = members_of(study, select)
    checked = checked_phases(phases)
    together, alone = measures_of(study, interleaving, checked)
    shuffler = random.Random(study.protocol.seed)
    groups: list[Group] = []
    position = 0
    for replicate in range(study.protocol.replicates):
        order = list(members)
        shuffler.shuffle(order)
        slots = [
            _slot(study, variant, role, replicate, position + index, interleaving, together)
            for index, (variant, role) in enumerate(order)
        ]
        groups += grouped(study, slots, shuffler, checked)
        position += len(slots)
        if solo_due(study, alone, replicate):
            shuffler.shuffle(order)
            for variant, role in solo_members(order, alone):
                slot = _slot(study, variant, role, replicate, position, "replicates", alone, suffix="-solo")
                groups.append(Group(replicate=replicate, launches=((slot,),), requests=solo_requests(study, slot)))
                position += 1
    return Plan(study=study, members=members, phases=checked, interleaving=interleaving, why=why, groups=tuple(groups))


def checked_phases(phases: Sequence[str]) -> tuple[str, ...]:
    """The phases in their order. Raises `UsageError` for an unknown one."""
    for phase in phases:
        if phase not in PHASES:
            raise UsageError(f"phase = {phase!r}: not known. Known: {', '.join(PHASES)}.")
    return tuple(phase for phase in PHASES if phase in phases)


def measures_of(
    study: Study, interleaving: Interleaving, phases: Sequence[str]
) -> tuple[tuple[Measure, ...], tuple[Measure, ...]]:
    """What the trials that take turns measure, and what solo trials beside them measure."""
    unwanted = {"merged"} if not study.protocol.merged else set()
    unwanted |= {"natural"} if not study.workload.natural_tokens else set()
    wanted = tuple(
        measure
        for measure, phase in _PHASE_MEASURES.items()
        if (phase in phases or measure == "steps") and measure not in unwanted
    )
    wanted = (*(measure for measure in wanted if measure != "peaks"), "peaks")
    solo: set[Measure] = {
        "shared-base": {"merged", "peaks", "cold"},
        "lockstep": {"peaks", "cold"},
    }.get(interleaving, set())  # type: ignore[assignment]
    return (
        tuple(measure for measure in wanted if measure not in solo),
        tuple(measure for measure in wanted if measure in solo),
    )


def solo_due(study: Study, alone: Sequence[Measure], replicate: int) -> bool:
    """Whether a replicate has solo trials for what they measure; peaks alone need few."""
    return bool(alone) and (set(alone) != {"peaks"} or replicate < study.protocol.peak_replicates)


def solo_members(members: Sequence[tuple[Variant, Role]], alone: Sequence[Measure]) -> list[tuple[Variant, Role]]:
    """Who has solo trials; peaks are compared by their maximum, which takes no control."""
    return [(variant, role) for variant, role in members if role == "variant" or set(alone) != {"peaks"}]


def grouped(study: Study, slots: Sequence[Slot], shuffler: random.Random, phases: Sequence[str]) -> list[Group]:
    """The groups of trials that are compared with each other, by the level that they carry."""
    level = slots[0].interleaving
    if level == "shared-base":
        return [_conducted(study, [tuple(slots)], shuffler, phases)]
    if level == "lockstep":
        return [_conducted(study, [(slot,) for slot in slots], shuffler, phases)]
    return [_conducted(study, [(slot,)], shuffler, phases) for slot in slots]


def _conducted(
    study: Study, launches: Sequence[tuple[Slot, ...]], shuffler: random.Random, phases: Sequence[str]
) -> Group:
    """A group whose trials take turns, in an order that is shuffled anew for each round."""
    trials = [slot.trial for launch in launches for slot in launch]

    def rounds(count: int) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(shuffler.sample(trials, len(trials))) for _ in range(count))

    return Group(
        replicate=launches[0][0].replicate,
        launches=tuple(launches),
        turns=rounds(study.protocol.turns),
        requests=rounds(study.protocol.generate_requests) if "generate" in phases else (),
        natural=rounds(study.protocol.natural_requests) if "natural" in launches[0][0].measures else (),
    )


def instrument_for(replicate: int, measures: Sequence[Measure]) -> Instrument:
    """The full profile once a variant and run, in its first timed trial; the spy in all others, whose paths are the
    same."""
    return "profile" if replicate == 0 and "steps" in measures else "spy"


def solo_requests(study: Study, slot: Slot) -> tuple[tuple[str, ...], ...]:
    """Rounds of requests of a solo trial; it makes any only with its adapter merged."""
    return ((slot.trial,),) * study.protocol.generate_requests if "merged" in slot.measures else ()


def _slot(
    study: Study,
    variant: Variant,
    role: Role,
    replicate: int,
    position: int,
    interleaving: Interleaving,
    measures: tuple[Measure, ...],
    *,
    suffix: str = "",
) -> Slot:
    control = f"-{CONTROL_SUFFIX}" if role == "control" else ""
    return Slot(
        trial=f"r{replicate}-{variant.name}{control}{suffix}",
        variant=variant,
        role=role,
        replicate=replicate,
        position=position,
        seed=study.protocol.seed + replicate,
        interleaving=interleaving,
        measures=measures,
        instrument=instrument_for(replicate, measures),
        arm=_arm(study, variant, role),
    )


def _arm(study: Study, variant: Variant, role: Role) -> str:
    """The executor of a trial. The number of threads is set where a process begins, so other threads take another
    executor; then each of those that are compared has its own, for the reason that `measure.Arm` gives."""
    if len({workload.threads for workload in study.workloads}) == 1:
        return ""
    return f"{variant.name}-{CONTROL_SUFFIX}" if role == "control" else variant.name
