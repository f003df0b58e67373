"""Builds the plan of a study on a machine: its arms, and the finest interleaving that they and the memory allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.machine.provenance import Machine
from lorameter.models.catalogue import RANDOM_PREFIX
from lorameter.records import fileio
from lorameter.records.metrics import PHASES
from lorameter.records.record import Notice
from lorameter.run.feasibility import check_feasible
from lorameter.run.forecast import largest_known, sum_known, together_bytes
from lorameter.run.interleaving import choose_interleaving
from lorameter.run.memory_probe import REHEARSED
from lorameter.run.plan import Arm, Plan, Sides, arms_of, arms_on_sides, make_plan, variants_of, workloads_of
from lorameter.run.workers.script_sandbox import check_side
from lorameter.studies.study import Study
from lorameter.studies.workload import make_absolute


def build_plan(
    study: Study,
    machine: Machine,
    *,
    free_bytes: int | None,
    select: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
    interleaving: str | None = None,
    runs: Path | None = None,
    sides: Sides | None = None,
    shown_only: bool = False,
) -> tuple[Plan, tuple[Notice, ...]]:
    """Build the plan of a study on this machine; returns it with notices.

    Args:
        study: the study to measure.
        machine: the machine that measures.
        free_bytes: memory that is free there now; None if unknown.
        select: names of variants; empty for all.
        phases: phases to measure.
        interleaving: a level to use instead of the finest possible one.
        runs: folder of earlier runs, whose measured peaks show what fits into memory together.
        sides: sides of an A/B.
        shown_only: whether the plan is only displayed: if an engine needs another device, that is then only a notice.

    Raises:
        UsageError: the plan cannot be measured.
    """
    if sides:
        study = _check_sides(study, sides)
        arms = arms_on_sides(study, select, sides)
    else:
        arms = arms_of(study, select)
    workloads = workloads_of(study, arms)
    notices = check_feasible(study, machine, arms, free_bytes=free_bytes, phases=phases, shown_only=shown_only)
    together = _together_bytes(study, arms, machine, runs)
    level, why = choose_interleaving(
        variants_of(arms),
        together_bytes=together,
        free_bytes=free_bytes,
        requested=interleaving,
        workloads=len(workloads),
        ranks=max(workload.ranks for workload in workloads),
        adapters=max(workload.adapters for workload in workloads) if "generate" in phases else 1,
        sided=bool(sides),
        one_heap=machine.device == "cpu",
    )
    provisional = study.of_scripts and interleaving is None and None is together is not free_bytes
    if provisional:
        level, why = "lockstep", REHEARSED
    plan = make_plan(study, arms=arms, phases=phases, interleaving=level, why=why, provisional=provisional, sides=sides)
    return plan, notices


def _together_bytes(study: Study, arms: Sequence[Arm], machine: Machine, runs: Path | None) -> int | None:
    """Memory of the processes that are live at the same time: those of all variants, in an A/B the three of one
    variant."""
    if arms[0].side:
        variants = {arm.variant.id: arm.variant for arm in arms}.values()
        return largest_known(
            together_bytes([variant] * 3, study.workload, machine, runs, forked=False) for variant in variants
        )
    return sum_known(
        together_bytes([arm.variant for arm in arms if arm.workload == workload], workload, machine, runs, forked=True)
        for workload in workloads_of(study, arms)
    )


def _check_sides(study: Study, sides: Sides) -> Study:
    """Refuse a study that an A/B cannot compare. Returns the study with absolute paths, because a relative path would
    differ in the worktree of a revision."""
    if sides["candidate"].slowdown_rows and study.of_scripts:
        raise UsageError(
            f"study {study.name}: extra work goes into adapters of lorameter's own, and a script has none of them."
        )
    if study.own_workloads:
        raise UsageError(
            f"study {study.name}: its variants differ in what they are trained on, and an A/B compares two sides of "
            f"one variant on one workload. Measure it with `lorameter run {study.name}`."
        )
    if study.of_scripts:
        if any(side.kind in ("interpreter", "requirements") for side in sides.values()):
            for variant in study.scripts:
                check_side(variant)
        return study
    workload = study.workload
    prefix = RANDOM_PREFIX if workload.model.startswith(RANDOM_PREFIX) else ""
    model = Path(workload.model.removeprefix(prefix))
    if fileio.is_there(model):
        workload = dataclasses.replace(workload, model=f"{prefix}{model.absolute()}")
    workload = dataclasses.replace(workload, data=make_absolute(workload.data))
    return dataclasses.replace(study, workload=workload)
