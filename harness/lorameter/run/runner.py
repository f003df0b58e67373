"""Measures a plan group by group, stores the records, and decides when the run is complete.

Each trial ends with a record in every case: a lost worker, an exception in the child, Ctrl-C. The run continues after a
failed trial, and resuming an interrupted run skips trials whose records are final. A trial with a disturbance beyond a
limit is measured again, together with all trials that took turns with it, after the others of its replicate: soon
enough that its pairs see the same state of the machine, and late enough that the disturbance may have ended.

A run stops by precision, by time, or at a planned look if everything is decided there. Testing for significance after
every replicate at the usual level would raise the rate of false alarms from 5 % to 21 % over 20 tests; the looks have a
stricter level (`lorameter.stats.looks`). The width of an interval is independent of the direction, so a run may stop as
soon as the interval is narrow enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lorameter.measurements.metrics import primary_metric
from lorameter.records.record import SIDES, TrialRecord
from lorameter.records.units import format_count
from lorameter.run.budget import Budget, TimeLimitTooShortError
from lorameter.run.display import Display
from lorameter.run.group_runner import GroupRecords, GroupRunner, RunParts
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import Group, Plan
from lorameter.run.prepare import RunContext, begin_record
from lorameter.run.workers import Executor
from lorameter.stats import Comparison, is_precise, relative_half_width
from lorameter.stats.looks import are_decided
from lorameter.verdicts.series import Key, compare_series, group_trials, judge, pairs_against
from lorameter.verdicts.validity import mark_disturbed

MIN_TO_STOP = 5
"""With fewer replicates, the standard deviation is too uncertain to stop."""


def find_stop(
    plan: Plan, budget: Budget, records: Sequence[TrialRecord], compared: Mapping[Key, Comparison]
) -> str | None:
    """The reason to measure no further replicate, by the protocol's rule; None to continue.

    `records` are those of the replicates that have ended, and `compared` their comparisons.
    """
    protocol = plan.study.protocol
    count, looks = len({record.replicate for record in records}), protocol.looks
    if count in looks and are_decided(compared.values()):
        return (
            f"decided at look {looks.index(count) + 1} of {len(looks)}, after {count} of {protocol.replicates} "
            "replicates"
        )
    if protocol.precision is not None:
        comparisons = _compare_all(plan, records)
        if is_precise(comparisons, half_width=protocol.precision, least_replicates=MIN_TO_STOP):
            widest = max(width for comparison in comparisons if (width := relative_half_width(comparison)) is not None)
            return (
                f"every interval is within ±{100 * widest:.2g} % after {format_count(count, 'replicate')}, and "
                f"±{100 * protocol.precision:.2g} % were requested"
            )
    if budget.longest_s is not None and budget.longest_s > budget.left_s:
        return f"another replicate would end after the limit of {protocol.max_minutes:g} minutes"
    return None


def _compare_all(plan: Plan, records: Sequence[TrialRecord]) -> list[Comparison]:
    """Every series compared with the reference, including the control, in the primary metric of each phase."""
    reference, own = plan.study.reference, bool(plan.own_workloads)
    metrics = [primary_metric(phase, own_workloads=own) for phase in plan.phases]
    if not any(record.side for record in records):
        groups = group_trials(records)
        base = groups.get((reference, "variant"))
        compared = {
            (name, metric): pair
            for metric in metrics
            for (name, _), pair in pairs_against(base, groups, metric).items()
        }
        return list(judge(compared, family=1).values())
    bases = group_trials(records, "base")
    pairs = [
        (bases[name, "variant"], series)
        for side in SIDES
        for (name, role), series in group_trials(records, side).items()
        if (name, "variant") in bases and (side, role) != ("base", "variant")
    ]
    comparisons = [compare_series(base, series, metric) for base, series in pairs for metric in metrics]
    return [comparison for comparison in comparisons if comparison is not None]


def run_plan(
    plan: Plan,
    executors: Mapping[str, Executor],
    context: RunContext,
    *,
    save: Callable[[TrialRecord], None],
    display: Display,
    budget: Budget | None = None,
    earlier: Sequence[TrialRecord] = (),
    stops: InterruptHandler | None = None,
    compare: Callable[[Sequence[TrialRecord]], Mapping[Key, Comparison]] = lambda records: {},
) -> PlanRun:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended. Returns the records of all
    trials, and why the run ended early.

    On KeyboardInterrupt the running trials are recorded as `interrupted`, those that never began as `not_run`; `stops`
    raises it while a group is measured, but not while its records are saved. If the time limit is too short for one
    replicate, there are no records.

    Replicates that are unnecessary according to `find_stop` leave no record. `earlier` are the records of a resumed
    run: trials with a final record are not measured again. `compare` gives the comparisons of the replicates that have
    ended.
    """
    budget = budget or Budget()
    parts = RunParts(plan=plan, executors=executors, context=context, save=save, display=display, budget=budget)
    run = PlanRun(parts, earlier, stops or InterruptHandler())
    try:
        if earlier:  # it may have been interrupted between the end of a replicate and its look
            run.judge(compare)
        while run.remaining and run.stopped is None:
            run.measure_replicate()
            run.judge(compare)
    except TimeLimitTooShortError as error:
        if not any(record.status == "ok" for record in run.records):
            raise
        run.stopped = str(error)
    except KeyboardInterrupt:
        run.give_up()
        run.interrupted = True
    except Exception:
        run.give_up()
        raise
    return run


class PlanRun:
    """The measurement of a plan: the remaining groups, and the records of all trials that have ended."""

    def __init__(self, parts: RunParts, earlier: Sequence[TrialRecord], stops: InterruptHandler) -> None:
        self.stopped: str | None = None
        """Why it ended before all replicates were measured."""
        self.interrupted = False
        """Whether the user stopped it."""
        self.remaining = list(find_unfinished(parts.plan, earlier))
        self._parts, self._earlier, self._stops = parts, earlier, stops
        self._on_cpu = parts.context.device == "cpu"
        self._ended = {record.trial: record for record in records_outside(self.remaining, earlier)}
        self._interrupted = {record.trial: record for record in earlier if record.trial not in self._ended}
        self._took_s: dict[Group, float] = {}

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Records in plan order, which resuming requires."""
        return tuple(self._ended[slot.trial] for slot in self._parts.plan.slots if slot.trial in self._ended)

    def judge(self, compare: Callable[[Sequence[TrialRecord]], Mapping[Key, Comparison]]) -> None:
        """Compare the replicates that have ended, and find out whether others are needed."""
        unfinished = {group.replicate for group in self.remaining}
        ended = [record for record in self.records if record.replicate not in unfinished]
        compared = compare(ended)
        self._parts.display.judged(compared)
        if self.remaining:
            self.stopped = find_stop(self._parts.plan, self._parts.budget, ended, compared)

    def measure_replicate(self) -> None:
        """Measure the groups of the next replicate, then repeat the disturbed groups once."""
        plan, budget = self._parts.plan, self._parts.budget
        planned = [group for group in self.remaining if group.replicate == self.remaining[0].replicate]
        groups = budget.open_replicate(plan, planned, on_cpu=self._on_cpu)
        self.remaining[: len(planned)] = groups
        disturbed = [group for group in groups if self._measure(self.remaining.pop(0))]
        budget.close_replicate(plan.study.protocol.steps_per_turn)
        for again in range(1, plan.study.protocol.retries + 1):
            disturbed = [
                group for group in disturbed if self._took_s[group] <= budget.left_s and self._measure(group, again)
            ]

    def _measure(self, group: Group, again: int = 0) -> bool:
        """Measure a group and save its records; returns whether one of its trials was disturbed. An exception that ends
        it early is raised after its records have been saved."""
        budget = self._parts.budget
        ended_by: BaseException | None = None
        budget.enter(group)
        records = GroupRecords(group, self._parts, _attempt(group, self._earlier) + again)
        begin = budget.clock()
        try:
            with self._stops.interruptible():
                GroupRunner(self._parts, group, records).measure()
        except TimeLimitTooShortError:
            raise
        except KeyboardInterrupt as interrupt:
            records.record_interruption("Interrupted", "stopped by the user")
            ended_by = interrupt
        except Exception as defect:  # a defect of the harness must not lose measurements
            records.record_interruption(type(defect).__name__, f"the parent failed: {defect}")
            ended_by = defect
        records.finish()
        for record in records.records.values():
            if record.settled or record.trial not in self._ended:  # an interrupted second attempt keeps the first one
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
        except BaseException:  # no further record can be saved
            self.remaining.clear()
            raise
        self._ended[record.trial] = record
        self._parts.display.trial_ended(record)

    def give_up(self) -> None:
        """Save a record for each remaining trial: its state when the run was interrupted, else `not_run`."""
        for slot in (slot for group in self.remaining for slot in group.slots if slot.trial not in self._ended):
            if slot.trial in self._interrupted:
                self._ended[slot.trial] = self._interrupted[slot.trial]
            else:
                self._keep(begin_record(slot, "not_run"))


def _attempt(group: Group, earlier: Collection[TrialRecord]) -> int:
    """The attempt number of the next measurement of a group: that of the interrupted one, or one more than the last
    completed one."""
    records = [record for record in earlier if record.trial in {slot.trial for slot in group.slots}]
    last = max((record.attempt for record in records), default=0)
    return last + any(record.disturbed and record.attempt == last for record in records)


def find_unfinished(plan: Plan, earlier: Collection[TrialRecord], *, whole: bool = False) -> tuple[Group, ...]:
    """The groups to be measured for the first time or again: groups with a trial that has not ended, or that was
    disturbed. Trials of one group took turns and are paired, so they are measured again together, and count only if
    they are of the same attempt. Replicates on several sites are paired within a site: if a replicate was or will be
    spread (`whole`), all its groups are measured again. Groups skipped because of the time limit are left out."""
    settled = {
        record.trial: (record.attempt, record.site) for record in earlier if record.settled and not record.disturbed
    }

    def is_settled(group: Group) -> bool:
        attempts = {settled.get(slot.trial) for slot in group.slots}
        return None not in attempts and len(attempts) == 1

    left = {group for group in plan.groups if not is_settled(group)} - _skipped_groups(plan, earlier)
    begun = {record.replicate for record in earlier if whole or record.site}
    again = {group.replicate for group in left} & begun
    # The first site of such a replicate was lost, and the run ended before the second finished.
    sites = Counter(replicate for replicate, _ in {(record.replicate, record.site) for record in earlier})
    again |= {replicate for replicate, count in sites.items() if count > 1}
    return tuple(group for group in plan.groups if group in left or group.replicate in again)


def _skipped_groups(plan: Plan, earlier: Collection[TrialRecord]) -> set[Group]:
    """Isolated trials that the time limit has dropped: they have no record, although later groups have. If some were
    dropped, those of the interrupted replicate are dropped as well."""
    recorded, begun = {record.trial for record in earlier}, {record.replicate for record in earlier}
    groups = () if plan.study.protocol.max_minutes is None else plan.groups
    known = [any(slot.trial in recorded for slot in group.slots) for group in groups]
    last = max((number for number, has in enumerate(known) if has), default=-1)
    alone = [number for number, group in enumerate(groups) if not known[number] and group.isolated]
    some = any(number < last for number in alone)
    return {groups[number] for number in alone if some and groups[number].replicate in begun}


def records_outside(groups: Iterable[Group], earlier: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The records of trials outside the groups to be measured."""
    pending = {slot.trial for group in groups for slot in group.slots}
    return [record for record in earlier if record.trial not in pending]
