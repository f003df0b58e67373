"""The plan: every trial of a run in the order in which it will be measured, made before anything runs.

Drift of a machine (heat, neighbours) is slower than a replicate and faster than a run. So each replicate holds all
variants once, in an order shuffled by a recorded seed: drift then falls on all variants alike, and the trials of a
replicate are paired. The reference is measured twice under two names (the A/A control): what the harness says of that
pair is what it would say of no difference at all.

A `Group` is what is live together: at the level `replicates` one process with one trial. Levels whose processes take
turns put several launches in a group, or several trials in a launch; the runner conducts all of them the same way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness import codec
from harness.errors import UsageError
from harness.record import Interleaving, Role
from harness.study import Study
from harness.units import PHASES
from harness.variant import Variant

CONTROL_SUFFIX = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One trial in the plan."""

    trial: str
    variant: Variant
    role: Role
    replicate: int
    position: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that are live together: `launches` are the processes, each with its trials.

    `turns` is the order of turns: each entry is one round over all trials of the group, by trial id.
    """

    replicate: int
    launches: tuple[tuple[Slot, ...], ...]
    turns: tuple[tuple[str, ...], ...]

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
    groups: tuple[Group, ...]

    def study_json(self) -> dict[str, Any]:
        """The study as it stands in the run's manifest."""
        return dict(codec.to_json(self.study))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All trials in their order."""
        return tuple(slot for group in self.groups for slot in group.slots)


def make_plan(
    study: Study,
    *,
    select: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
    interleaving: Interleaving = "replicates",
) -> Plan:
    """Replicates × variants, shuffled inside each replicate by `protocol.seed`, with the A/A control.

    Args:
        study: what to measure.
        select: names of variants; empty for all. The reference and its control are measured whatever is selected.
        phases: "train", "generate", "cold"; training always runs, since the others need its adapter.
        interleaving: the level of alternation.

    Raises:
        UsageError: an unknown variant or phase, or a level that is not built yet.
    """
    if interleaving != "replicates":
        raise UsageError(f"interleave = {interleaving!r}: this version measures at the level 'replicates'. Use that.")
    for phase in phases:
        if phase not in PHASES:
            raise UsageError(f"phase = {phase!r}: not known. Known: {', '.join(PHASES)}.")
    chosen = {study.variant(name).name for name in select} or {variant.name for variant in study.variants}
    reference = study.variant(study.reference)
    members: list[tuple[Variant, Role]] = [
        (variant, "variant") for variant in study.variants if variant.name in chosen | {reference.name}
    ]
    members.append((reference, "control"))

    shuffler = random.Random(study.protocol.seed)
    groups: list[Group] = []
    for replicate in range(study.protocol.replicates):
        order = list(members)
        shuffler.shuffle(order)
        for variant, role in order:
            suffix = f"-{CONTROL_SUFFIX}" if role == "control" else ""
            slot = Slot(
                trial=f"r{replicate}-{variant.name}{suffix}",
                variant=variant,
                role=role,
                replicate=replicate,
                position=len(groups),
                seed=study.protocol.seed + replicate,
            )
            turns = ((slot.trial,),) * study.protocol.turns
            groups.append(Group(replicate=replicate, launches=((slot,),), turns=turns))
    return Plan(
        study=study,
        members=tuple(members),
        phases=tuple(phase for phase in PHASES if phase in phases),
        interleaving=interleaving,
        groups=tuple(groups),
    )
