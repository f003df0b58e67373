"""The parent's loop: measure a plan group by group, and keep what comes back.

The parent only ever blocks on an answer; it redraws between turns. Each trial ends as a record whatever happens to it:
a lost worker, an exception in the child, Ctrl-C. The sweep goes on after a failed trial, and the summary carries what
the exit code must say. A run that broke off is gone on with by leaving out what its records settle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.budget import Budget
from harness.conductor import Conductor, Site, Watcher, blank
from harness.executors import Executor
from harness.plan import Group, Plan
from harness.record import TrialRecord

Stop = Callable[[Sequence[TrialRecord]], str | None]
"""Is asked between replicates whether the run has what it needs; a reason ends the run there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of a plan: the records of all trials that belong to the run, and why it ended before its cap."""

    records: tuple[TrialRecord, ...]
    stopped: str | None = None


def run_plan(
    plan: Plan,
    executors: Mapping[str, Executor],
    site: Site,
    *,
    save: Callable[[TrialRecord], None],
    watcher: Watcher,
    stop: Stop = lambda records: None,
    budget: Budget | None = None,
    earlier: Sequence[TrialRecord] = (),
) -> Measured:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended.

    On KeyboardInterrupt the trials under way are recorded as `interrupted`, those that never began as `not_run`.
    Replicates that `stop` makes needless leave no record. `earlier` are the records of a run that is gone on with: what
    they settle is not measured again.
    """
    budget = budget or Budget()
    remaining = list(unsettled(plan, earlier))
    records = kept(remaining, earlier)
    untouched = {record.trial: record for record in earlier if record not in records}

    def keep(record: TrialRecord) -> None:
        save(record)
        records.append(record)
        watcher.trial_ended(record)

    def give_up(groups: Iterable[Group]) -> None:
        for slot in (slot for group in groups for slot in group.slots):
            if slot.trial in untouched:  # what it had when the run broke off is more than nothing
                records.append(untouched[slot.trial])
            else:
                keep(blank(plan, slot, "not_run"))

    interrupted = False
    while remaining and not interrupted:
        group = remaining.pop(0)
        budget.enter(plan.study, group, [other for other in remaining if other.replicate == group.replicate])
        conductor = Conductor(plan, group, executors, site, watcher, save, budget)
        error: Exception | None = None
        try:
            conductor.measure()
        except KeyboardInterrupt:
            interrupted = True
            conductor.interrupt()
        except Exception as caught:  # a defect of ours must not cost what was measured
            error = caught
            conductor.abandon(caught)
        for record in conductor.records():
            keep(record)
        budget.leave()
        if error is not None:
            give_up(remaining)
            raise error
        between = bool(remaining) and remaining[0].replicate != group.replicate
        if between and not interrupted and (reason := stop(records)):
            return Measured(records=tuple(records), stopped=reason)
    give_up(remaining)
    return Measured(records=tuple(records))


def unsettled(plan: Plan, earlier: Collection[TrialRecord]) -> tuple[Group, ...]:
    """The groups that must be measured, some for the first time and some again: those with a trial that has no end of
    its own. Trials of one group took turns and are paired, so they are measured again together."""
    settled = {record.trial for record in earlier if record.settled}
    return tuple(group for group in plan.groups if not settled.issuperset(slot.trial for slot in group.slots))


def kept(groups: Iterable[Group], earlier: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The records of trials that are in none of the groups to be measured."""
    pending = {slot.trial for group in groups for slot in group.slots}
    return [record for record in earlier if record.trial not in pending]
