"""Who contends: a variant on a workload, as itself or as its own control, and in an A/B on a side.

A ratio says something of a variant only if all else is alike on both sides of it, so what a trial measures is said once
and whole. All contenders meet on the study's workload, unless the workload itself is in question: then one has a
workload of its own: the same records in other batches, another layout, by other threads or for another model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import UsageError
from lorameter.records.metrics import PHASES
from lorameter.records.record import Role, Side
from lorameter.studies.protocol import Protocol
from lorameter.studies.study import Study, unknown
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

CONTROL_SUFFIX = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Who has one trial in each replicate."""

    variant: Variant
    side: Side = ""
    role: Role = "variant"
    workload: Workload
    slowdown_rows: int = 0
    """Extra work in every adapted layer (`lorameter.trial.building.planted_slowdown`); 0 in a real measurement."""

    @property
    def name(self) -> str:
        """Unique in its run: the variant, its side, and whether it is the control."""
        parts = (self.variant.name, self.side, CONTROL_SUFFIX if self.role == "control" else "")
        return "-".join(part for part in parts if part)

    def rounds_after_turns(self, protocol: Protocol) -> int:
        """Untimed rounds, as long as turns, for what these leave of the epochs; fewer are needed where the data has
        fewer sequences than are asked for."""
        per_step = self.workload.batch_size * self.variant.gradient_accumulation
        steps = protocol.all_steps(self.workload.train_sequences, per_step) - protocol.total_steps
        return math.ceil(steps / protocol.steps_per_turn)


def contenders_of(
    study: Study, select: Sequence[str] = (), own_workloads: Mapping[str, Workload] | None = None
) -> tuple[Arm, ...]:
    """The variants to measure and the control; the reference stays in whatever is selected.

    Args:
        study: its variants and the workload on which they meet.
        select: names of variants; empty for all.
        own_workloads: workloads of variants that are not measured on the study's, by name; the study's own if left out.

    Raises:
        UsageError: an unknown variant, a workload of other data, or two variants that are one.
    """
    own = study.own_workloads if own_workloads is None else own_workloads
    _check_own(study, own)
    study.check_distinct(own)
    chosen = {study.variant(name).name for name in select} or {variant.name for variant in study.variants}
    chosen.add(study.reference)

    def contender(variant: Variant, role: Role = "variant") -> Arm:
        return Arm(variant=variant, role=role, workload=own.get(variant.name, study.workload))

    measured = [contender(variant) for variant in study.variants if variant.name in chosen]
    return (*measured, contender(study.variant(study.reference), "control"))


def sides_of(
    study: Study, variants: Sequence[Variant], *, slowdown_rows: int = 0, command: str = ""
) -> tuple[Arm, ...]:
    """Each variant on both sides, and one of them on the base once more; `command` is the candidate's in place of the
    variants' own, where two scripts are the sides."""
    controlled = next((variant for variant in variants if variant.name == study.reference), variants[0])
    found: list[Arm] = []
    for variant in variants:
        base = Arm(variant=variant, side="base", workload=study.workload)
        other = dataclasses.replace(variant, command=command) if command else variant
        found += [base, dataclasses.replace(base, side="candidate", variant=other, slowdown_rows=slowdown_rows)]
        found += [dataclasses.replace(base, role="control")] if variant is controlled else []
    return tuple(found)


def _check_own(study: Study, own: Mapping[str, Workload]) -> None:
    names = [variant.name for variant in study.variants]
    for name, workload in own.items():
        if name not in names:
            raise UsageError(f"study {study.name}: workload of {name!r}: {unknown(name, names)}")
        if workload.data != study.workload.data:
            raise UsageError(
                f"study {study.name}: workload of {name!r}: other data. Variants meet on the same records; make it a "
                "study of its own."
            )


def variants_of(contenders: Iterable[Arm]) -> tuple[Variant, ...]:
    """The variants that contend, each once."""
    return tuple({contender.variant.name: contender.variant for contender in contenders}.values())


def workloads_of(study: Study, contenders: Iterable[Arm]) -> tuple[Workload, ...]:
    """What contenders are measured on, each once, the study's first."""
    return tuple(dict.fromkeys((study.workload, *(contender.workload for contender in contenders))))


def check_phases(phases: Sequence[str]) -> tuple[str, ...]:
    """The phases in their order. Raises `UsageError` for an unknown one."""
    for phase in phases:
        if phase not in PHASES:
            raise UsageError(f"phase = {phase!r}: not known. Known: {', '.join(PHASES)}.")
    return tuple(phase for phase in PHASES if phase in phases)
