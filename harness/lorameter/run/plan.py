"""The plan of a run: every trial in the order of measurement, made before anything runs.

An `Arm` is one unit of a comparison: a variant on a workload, as itself or as the control, and in an A/B on one side.
The drift of a machine (heat, other work) is slower than a replicate and faster than a run. So each replicate contains
all arms once, in an order shuffled by a recorded seed: drift affects all arms alike, and the trials of a replicate are
paired. The reference is measured twice under two names (the A/A control), which shows the result of comparing identical
code.

A `Group` contains the trials that are live at the same time. With `replicates` it is one process with one trial; with
`lockstep` it has a process for each trial and with `shared-base` one process for all trials, and their steps take
turns. Measurements that need a separate process (memory peaks, a merged adapter on a shared base) are made by isolated
trials of the same replicate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lorameter.errors import UsageError, redact, require
from lorameter.measurements.metrics import MEASUREMENTS, PHASES, Measure
from lorameter.records import codec
from lorameter.records.record import Interleaving, Role, Side, TrialRecord
from lorameter.studies.form import AnyVariant
from lorameter.studies.protocol import MAX_ROUNDS, Protocol
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

T = TypeVar("T")
CONTROL_SUFFIX = "control"
AB_PHASES = ("train", "generate")
"""The default phases of an A/B: a cold start consists mostly of imports, and takes seconds a trial."""
SideKind = Literal["revision", "interpreter", "requirements", "command", "present"]
PRESENT: SideKind = "present"
"""The interpreter that runs the harness, as both sides of a calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideSpec:
    """One side of an A/B, given by a word that has the same meaning in every job."""

    kind: SideKind
    spec: str = ""
    """A commit, the path of an interpreter, requirements, or a command."""
    label: str
    """Label for tables and messages."""
    slowdown_rows: int = 0
    """Extra work of the candidate (`Arm.slowdown_rows`)."""

    def to_json(self) -> dict[str, Any]:
        """The side for the manifest, without possible credentials."""
        return dataclasses.asdict(self) | {"spec": redact(self.spec), "label": redact(self.label)}


Sides = Mapping[Side, SideSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A variant on a workload and a side; it has one trial in each replicate."""

    variant: AnyVariant
    side: Side = ""
    role: Role = "variant"
    workload: Workload
    slowdown_rows: int = 0
    """Extra work in every adapted layer (`lorameter.trial.building.build`); 0 in a real measurement."""

    @property
    def name(self) -> str:
        """A name that is unique in its run: the variant, its side, and whether it is the control."""
        parts = (self.variant.name, self.side, CONTROL_SUFFIX if self.role == "control" else "")
        return "-".join(part for part in parts if part)

    @property
    def built(self) -> Variant:
        """The variant, if lorameter builds it."""
        assert isinstance(self.variant, Variant)
        return self.variant

    def rounds_after_turns(self, protocol: Protocol) -> int:
        """Untimed rounds, each as long as a turn, for the rest of the epochs after the turns; fewer if the data has
        fewer sequences than requested."""
        if not protocol.epochs:
            return 0
        per_step = self.workload.batch_size * self.built.gradient_accumulation
        steps = protocol.all_steps(self.workload.train_sequences, per_step) - protocol.total_steps
        return math.ceil(steps / protocol.steps_per_turn)


def build_arms(study: Study, select: Sequence[str] = (), sides: Sides | None = None) -> tuple[Arm, ...]:
    """The variants to measure and the control; the reference is always included, except in an A/B.

    Args:
        study: the study with its variants and their workloads.
        select: variant names; empty for all variants.
        sides: sides of an A/B (`arms_on_sides`).

    Raises:
        UsageError: a variant is unknown, or two variants are the same.
    """
    if sides:
        return arms_on_sides(study, select, sides)
    own = study.own_workloads
    study.check_distinct()
    chosen = {study.variant(name).name for name in select} or {variant.name for variant in study.variants}
    chosen.add(study.reference)

    def arm(variant: AnyVariant, role: Role = "variant") -> Arm:
        return Arm(variant=variant, role=role, workload=own.get(variant.name, study.workload))

    measured = [arm(variant) for variant in study.variants if variant.name in chosen]
    return (*measured, arm(study.variant(study.reference), "control"))


def arms_on_sides(study: Study, select: Sequence[str], sides: Sides) -> tuple[Arm, ...]:
    """Each variant on both sides of an A/B, and the reference, or the first selected variant, once more on the base.
    Raises `UsageError` for an unknown variant."""
    variants = [study.variant(name) for name in dict.fromkeys(select)] or list(study.variants)
    controlled = next((variant for variant in variants if variant.name == study.reference), variants[0])
    candidate, arms = sides["candidate"], list[Arm]()
    for variant in variants:
        base = Arm(variant=variant, side="base", workload=study.workload)
        other = variant.on_side(candidate.kind, candidate.spec)
        arms += [
            base,
            dataclasses.replace(base, side="candidate", variant=other, slowdown_rows=candidate.slowdown_rows),
        ]
        arms += [dataclasses.replace(base, role="control")] if variant is controlled else []
    return tuple(arms)


def list_variants(arms: Iterable[Arm]) -> tuple[AnyVariant, ...]:
    """The variants that are compared, without repetition."""
    return tuple({arm.variant.name: arm.variant for arm in arms}.values())


def list_workloads(study: Study, arms: Iterable[Arm]) -> tuple[Workload, ...]:
    """The workloads of arms without repetition, the study's first."""
    return tuple(dict.fromkeys((study.workload, *(arm.workload for arm in arms))))


Rounds = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One trial in the plan."""

    trial: str
    arm: Arm
    replicate: int
    position: int
    seed: int
    interleaving: Interleaving
    measures: tuple[Measure, ...]
    executor: str = ""
    """Name of the executor that hosts the trial; a run without sides has one executor, unless its variants differ in
    threads."""

    @property
    def variant(self) -> AnyVariant:
        """The variant that it measures."""
        return self.arm.variant

    @property
    def workload(self) -> Workload:
        """Its workload."""
        return self.arm.workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that are live at the same time: `launches` are the processes, each with its trials.

    `rounds` are the orders of turns by the field of the protocol that gives their number (`Measurement.rounds`): each
    entry is one round over all trials of the group, by trial id.
    """

    replicate: int
    launches: tuple[tuple[Slot, ...], ...]
    rounds: Mapping[str, Rounds] = field(default_factory=dict, hash=False)
    isolated: bool = False
    """Whether its only trial measures what needs a separate process."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All trials of the group."""
        return tuple(slot for launch in self.launches for slot in launch)

    @property
    def turns(self) -> Rounds:
        """The rounds of timed steps; empty for an isolated trial."""
        return self.rounds.get("turns", ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The trials of one run, in order."""

    study: Study
    arms: tuple[Arm, ...]
    phases: tuple[str, ...]
    interleaving: Interleaving
    why: str
    """The reason for this interleaving."""
    groups: tuple[Group, ...]
    provisional: bool = False
    """Whether a rehearsal of its scripts still has to determine the interleaving (`lorameter.run.build_plan`)."""
    failed: Mapping[str, TrialRecord] = field(default_factory=dict)
    """Records of failed rehearsals, by arm: the trials of these arms are not started."""
    sides: Sides = field(default_factory=dict)
    """Base and candidate of an A/B."""

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """The workloads without repetition, the study's first."""
        return list_workloads(self.study, self.arms)

    @property
    def own_workloads(self) -> dict[str, Workload]:
        """Workloads of variants that do not use the study's, by name."""
        workloads = {arm.variant.name: arm.workload for arm in self.arms}
        return {name: workload for name, workload in workloads.items() if workload != self.study.workload}

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All trials in order."""
        return tuple(slot for group in self.groups for slot in group.slots)


def make_plan(
    study: Study,
    *,
    arms: Sequence[Arm] = (),
    phases: Sequence[str] = PHASES,
    interleaving: Interleaving = "replicates",
    why: str = "requested",
    provisional: bool = False,
    sides: Sides | None = None,
) -> Plan:
    """Make a plan of replicates × arms, shuffled inside each replicate by `protocol.seed`.

    Args:
        study: the study to measure.
        arms: default: all variants of the study and its control. In an A/B (`arms_on_sides`) the sides of each variant
            are compared with each other.
        phases: "train", "generate", "cold"; variants that train are always trained, since the others need the adapter.
        interleaving: the level of interleaving, chosen by `lorameter.run.build_plan`.
        why: the reason for the level, for the report.
        provisional: whether a rehearsal determines the level.
        sides: sides of the A/B to which the arms belong.

    Raises:
        UsageError: a phase is unknown or cannot be measured, or the plan has too many rounds.
    """
    arms = tuple(arms) or build_arms(study)
    for phase in phases:
        require(phase in PHASES, f"phase = {phase!r}: not known. Known: {', '.join(PHASES)}.")
    checked = tuple(phase for phase in PHASES if phase in phases)
    require(
        checked and {*checked} <= {*study.phases},
        f"study {study.name}: phases {', '.join(checked)}: its variants can be measured in {', '.join(study.phases)}. "
        "Of commands, of several ranks, and of methods other than LoRA in its short form, training is measured and "
        "nothing else. Leave the phases out.",
    )
    protocol = study.protocol
    rounds = sum(getattr(protocol, field) for field in {one.rounds for one in MEASUREMENTS.values()} if field)
    if (total := len(arms) * protocol.replicates * rounds) > MAX_ROUNDS:  # it would take minutes to make and to read
        raise UsageError(
            f"study {study.name}: {protocol.replicates} replicates of {len(arms)} trials with {rounds} turns and "
            f"requests each are {total} in all, and a plan holds {MAX_ROUNDS}. Use fewer of any of them."
        )
    cold = protocol.cold_replicates or protocol.replicates
    together, alone = choose_measures(study, interleaving, checked)
    executors = {arm: executor_name(arm, arms) for arm in arms}
    shuffler = random.Random(protocol.seed)
    positions = itertools.count()
    groups: list[Group] = []

    def slot(arm: Arm, replicate: int, level: Interleaving, measures: tuple[Measure, ...]) -> Slot:
        return Slot(
            trial=f"r{replicate}-{arm.name}" + ("-isolated" if measures == alone else ""),
            arm=arm,
            replicate=replicate,
            position=next(positions),
            seed=protocol.seed + replicate,
            interleaving=level,
            measures=measures,
            executor=executors[arm],
        )

    # Arms that are compared with each other: all of a study, or the sides of a variant in an A/B.
    panels = [list(panel) for _, panel in itertools.groupby(arms, lambda arm: arm.side and arm.variant.name)]
    isolates_peaks_only = set(alone) == {"peaks"}
    isolated = [one for one in arms if one.role == "variant" or study.claims_peaks or not isolates_peaks_only]
    for replicate in range(protocol.replicates):
        live_measures = tuple(one for one in together if one != "cold" or replicate < cold)
        for panel in _shuffle(panels, shuffler) if arms[0].side else panels:
            live = [slot(one, replicate, interleaving, live_measures) for one in _shuffle(panel, shuffler)]
            groups += _group_slots(live, study, shuffler)
            if not alone or (isolates_peaks_only and replicate >= protocol.peak_replicates):
                continue
            for one in _shuffle([one for one in panel if one in isolated], shuffler):
                single = slot(one, replicate, "replicates", alone)
                # A single trial has only one order, so the order of the others does not depend on its rounds.
                rounds = _draw_rounds([single], study, random.Random())
                groups.append(Group(replicate=replicate, launches=((single,),), rounds=rounds, isolated=True))
    return Plan(
        study=study,
        arms=arms,
        phases=checked,
        interleaving=interleaving,
        why=why,
        groups=tuple(groups),
        provisional=provisional,
        sides=sides or {},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """The data from which a plan can be made again, by another process or later."""

    study: dict[str, Any]
    phases: tuple[str, ...]
    selection: tuple[str, ...]
    interleaving: Interleaving
    why: str
    order: tuple[str, ...]
    """All trials of the whole plan."""
    trials: tuple[str, ...]
    """Trials that remain to be measured."""
    sides: dict[Side, SideSpec] = field(default_factory=dict)


def read_plan(written: PlanSpec) -> Plan:
    """The plan, with the groups that remain to be measured. Raises `UsageError` if this version plans other trials."""
    study = codec.from_json(Study, written.study, "study of the plan")
    arms = build_arms(study, written.selection, written.sides)
    plan = make_plan(
        study, arms=arms, phases=written.phases, interleaving=written.interleaving, why=written.why,
        sides=written.sides,
    )  # fmt: skip
    order, trials = set(written.order), set(written.trials)
    # The order of a resumed run no longer has the replicates that were not needed.
    groups = [group for group in plan.groups if order.issuperset(slot.trial for slot in group.slots)]
    require(
        tuple(slot.trial for group in groups for slot in group.slots) == written.order,
        f"study {study.name}: this version of lorameter plans other trials than the one that began the run. Use "
        "that version, or measure a new run.",
    )
    remaining = (group for group in groups if trials.issuperset(slot.trial for slot in group.slots))
    return dataclasses.replace(plan, groups=tuple(remaining))


def choose_measures(
    study: Study, interleaving: Interleaving, phases: Sequence[str]
) -> tuple[tuple[Measure, ...], tuple[Measure, ...]]:
    """Measures of the trials that take turns (including a cold start after they have ended), and of isolated trials."""
    declared = [MEASUREMENTS[name] for name in study.measures]
    wanted = [one for one in declared if one.phase.name in {"train", *phases} and one.applies(study)]
    if not study.supports("built"):  # each has its own process and allocator, whatever else is live
        return tuple(one.name for one in wanted), ()
    return (
        tuple(one.name for one in wanted if interleaving not in one.isolated_at),
        tuple(one.name for one in wanted if interleaving in one.isolated_at),
    )


def _shuffle(items: Sequence[T], shuffler: random.Random) -> list[T]:
    return shuffler.sample(items, len(items))


def _group_slots(slots: Sequence[Slot], study: Study, shuffler: random.Random) -> list[Group]:
    """The groups of trials that are compared with each other, by their level of interleaving. The order of turns is
    shuffled for each round."""
    level = slots[0].interleaving
    processes = [tuple(slots)] if level == "shared-base" else [(slot,) for slot in slots]
    return [
        Group(
            replicate=slots[0].replicate,
            launches=tuple(launches),
            rounds=_draw_rounds([slot for launch in launches for slot in launch], study, shuffler),
        )
        for launches in ([[one] for one in processes] if level == "replicates" else [processes])
    ]


def _draw_rounds(slots: Sequence[Slot], study: Study, shuffler: random.Random) -> dict[str, Rounds]:
    """The rounds of all measurements of a group, in a random order of its trials."""
    trials = [slot.trial for slot in slots]
    fields = dict.fromkeys(MEASUREMENTS[measure].rounds for measure in slots[0].measures)
    return {
        field: tuple(tuple(_shuffle(trials, shuffler)) for _ in range(getattr(study.protocol, field)))
        for field in fields
        if field
    }


def executor_name(arm: Arm, arms: Sequence[Arm]) -> str:
    """The executor of a trial: one for all, unless arms are on sides or differ in threads, which are set at the start
    of a process. Then each compared arm has its own executor, also the control.

    Processes of one zygote share its pages, which are warm in the caches after another of them has run: with base and
    control from the same zygote, and the candidate from another, the candidate was measured 0.5 % slower on identical
    code.
    """
    if arm.side:
        return CONTROL_SUFFIX if arm.role == "control" else arm.side
    return arm.name if len({one.workload.threads for one in arms}) > 1 else ""


def measured_groups(plan: Plan, groups: Sequence[Group], skipped: Iterable[str], *, on_cpu: bool) -> tuple[Group, ...]:
    """The groups of a replicate under a time limit: without the skipped measures, and with peaks measured once per
    variant unless a claim is about them.

    Isolated trials of the first replicate measure peaks. On a CPU the peak of a process does not depend on other
    processes, so the trials that take turns measure it there, in the second replicate, since the first is profiled.
    """
    once, without = not plan.study.claims_peaks, set(skipped)
    live = once and on_cpu and plan.interleaving == "lockstep" and plan.study.protocol.replicates > 1
    measured = []
    for group in groups:
        measures: tuple[Measure, ...] = tuple(one for one in group.slots[0].measures if one not in without)
        if live and not group.isolated and group.replicate == 1 and "peaks" not in measures:
            measures = (*measures, "peaks")
        needless = group.isolated and once and measures == ("peaks",) and (live or group.replicate > 0)
        if measures and not needless:
            launches = tuple(
                tuple(dataclasses.replace(slot, measures=measures) for slot in launch) for launch in group.launches
            )
            measured.append(dataclasses.replace(group, launches=launches))
    return tuple(measured)
