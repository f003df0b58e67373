"""Measures a plan group by group, keeps the records, and decides when the run has what it needs.

Each trial ends as a record whatever happens to it: a lost worker, an exception in the child, Ctrl-C. The run goes on
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
from lorameter.records.record import PartialRecord, TrialRecord
from lorameter.records.units import format_count
from lorameter.run.budget import Budget, Part, TimeLimitTooShortError
from lorameter.run.display import ProgressListener
from lorameter.run.group_runner import GroupRunner
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import Group, Plan
from lorameter.run.prepare import RunContext, begin_record
from lorameter.run.workers import Executor
from lorameter.stats import Comparison, VerdictRule, is_precise, relative_half_width
from lorameter.verdicts.series import compare_series, group_trials, pairs_against
from lorameter.verdicts.validity import mark_disturbed

LEAST_TO_STOP = 5
"""Fewer give a standard deviation that is itself too uncertain to stop on."""


class Stopping:
    """The protocol's stopping rule; is asked after each replicate."""

    def __init__(self, plan: Plan, budget: Budget | None = None, *, earlier: Sequence[TrialRecord] = ()) -> None:
        """`budget` is the clock of this invocation; `earlier` are records that it has not spent its time on."""
        self._plan = plan
        self._budget = budget or Budget()
        self._earlier = {record.trial for record in earlier}

    def __call__(self, records: Sequence[TrialRecord]) -> str | None:
        """The reason to stop, or None to go on."""
        protocol = self._plan.study.protocol
        replicates = len({record.replicate for record in records})
        if protocol.precision is not None:
            found = self._comparisons(records)
            if is_precise(found, half_width=protocol.precision, least_replicates=LEAST_TO_STOP):
                widest = max(width for one in found if (width := relative_half_width(one)) is not None)
                return (
                    f"every interval is within ±{100 * widest:.2g} % after "
                    f"{format_count(replicates, 'replicate')}, and ±{100 * protocol.precision:.2g} % were asked for"
                )
        minutes = protocol.max_minutes
        if minutes is None:
            return None
        if self._next_s(records) > self._budget.left_s:
            return f"another replicate would end after the limit of {minutes:g} minutes"
        return None

    def _next_s(self, records: Sequence[TrialRecord]) -> float:
        """Seconds that another replicate takes: the longest so far, or where other clocks have timed them the mean."""
        longest = self._budget.longest_s
        if longest is not None:
            return longest
        measured = len({record.replicate for record in records if record.trial not in self._earlier})
        return self._budget.spent_s / measured

    def _comparisons(self, records: Sequence[TrialRecord]) -> list[Comparison]:
        """Everything against the reference, and the reference against its twin, in the primary metric of each phase."""
        reference, own = self._plan.study.reference, bool(self._plan.own_workloads)
        metrics = [primary_metric(phase, own_workloads=own) for phase in self._plan.phases]  # type: ignore[arg-type]
        if not any(record.side for record in records):
            groups = group_trials(records)
            if (reference, "variant") not in groups:
                return []
            effects = [pairs_against(groups, reference, metric) for metric in metrics]
            return [one.compare(VerdictRule()) for found in effects for one in found.values()]
        bases, found = group_trials(records, "base"), []
        for side in sorted({record.side for record in records}):
            for (name, role), series in group_trials(records, side).items():
                key = (name, "variant")
                if key not in bases or (side == "base" and (name, role) == key):
                    continue
                for metric in metrics:
                    comparison = compare_series(bases[key], series, metric)
                    found += [comparison] if comparison is not None else []
        return found


Stop = Callable[[Sequence[TrialRecord]], str | None]
"""Called between replicates; returns the reason to end the run, or None to continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The result of a plan: the records of all trials of the run, and why it ended early."""

    records: tuple[TrialRecord, ...]
    stopped: str | None = None
    interrupted: bool = False
    """Whether the user stopped it."""
    skipped: frozenset[Part] = frozenset()
    """Parts that there was no time for."""
    needed_s: float = 0.0
    """Seconds that the sought replicates take with all parts; 0 where unknown."""
    training_s: float = 0.0
    """Seconds that the sought replicates take of training, where fewer fitted."""


def run_plan(
    plan: Plan,
    executors: Mapping[str, Executor],
    context: RunContext,
    *,
    save: Callable[[TrialRecord], None],
    listener: ProgressListener,
    stop: Stop = lambda records: None,
    budget: Budget | None = None,
    earlier: Sequence[TrialRecord] = (),
    stops: InterruptHandler | None = None,
) -> Measured:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended.

    On KeyboardInterrupt the trials under way are recorded as `interrupted`, those that never began as `not_run`;
    `stops` raises it while a group is measured, and not while its records are saved. Of a limit that turns out to be
    too short for one replicate there are no records.

    Replicates that `stop` makes needless leave no record. `earlier` are the records of a run that is resumed: what
    they settle is not measured again.
    """
    budget = budget or Budget()
    run = _PlanRun(plan, executors, context, save, listener, budget, earlier, stops or InterruptHandler())
    stopped, interrupted = None, False
    try:
        while run.left and stopped is None:
            run.measure_replicate()
            stopped = stop(run.records()) if run.left else None
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
    return Measured(
        records=run.records(), stopped=stopped, interrupted=interrupted, skipped=frozenset(budget.skipped),
        needed_s=budget.needed_s, training_s=budget.training_s,
    )  # fmt: skip


class _PlanRun:
    """The groups of a plan that are left, and the records of all trials that have ended."""

    def __init__(
        self, plan: Plan, executors: Mapping[str, Executor], context: RunContext, save: Callable[[TrialRecord], None],
        listener: ProgressListener, budget: Budget, earlier: Sequence[TrialRecord], stops: InterruptHandler,
    ) -> None:  # fmt: skip
        self.left = list(find_unfinished(plan, earlier))
        self._plan, self._executors, self._context, self._save = plan, executors, context, save
        self._listener, self._budget, self._earlier, self._stops = listener, budget, earlier, stops
        self._on_cpu = context.device == "cpu"
        self._ended = {record.trial: record for record in records_outside(self.left, earlier)}
        self._untouched = {record.trial: record for record in earlier if record.trial not in self._ended}
        self._imports: dict[tuple[int, str], PartialRecord] = {}
        self._took_s: dict[Group, float] = {}

    def records(self) -> tuple[TrialRecord, ...]:
        """In the plan's order, in whatever order the trials were measured: a run is resumed by it."""
        return tuple(self._ended[slot.trial] for slot in self._plan.slots if slot.trial in self._ended)

    def measure_replicate(self) -> None:
        """Measure the groups of the next replicate, then those once more that were disturbed."""
        planned = [group for group in self.left if group.replicate == self.left[0].replicate]
        groups = self._budget.open_replicate(self._plan, planned, on_cpu=self._on_cpu)
        self.left[: len(planned)] = groups
        disturbed = [group for group in groups if self._measure(self.left.pop(0))]
        self._budget.close_replicate()
        for again in range(1, self._plan.study.protocol.retries + 1):
            disturbed = [
                group
                for group in disturbed
                if self._took_s[group] <= self._budget.left_s and self._measure(group, again)
            ]

    def _measure(self, group: Group, again: int = 0) -> bool:
        """Measure a group and keep its records; whether one of its trials was disturbed. What ends it early is raised
        when its records name it."""
        budget = self._budget
        ended_by: BaseException | None = None
        budget.enter(group)
        runner = GroupRunner(
            self._plan, group, self._executors, self._context, self._listener, self._save, budget,
            _attempt(group, self._earlier) + again, self._imports,
        )  # fmt: skip
        begin = budget.clock()
        try:
            with self._stops.interruptible(worth_waiting=True):
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
        if not self._plan.study.protocol.allow_disturbed:
            record = mark_disturbed(record, on_cpu=self._on_cpu)
        try:
            self._save(record)
        except BaseException:  # nothing more can be saved
            self.left.clear()
            raise
        self._ended[record.trial] = record
        self._listener.trial_ended(record)

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

    left = {group for group in plan.groups if not is_settled(group)} - set(_skipped(plan, earlier))
    begun = {record.replicate for record in earlier if whole or record.site}
    again = {group.replicate for group in left} & begun
    again |= _of_two_sites(earlier)
    return tuple(group for group in plan.groups if group in left or group.replicate in again)


def _skipped(plan: Plan, earlier: Collection[TrialRecord]) -> list[Group]:
    """Isolated trials that minutes did not suffice for: they have no record, and what comes after them has. Where some
    were left out, those of the interrupted replicate are as well."""
    recorded, begun = {record.trial for record in earlier}, {record.replicate for record in earlier}
    groups = [] if plan.study.protocol.max_minutes is None else plan.groups
    known = [any(slot.trial in recorded for slot in group.slots) for group in groups]
    last = max((number for number, has in enumerate(known) if has), default=-1)
    alone = [number for number, group in enumerate(groups) if not known[number] and not group.turns]
    some = any(number < last for number in alone)
    return [groups[number] for number in alone if some and groups[number].replicate in begun]


def _of_two_sites(records: Collection[TrialRecord]) -> set[int]:
    """Replicates with trials of more than one site: the first was lost, and the run ended before the other's end."""
    sites: dict[int, set[str]] = {}
    for record in records:
        sites.setdefault(record.replicate, set()).add(record.site)
    return {replicate for replicate, found in sites.items() if len(found) > 1}


def records_outside(groups: Iterable[Group], earlier: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The records of trials that are in none of the groups to be measured."""
    pending = {slot.trial for group in groups for slot in group.slots}
    return [record for record in earlier if record.trial not in pending]
