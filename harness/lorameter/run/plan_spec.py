"""A plan as it crosses to another process or another day: what it follows from, and the trials that must come of it.

A plan is made and not stored: it follows from the study, the selection, the phases, the level and the seed. So these
are written, and whoever reads them makes the plan again; one that names other trials is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.record import Interleaving, Side
from lorameter.run.arms import Arm, contenders_of, sides_of, variants_of
from lorameter.run.plan import Group, Plan, make_plan
from lorameter.studies.study import Study
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SideSpec:
    """One side of an A/B, by a word that means the same on every machine."""

    side: Side
    kind: Literal["revision", "interpreter", "requirements", "present"]
    spec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """What a plan follows from; of an A/B the sides as well, which are not of commands."""

    study: dict[str, Any]
    phases: tuple[str, ...]
    selection: tuple[str, ...]
    own_workloads: dict[str, Workload]
    interleaving: Interleaving
    why: str
    order: tuple[str, ...]
    """All trials of the whole plan."""
    trials: tuple[str, ...]
    """Those of the groups that are to be measured."""
    sides: tuple[SideSpec, ...] = ()
    slowdown_rows: int = 0
    """Extra work of the candidate (`Arm.slowdown_rows`)."""


def write_plan(plan: Plan, whole: Plan, sides: tuple[SideSpec, ...] = ()) -> PlanSpec:
    """A plan, or what is left of the `whole` one, with the `sides` of an A/B."""
    return PlanSpec(
        study=codec.to_json(whole.study),
        phases=whole.phases,
        selection=tuple(variant.name for variant in variants_of(whole.contenders)),
        own_workloads=whole.own_workloads,
        interleaving=whole.interleaving,
        why=whole.why,
        order=tuple(slot.trial for slot in whole.slots),
        trials=tuple(slot.trial for slot in plan.slots),
        sides=sides,
        slowdown_rows=max(contender.slowdown_rows for contender in whole.contenders),
    )


def read_plan(written: PlanSpec) -> Plan:
    """The plan, with the groups that are to be measured. Raises `UsageError` where this version plans other trials."""
    study = codec.from_json(Study, written.study, "study of the plan")
    study = restore_numbers(study, written.study)
    plan = make_plan(
        study,
        contenders=_contenders(study, written),
        phases=written.phases,
        interleaving=written.interleaving,
        why=written.why,
    )
    order, wanted = set(written.order), set(written.trials)
    # Of a run that is resumed, replicates that turned out needless are no more part of the plan:
    plan = dataclasses.replace(plan, groups=tuple(group for group in plan.groups if order >= _trials(group)))
    if tuple(slot.trial for slot in plan.slots) != written.order:
        raise UsageError(
            f"study {study.name}: the lorameter here plans other trials than the one that asks for them. Install one "
            "version of it in both places."
        )
    return dataclasses.replace(plan, groups=tuple(group for group in plan.groups if wanted >= _trials(group)))


def _contenders(study: Study, written: PlanSpec) -> tuple[Arm, ...]:
    if not written.sides:
        return contenders_of(study, written.selection, written.own_workloads)
    variants = [study.variant(name) for name in written.selection]
    return sides_of(study, variants, slowdown_rows=written.slowdown_rows)


def _trials(group: Group) -> set[str]:
    return {slot.trial for slot in group.slots}


def restore_numbers(study: Study, written: Mapping[str, Any]) -> Study:
    """The study with the ids that its variants had when it was written.

    An id is of a variant as it is written, and a whole number in place of a fraction is written otherwise.
    """
    variants = []
    for variant, fields in zip(study.variants, written.get("variants", ()), strict=True):
        whole: dict[str, Any] = {key: value for key, value in fields.items() if type(value) is int}
        variants.append(dataclasses.replace(variant, **whole))
    return dataclasses.replace(study, variants=tuple(variants))
