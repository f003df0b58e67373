"""An A/B: base and candidate measured in one job, their live processes taking turns.

Two runs of different times share nothing but the machine, and what the machine did in between is in their ratio (37 %
on a noisy one). Here a base and a candidate process of each replicate stand side by side, one computing while the
other waits on a pipe, so that whatever slows the machine slows both (2 %). The base is measured twice: what the
harness says of the base against itself is what it would say of no difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorameter.errors import HIDDEN, UsageError
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.models.catalogue import RANDOM_PREFIX
from lorameter.records import codec, fileio
from lorameter.records.record import Interleaving, Notice, Side
from lorameter.records.store import Run
from lorameter.records.units import format_bytes
from lorameter.run.display import Display
from lorameter.run.feasibility import check_feasible
from lorameter.run.forecast import most_of, together_bytes
from lorameter.run.interleaving import fits
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.measure import ArmExecutor, executor_of, measure
from lorameter.run.memory_probe import REHEARSED
from lorameter.run.plan import CONTROL_SUFFIX, Arm, Plan, make_plan, sides_of
from lorameter.run.resume import INJECTED, PRESENT, check_place, is_calibration, of_commands
from lorameter.run.sites.placement import Placement
from lorameter.run.sites.sides import write_sides
from lorameter.run.workers import open_executor
from lorameter.run.workers.environment import Host, restore_requirements
from lorameter.run.workers.script_sandbox import check_side
from lorameter.run.workers.sides import OpenSide, open_side
from lorameter.studies.data_source import make_absolute
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.verdicts.comparison_input import differences

SIDES: tuple[Side, ...] = ("base", "candidate")
DEFAULT_PHASES = ("train", "generate")
"""A cold start is mostly the imports of either side and takes seconds a trial, so it is measured when asked for."""


def plan_ab(
    study: Study,
    machine: Machine,
    *,
    free_bytes: int | None,
    select: Sequence[str] = (),
    phases: Sequence[str] = DEFAULT_PHASES,
    slowdown_rows: int = 0,
    command: str = "",
    runs: Path | None = None,
) -> tuple[Plan, tuple[Notice, ...]]:
    """Base, candidate and the base once more, for each variant in each replicate, in an order shuffled by the seed.

    Args:
        study: what to measure on either side.
        machine: where.
        free_bytes: memory that is free there now; None where it cannot be known.
        select: names of variants; empty for all. The reference carries the control, or the first that is selected.
        phases: "train", "generate", "cold"; training always runs.
        slowdown_rows: extra work in the candidate's adapters (`trial.building.injection`); 0 in an honest A/B.
        command: the candidate's, where two scripts are compared.
        runs: folder of earlier runs, whose measured peaks say what fits together.

    Raises:
        UsageError: an unknown variant or phase, or a study that this machine cannot run.
    """
    if slowdown_rows and study.of_scripts:
        raise UsageError(
            f"study {study.name}: extra work goes into adapters of lorameter's own, and a script has none of them."
        )
    if study.own_workloads:
        raise UsageError(
            f"study {study.name}: its variants differ in what they are trained on, and an A/B compares two sides of "
            f"one variant on one workload. Measure it with `lorameter run {study.name}`."
        )
    study = study if study.of_scripts else _locate(study)
    variants = [study.variant(name) for name in dict.fromkeys(select)] or list(study.variants)
    arms = sides_of(study, variants, slowdown_rows=slowdown_rows, command=command)
    notices = check_feasible(study, machine, arms, free_bytes=free_bytes)
    level, why, provisional = _level(arms, study, machine, free_bytes, runs)
    plan = make_plan(study, arms=arms, phases=phases, interleaving=level, why=why, provisional=provisional)
    return plan, notices


def measure_ab(
    plan: Plan,
    *,
    base: str,
    candidate: str,
    repository: Path,
    cache: Path,
    runs: Path,
    display: Display,
    notices: tuple[Notice, ...] = (),
    policy: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> Run:
    """Make both sides ready, measure, and take them down.

    Args:
        plan: from `plan_ab`.
        base: a revision, an interpreter or requirements (`lorameter.run.workers.sides`).
        candidate: the same.
        repository: a folder in the repository whose revisions are meant.
        cache: where environments of requirements are kept.
        runs: where the run is written.
        display: shows what is going on.
        notices: what was known before.
        policy: what it will be judged by, as JSON data; the manifest keeps it.
        placement: on which sites; each has both sides.

    Raises:
        UsageError: a side that cannot be had, or that a command leaves no room for.
        InvalidRunError: a side whose worker does not start, or speaks another schema.
    """
    specs: dict[Side, str] = {"base": base, "candidate": candidate}
    with _open_sides(specs, repository, cache, placement) as sides:
        if plan.study.of_scripts and any(side.kind != "revision" for side in sides.values()):
            for arm in plan.arms:
                check_side(arm.variant)
        arm_executors: list[ArmExecutor] = []
        for name, side in sides.items():
            about = {"spec": side.spec, "kind": side.kind, "label": side.label}
            rows = {slot.arm.slowdown_rows for slot in plan.slots if slot.side == name}
            kind = executor_of(plan.study)
            arm_executors += executors_of(name, side.host, side.declared, about | {INJECTED: max(rows)}, kind)
        return measure(
            plan,
            runs=runs,
            display=display,
            notices=notices,
            arm_executors=arm_executors,
            policy=policy,
            placement=placement,
        )


def executors_of_commands(plan: Plan) -> list[ArmExecutor]:
    """The sides of an A/B of two commands: nothing but the command differs between them."""
    arm_executors: list[ArmExecutor] = []
    for name in SIDES:
        command = next(one.variant.command for one in plan.arms if one.side == name)
        about = {"spec": command, "kind": SIDE, "label": command, INJECTED: 0}
        arm_executors += executors_of(name, None, (), about, executor_of(plan.study))
    return arm_executors


def resume_ab(
    run: Run, plan: Plan, *, repository: Path, cache: Path, display: Display, placement: Placement | None = None
) -> Run:
    """Resume an interrupted A/B: its sides are put up again as they were, and only what is missing is measured.

    Args:
        run: from `lorameter.run.resume.read_broken_off`.
        plan: its own.
        repository: a folder in the repository whose revisions it compares.
        cache: where environments of requirements are kept.
        display: shows what is going on.
        placement: on which sites.

    Raises:
        UsageError: another machine, a side that cannot be had any more, takes a credential that is not kept, or is
            another now.
        InvalidRunError: a side whose worker does not start.
    """
    before, run_id = run.manifest.sides, run.manifest.run
    measure_rest = partial(measure, plan, runs=run.path.parent, display=display, resume=run_id, placement=placement)
    if of_commands(run.manifest) or is_calibration(run.manifest):
        if of_commands(run.manifest):
            arm_executors = executors_of_commands(plan)
        elif placement is not None and placement.is_remote:
            raise UsageError(f"run {run_id} is a calibration, of the machine that it is started on. Use --on here.")
        else:
            arm_executors = [arm for name in SIDES for arm in executors_of(name, Host(), (), before[name])]
        check_place(run, arm_executors[0].executor.facts())
        return measure_rest(arm_executors=arm_executors)
    specs = {name: _restore_spec(f"run {run_id}, {name}", before[name]) for name in SIDES}
    with contextlib.ExitStack() as stack:
        try:
            sides = stack.enter_context(_open_sides(specs, repository, cache, placement))
        except UsageError as error:
            lost = [name for name in SIDES if HIDDEN in before[name]["spec"]]
            if not lost:
                raise
            raise UsageError(
                f"{error} The record of run {run_id} leaves out the user in the address of its "
                f"{' and '.join(lost)}: put it into ~/.netrc or pip's configuration, or measure a new A/B."
            ) from None
        kind, arm_executors = executor_of(plan.study), []
        for name, side in sides.items():
            arm_executors += executors_of(name, side.host, side.declared, {**before[name], "spec": side.spec}, kind)
        if placement is None or not placement.is_spread:  # else the driver compares what the jobs record of their sides
            _check_same(run, {arm.name: arm.executor.facts() for arm in arm_executors if arm.name == arm.side})
        return measure_rest(arm_executors=arm_executors)


@contextlib.contextmanager
def _open_sides(
    specs: Mapping[Side, str], repository: Path, cache: Path, placement: Placement | None
) -> Iterator[dict[Side, OpenSide]]:
    """Both sides, made ready; taken down at the end, whatever that is. Jobs open them for themselves."""
    if placement is not None and placement.is_spread:
        yield write_sides(specs, repository, placement.said, local=not placement.is_remote)
        return
    with InterruptHandler() as stops, contextlib.ExitStack() as stack:
        sides: dict[Side, OpenSide] = {}
        for name, spec in specs.items():
            with stops.interruptible():
                sides[name] = stack.enter_context(open_side(spec, repository=repository, cache=cache))
        yield sides


def _restore_spec(whose: str, side: Mapping[str, Any]) -> str:
    """The word that names the same side again; a branch may have moved since, its commit has not.

    Raises `UsageError` for one that cannot be named without a credential."""
    if side["kind"] == "revision":
        return str(side["facts"]["git"]["commit"])
    return restore_requirements(whose, side["spec"]) if side["kind"] == "requirements" else str(side["spec"])


def _check_same(run: Run, facts: Mapping[str, MachineFacts]) -> None:
    """Raises `UsageError` where a side, or the machine, is not what it was; `facts` are by side."""
    for name in SIDES:
        _check_unchanged(run, name, facts[name].host or {})
    check_place(run, facts["base"])


def _check_unchanged(run: Run, name: Side, now: Mapping[str, Any]) -> None:
    """Raises `UsageError` where a side is not what it was: trials of one run are compared without asking."""
    side = run.manifest.sides[name]
    fields = ("python", "libraries", "cuda", "packages", *(("git",) if side["kind"] == "revision" else ()))
    was, found = ({field: facts.get(field) for field in fields} for facts in (side["facts"], codec.to_json(now)))
    if was != found:
        said = "; ".join(f"{one.field}: {one.base!r} then, {one.candidate!r} now" for one in differences(was, found))
        raise UsageError(
            f"run {run.manifest.run}: it cannot be resumed, because its {name} would be of two kinds: {said}. "
            "Restore what it was, or measure a new A/B."
        )


def _locate(study: Study) -> Study:
    """The study with absolute paths: a relative one would be another in the worktree that a revision runs in."""
    workload = study.workload
    prefix = RANDOM_PREFIX if workload.model.startswith(RANDOM_PREFIX) else ""
    model = Path(workload.model.removeprefix(prefix))
    if fileio.is_there(model):
        workload = dataclasses.replace(workload, model=f"{prefix}{model.absolute()}")
    workload = dataclasses.replace(workload, data=make_absolute(workload.data))
    return dataclasses.replace(study, workload=workload)


def executors_of(
    side: Side,
    host: Host | None,
    declared: tuple[str, ...],
    about: Mapping[str, Any],
    kind: str | None = None,
) -> list[ArmExecutor]:
    """Where one side is measured; the base has a second executor for its control (see `ArmExecutor` for the reason)."""
    names = [side, CONTROL_SUFFIX] if side == "base" else [side]
    return [
        ArmExecutor(
            name=name,
            side=side,
            executor=open_executor(kind, host=host, label=name),
            host=host or Host(),
            declared=declared,
            about=about,
        )
        for name in names
    ]


def executors_of_present(slowdown_rows: int) -> list[ArmExecutor]:
    """Both sides of a calibration: the present interpreter, and the same with extra work in the adapters."""
    same = {"spec": "", "kind": PRESENT, "label": "the present interpreter", INJECTED: 0}
    slowed = same | {"label": f"the same with {slowdown_rows} rows of extra work", INJECTED: slowdown_rows}
    return [*executors_of("base", Host(), (), same), *executors_of("candidate", Host(), (), slowed)]


def _level(
    arms: Sequence[Arm], study: Study, machine: Machine, free: int | None, runs: Path | None
) -> tuple[Interleaving, str, bool]:
    """Lockstep if three live processes of the largest variant fit; and whether a rehearsal is to show that."""
    variants = {one.variant.id: one.variant for one in arms}.values()
    needed = most_of(together_bytes([variant] * 3, study.workload, machine, runs) for variant in variants)
    if free is None:
        return "replicates", "how much memory is free cannot be known", False
    if needed is None and study.of_scripts:
        return "lockstep", REHEARSED, True
    if needed is None:
        return "replicates", "how much memory three live processes need cannot be known", False
    sizes = f"three live processes need about {format_bytes(needed)} of {format_bytes(free)} free"
    return ("lockstep" if fits(needed, free) else "replicates"), sizes, False
