"""Measures a plan group by group, keeps the records, and decides when the run has what it needs.

Each trial ends as a record whatever happens to it: a lost worker, an exception in the child, Ctrl-C. The run continues
after a failed trial, and an interrupted run is resumed by leaving out what its records settle. A trial whose
surroundings were past a limit is measured again, with all that took turns with it, once the others of its replicate
have been: near enough for its pairs to have met the same machine, and late enough for the disturbance to have ended.

A run stops by precision or by time, never by significance: looking after every replicate whether the difference is
significant raises the rate of false alarms from 5 % to 21 % over 20 looks. The width of the interval says nothing of
the direction, so a run may stop as soon as it is narrow enough.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.records.metrics import primary_metric
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_count
from lorameter.run.budget import Budget, TimeLimitTooShortError
from lorameter.run.display import Display
from lorameter.run.group_runner import GroupRunner, RunParts
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import SIDES, Group, Plan
from lorameter.run.prepare import RunContext, begin_record
from lorameter.run.workers import Executor
from lorameter.stats import Comparison, VerdictRule, is_precise, relative_half_width
from lorameter.verdicts.series import compare_series, group_trials, pairs_against
from lorameter.verdicts.validity import mark_disturbed

LEAST_TO_STOP = 5
"""Fewer give a standard deviation that is itself too uncertain to stop on."""


def find_stop(plan: Plan, budget: Budget, records: Sequence[TrialRecord]) -> str | None:
    """The reason to measure no further replicate after these records, by the protocol's rule; None to go on."""
    protocol = plan.study.protocol
    if protocol.precision is not None:
        comparisons = _compare_all(plan, records)
        if is_precise(comparisons, half_width=protocol.precision, least_replicates=LEAST_TO_STOP):
            widest = max(width for one in comparisons if (width := relative_half_width(one)) is not None)
            replicates = len({record.replicate for record in records})
            return (
                f"every interval is within ±{100 * widest:.2g} % after {format_count(replicates, 'replicate')}, and "
                f"±{100 * protocol.precision:.2g} % were asked for"
            )
    if budget.longest_s is not None and budget.longest_s > budget.left_s:
        return f"another replicate would end after the limit of {protocol.max_minutes:g} minutes"
    return None


def _compare_all(plan: Plan, records: Sequence[TrialRecord]) -> list[Comparison]:
    """Every series against the reference, the control included, in the primary metric of each phase."""
    reference, own = plan.study.reference, bool(plan.own_workloads)
    metrics = [primary_metric(phase, own_workloads=own) for phase in plan.phases]  # type: ignore[arg-type]
    if not any(record.side for record in records):
        groups = group_trials(records)
        if (reference, "variant") not in groups:
            return []
        effects = [pairs_against(groups, reference, metric) for metric in metrics]
        return [pair.compare(VerdictRule()) for pairs in effects for pair in pairs.values()]
    bases = group_trials(records, "base")
    pairs = [
        (bases[name, "variant"], series)
        for side in SIDES
        for (name, role), series in group_trials(records, side).items()
        if (name, "variant") in bases and (side, role) != ("base", "variant")
    ]
    comparisons = [compare_series(base, series, metric) for base, series in pairs for metric in metrics]
    return [comparison for comparison in comparisons if comparison is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The result of a plan: the records of all trials of the run, and why it ended early."""

    records: tuple[TrialRecord, ...]
    stopped: str | None = None
    interrupted: bool = False
    """Whether the user stopped it."""


def run_plan(
    plan: Plan,
    executors: Mapping[str, Executor],
    context: RunContext,
    *,
    save: Callable[[TrialRecord], None],
    listener: Display,
    budget: Budget | None = None,
    earlier: Sequence[TrialRecord] = (),
    stops: InterruptHandler | None = None,
) -> Measured:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended.

    On KeyboardInterrupt the trials under way are recorded as `interrupted`, those that never began as `not_run`;
    `stops` raises it while a group is measured, and not while its records are saved. Of a limit that turns out to be
    too short for one replicate there are no records.

    Replicates that `find_stop` makes needless leave no record. `earlier` are the records of a run that is resumed: what
    they settle is not measured again.
    """
    budget = budget or Budget()
    parts = RunParts(plan=plan, executors=executors, context=context, save=save, display=listener, budget=budget)
    run = _PlanRun(parts, earlier, stops or InterruptHandler())
    stopped, interrupted = None, False
    try:
        while run.left and stopped is None:
            run.measure_replicate()
            stopped = find_stop(plan, budget, run.records()) if run.left else None
    except TimeLimitTooShortError as error:
        if not any(record.status == "ok" for record in run.records()):
            raise
        stopped = str(error)
    except KeyboardInterrupt:
        run.give_up()
        interrupted = True
    except Exception:
        run.give_up()
        raise
    return Measured(records=run.records(), stopped=stopped, interrupted=interrupted)


class _PlanRun:
    """The groups of a plan that are left, and the records of all trials that have ended."""

    def __init__(self, parts: RunParts, earlier: Sequence[TrialRecord], stops: InterruptHandler) -> None:
        self.left = list(find_unfinished(parts.plan, earlier))
        self._parts, self._earlier, self._stops = parts, earlier, stops
        self._on_cpu = parts.context.device == "cpu"
        self._ended = {record.trial: record for record in records_outside(self.left, earlier)}
        self._untouched = {record.trial: record for record in earlier if record.trial not in self._ended}
        self._took_s: dict[Group, float] = {}

    def records(self) -> tuple[TrialRecord, ...]:
        """Records in the order of the plan, by which a run is resumed."""
        return tuple(self._ended[slot.trial] for slot in self._parts.plan.slots if slot.trial in self._ended)

    def measure_replicate(self) -> None:
        """Measure the groups of the next replicate, then those once more that were disturbed."""
        plan, budget = self._parts.plan, self._parts.budget
        planned = [group for group in self.left if group.replicate == self.left[0].replicate]
        groups = budget.open_replicate(plan, planned, on_cpu=self._on_cpu)
        self.left[: len(planned)] = groups
        disturbed = [group for group in groups if self._measure(self.left.pop(0))]
        budget.close_replicate()
        for again in range(1, plan.study.protocol.retries + 1):
            disturbed = [
                group for group in disturbed if self._took_s[group] <= budget.left_s and self._measure(group, again)
            ]

    def _measure(self, group: Group, again: int = 0) -> bool:
        """Measure a group and keep its records; whether one of its trials was disturbed. What ends it early is raised
        when its records name it."""
        budget = self._parts.budget
        ended_by: BaseException | None = None
        budget.enter(group)
        runner = GroupRunner(self._parts, group, _attempt(group, self._earlier) + again)
        begin = budget.clock()
        try:
            with self._stops.interruptible():
                runner.measure()
        except TimeLimitTooShortError:
            raise
        except KeyboardInterrupt as interrupt:
            runner.interrupt()
            ended_by = interrupt
        except Exception as defect:  # a defect of the harness must not lose what was measured
            runner.abandon(defect)
            ended_by = defect
        for record in runner.records():
            if record.settled or record.trial not in self._ended:  # an interrupted second attempt keeps the first
                self._keep(record)
        self._took_s[group] = budget.clock() - begin
        if ended_by is not None:
            raise ended_by
        return any(self._ended[slot.trial].disturbed for slot in group.slots)

    def _keep(self, record: TrialRecord) -> None:
        if not self._parts.plan.study.protocol.allow_disturbed:
            record = mark_disturbed(record, on_cpu=self._on_cpu)
        try:
            self._parts.save(record)
        except BaseException:  # nothing more can be saved
            self.left.clear()
            raise
        self._ended[record.trial] = record
        self._parts.display.trial_ended(record)

    def give_up(self) -> None:
        """A record for each trial that is left: what it had when the run was interrupted, else `not_run`."""
        for slot in (slot for group in self.left for slot in group.slots if slot.trial not in self._ended):
            if slot.trial in self._untouched:
                self._ended[slot.trial] = self._untouched[slot.trial]
            else:
                self._keep(begin_record(slot, "not_run"))


def _attempt(group: Group, earlier: Collection[TrialRecord]) -> int:
    """The number of the next measurement of a group: the interrupted one, or the one after those that ended."""
    records = [record for record in earlier if record.trial in {slot.trial for slot in group.slots}]
    last = max((record.attempt for record in records), default=0)
    return last + any(record.disturbed and record.attempt == last for record in records)


def find_unfinished(plan: Plan, earlier: Collection[TrialRecord], *, whole: bool = False) -> tuple[Group, ...]:
    """The groups that are to be measured, for the first time or again: those with a trial that has not ended, or that
    was disturbed, however often. Trials of one group took turns and are paired, so they are measured again
    together, and count only if they are of one attempt. Replicates on several sites are paired within a site: all
    groups of one that was spread, or will be (`whole`), are measured again. What there was no time for is left out."""
    settled = {
        record.trial: (record.attempt, record.site) for record in earlier if record.settled and not record.disturbed
    }

    def is_settled(group: Group) -> bool:
        attempts = {settled.get(slot.trial) for slot in group.slots}
        return None not in attempts and len(attempts) == 1

    left = {group for group in plan.groups if not is_settled(group)} - set(_skipped_groups(plan, earlier))
    begun = {record.replicate for record in earlier if whole or record.site}
    again = {group.replicate for group in left} & begun
    again |= _replicates_of_two_sites(earlier)
    return tuple(group for group in plan.groups if group in left or group.replicate in again)


def _skipped_groups(plan: Plan, earlier: Collection[TrialRecord]) -> list[Group]:
    """Isolated trials that the time limit has dropped: they have no record, and later groups have. Where some
    were left out, those of the interrupted replicate are as well."""
    recorded, begun = {record.trial for record in earlier}, {record.replicate for record in earlier}
    groups = [] if plan.study.protocol.max_minutes is None else plan.groups
    known = [any(slot.trial in recorded for slot in group.slots) for group in groups]
    last = max((number for number, has in enumerate(known) if has), default=-1)
    alone = [number for number, group in enumerate(groups) if not known[number] and not group.turns]
    some = any(number < last for number in alone)
    return [groups[number] for number in alone if some and groups[number].replicate in begun]


def _replicates_of_two_sites(records: Collection[TrialRecord]) -> set[int]:
    """Replicates with trials of more than one site: the first was lost, and the run ended before the other's end."""
    sites: dict[int, set[str]] = {}
    for record in records:
        sites.setdefault(record.replicate, set()).add(record.site)
    return {replicate for replicate, names in sites.items() if len(names) > 1}


def records_outside(groups: Iterable[Group], earlier: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The records of trials that are in none of the groups to be measured."""
    pending = {slot.trial for group in groups for slot in group.slots}
    return [record for record in earlier if record.trial not in pending]
