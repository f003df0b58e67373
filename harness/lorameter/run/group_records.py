"""The records of a group under way: what its trials have so far, and how each stands.

Of a long group they are saved between its commands as well, so that killing the parent costs a part of the group's time
and never all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from lorameter.records.checkpoints import checkpoint_is_due
from lorameter.records.record import UNDER_WAY, Failure, Measure, PartialRecord, Status, TrialRecord
from lorameter.records.validation import validation_error
from lorameter.run.plan import Group, Slot
from lorameter.run.trial_setup import RunContext, begin_record


class GroupRecords:
    """One record a trial of the group."""

    def __init__(
        self,
        group: Group,
        site: RunContext,
        save: Callable[[TrialRecord], None],
        clock: Callable[[], float],
        attempt: int,
    ) -> None:
        self.slots = {slot.trial: slot for slot in group.slots}
        self.records = {slot.trial: begin_record(slot, "ok").replaced(attempt=attempt) for slot in group.slots}
        self.ended: set[str] = set()
        """Trials of which nothing is left to be measured."""
        self.saving_s = 0.0
        """What saving on the way has taken."""
        self._site, self._save, self._clock = site, save, clock
        self._entered = self._saved = clock()
        self._begun: dict[str, tuple[float, float]] = {}
        """When each trial began: by the calendar, and by the clock that nobody sets."""

    def begin(self, slots: Iterable[Slot]) -> None:
        """Their process is being started."""
        for slot in slots:
            self._begun[slot.trial] = time.time(), time.monotonic()

    def unbegin(self, slots: Iterable[Slot]) -> None:
        """There is no process after all."""
        for slot in slots:
            del self._begun[slot.trial]

    def is_ok(self, trial: str) -> bool:
        """Whether nothing is wrong with it so far."""
        return self.records[trial].status == "ok"

    def live(self, measure: Measure | None = None) -> list[str]:
        """Trials that are still ok and, if a measure is given, are there to measure it."""
        return [
            trial
            for trial in self.records
            if self.is_ok(trial) and (measure is None or measure in self.slots[trial].measures)
        ]

    def add(self, trial: str, fragment: PartialRecord, turn: int | None = None) -> None:
        """What was added to a trial, by a turn of so many steps if it was one."""
        record = self.records[trial].merged(fragment)
        changes: dict[str, Any] = {"tokens": record.tokens | self._site.of(self.slots[trial].workload).tokens}
        if trial in self._begun:
            started_unix_s, begin = self._begun[trial]
            changes |= {"started_unix_s": started_unix_s, "wall_time_s": time.monotonic() - begin}
        if turn is not None:
            changes["turn_lengths"] = (*record.turn_lengths, len(fragment.samples.get("step_time_s", ())))
        record = record.replaced(**changes)
        if flaw := validation_error(record):  # no reader would take it, and with it the whole run
            failure = Failure(phase="record", kind="Unreadable", message=flaw)
            record = self.records[trial].merged(PartialRecord().failed("invalid", failure))
        self.records[trial] = record

    def break_off(self, kind: str, message: str) -> None:
        """What has not come to its end was interrupted, or not run if it had not begun."""
        for trial in self.live():
            if trial not in self.ended:
                status: Status = "interrupted" if trial in self._begun else "not_run"
                self.add(trial, PartialRecord().failed(status, Failure(phase="run", kind=kind, message=message)))

    def checkpoint(self, command: str) -> None:
        """Save what every trial has so far; nothing is timed between the commands of a round and those of the next.

        The evidence of the checks is left out: it is half of a record, and the record at the end has it.
        """
        now = self._clock()
        if not checkpoint_is_due(now, begun_s=self._entered, saved_s=self._saved):
            return
        begin = time.monotonic()
        failure = Failure(phase=command, kind=UNDER_WAY, message=f"under way when this was written, after {command}")
        for record in self.records.values():
            if record.status == "ok":
                record = record.replaced(status="interrupted", failure=failure, checks=())
            self._save(record)
        self.saving_s += time.monotonic() - begin
        self._saved = self._clock()
