"""Measures one group of a plan: its processes are live at the same time and take the turns of the plan.

Timed work runs alone: the parent sends one command and blocks on the answer. Building, checking, warming up and first
requests are not timed, so as many processes do these in parallel as there are cores; after the last answer, no process
is busy. The answer of a process goes into the record of its trial; its death goes into the record of each trial that it
hosted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lorameter.measurements.declaration import Command, Measurement, Work
from lorameter.measurements.metrics import MEASUREMENTS, Measure
from lorameter.measurements.requests import REQUESTS
from lorameter.measurements.steps import STEPS
from lorameter.records import codec
from lorameter.records.os_errors import REFUSED, SystemLimitError
from lorameter.records.record import UNDER_WAY, Failure, PartialRecord, Status, TrialRecord
from lorameter.records.store import checkpoint_is_due
from lorameter.records.trials import find_fault
from lorameter.run.budget import MIN_ROUNDS, Budget
from lorameter.run.display import Display
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.prepare import RunContext, begin_record, make_request
from lorameter.run.workers import Executor, Worker, WorkerLostError
from lorameter.studies.request import Request


@dataclass(slots=True, kw_only=True)
class RunParts:
    """The plan, executors, context and budget that all groups of a run share."""

    plan: Plan
    executors: Mapping[str, Executor]
    context: RunContext
    save: Callable[[TrialRecord], None]
    display: Display
    budget: Budget
    imports: dict[tuple[int, str], PartialRecord] = field(default_factory=dict)
    """Import times of new interpreters, by replicate and side."""


class GroupRecords:
    """One record for each trial of a running group. For a long group they are also saved between its commands, so that
    killing the parent never loses all of its time."""

    def __init__(self, group: Group, run: RunParts, attempt: int) -> None:
        self.slots = {slot.trial: slot for slot in group.slots}
        self.records = {slot.trial: begin_record(slot, "ok").replaced(attempt=attempt) for slot in group.slots}
        self._run = run
        self._entered = self._saved = run.budget.clock()
        self._begun: dict[str, tuple[float, float]] = {}
        """The start of each trial's process: Unix time and monotonic clock."""

    def begin(self, launch: Iterable[Slot], begun: tuple[float, float]) -> None:
        """Record the start of their process, as Unix time and monotonic clock."""
        self._begun |= {slot.trial: begun for slot in launch}

    def is_ok(self, trial: str) -> bool:
        """Whether the trial has not failed so far."""
        return self.records[trial].status == "ok"

    def live(self, measure: Measure | None = None) -> list[str]:
        """Trials that are still ok and, if a measure is given, measure it."""
        return [
            trial
            for trial in self.records
            if self.is_ok(trial) and (measure is None or measure in self.slots[trial].measures)
        ]

    def values(self, name: str) -> list[float]:
        """The values with this name in the records of the live trials that have it."""
        records = (self.records[trial] for trial in self.live())
        return [record.values[name] for record in records if name in record.values]

    def add(self, trial: str, fragment: PartialRecord, **changes: Any) -> None:
        """Add the answer of a command, and `changes` of fields of the record."""
        record = self.records[trial].merged(fragment)
        changes["tokens"] = record.tokens | self._run.context.token_facts(self.slots[trial].workload)
        if trial in self._begun:
            started_unix_s, begin = self._begun[trial]
            changes |= {"started_unix_s": started_unix_s, "wall_time_s": time.monotonic() - begin}
        self.records[trial] = record.replaced(**changes)

    def finish(self) -> None:
        """Mark each record that could not be read again as invalid: it would make the whole run unreadable."""
        self.records = {trial: _readable(record) for trial, record in self.records.items()}

    def add_lost_worker(self, trials: Iterable[str], lost: WorkerLostError) -> None:
        """Record that the process of these trials has died; trials that had already failed keep their failure."""
        for trial in trials:
            if self.is_ok(trial):
                self.add(trial, PartialRecord().failed(lost.status, lost.failure))

    def record_interruption(self, kind: str, message: str) -> None:
        """Mark the live trials as interrupted, or as not run if they had not begun."""
        for trial in self.live():
            status: Status = "interrupted" if trial in self._begun else "not_run"
            self.add(trial, PartialRecord().failed(status, Failure(phase="run", kind=kind, message=message)))

    def checkpoint(self, command: str) -> None:
        """Save the records of all trials so far, if that is due; nothing is timed between two rounds.

        The evidence of the checks is omitted: it is half of a record, and the final record contains it.
        """
        now = self._run.budget.clock()
        if not checkpoint_is_due(now, begun_s=self._entered, saved_s=self._saved):
            return
        failure = Failure(phase=command, kind=UNDER_WAY, message=f"under way when this was written, after {command}")
        for record in self.records.values():
            if record.status == "ok":
                record = record.replaced(status="interrupted", failure=failure, checks=())
            self._run.save(_readable(record))
        self._saved = self._run.budget.clock()


def _readable(record: TrialRecord) -> TrialRecord:
    """The record; without its unreadable parts, and invalid, if it could not be read again after writing."""
    flaw = find_fault(record)
    if flaw is None:
        return record
    empty = {part: getattr(PartialRecord(), part) for part in ("samples", "values", "memory", "tokens", "software")}
    bare = record.replaced(**empty)
    kept = {part: value for part in empty if not find_fault(bare.replaced(**{part: (value := getattr(record, part))}))}
    failure = Failure(phase="record", kind="Unreadable", message=flaw)
    return bare.replaced(**kept, status="invalid", failure=failure)


class GroupRunner:
    """Measures all phases of all trials of one group; after a failure, a trial gets no further commands."""

    def __init__(self, run: RunParts, group: Group, records: GroupRecords) -> None:
        self._run, self._group, self._records, self._budget = run, group, records, run.budget
        self._workers: dict[str, Worker] = {}
        """Workers by the trials that they host."""
        self._requests: dict[str, Request] = {}
        self._trains = run.plan.study.form.trains()
        self._timeout_s = run.plan.study.protocol.step_timeout_s
        self._request_s = 0.0
        """Seconds of one request of one trial."""
        self._serving = False
        """Whether the trials have answered their first requests."""

    def measure(self) -> None:
        """Measure the group, and end its processes."""
        phases = {"train", *self._run.plan.phases}
        measurements = [
            one for one in MEASUREMENTS.values() if one.phase.name in phases and (self._trains or one is not STEPS)
        ]
        try:
            for launch in self._group.launches:
                self._launch(launch)
            self._prepare()
            for measurement in measurements:
                if not measurement.in_new_process:
                    self._take(measurement)
            if any(len(launch) > 1 for launch in self._group.launches):
                self._run_untimed("close", self._records.live())
        finally:
            for worker in set(self._workers.values()):
                worker.close()
        for measurement in measurements:
            if measurement.in_new_process and self._admits(measurement):
                self._start_cold(self._records.live(measurement.name))
        for slot in self._group.slots:
            self._run.executors[slot.executor].clear_place(slot.trial)

    # --- the parts of a trial -----------------------------------------------------------------------------------------

    def _launch(self, launch: tuple[Slot, ...]) -> None:
        """Start a process and let it prepare its trials, which print into one log."""
        records, first = self._records, launch[0]
        if failed := self._run.plan.failed.get(first.arm.name):  # in a rehearsal of scripts
            records.add(first.trial, PartialRecord(status=failed.status, failure=failed.failure), log=failed.log)
            return
        executor, begun = self._run.executors[first.executor], (time.time(), time.monotonic())
        try:
            worker = executor.launch()
        except WorkerLostError as lost:
            records.begin(launch, begun)
            records.add_lost_worker([slot.trial for slot in launch], lost)
            return
        records.begin(launch, begun)
        for slot in launch:  # all of them before the first command, so that each has a record if the process dies
            self._workers[slot.trial] = worker
            started = PartialRecord(values={"start_latency_s": worker.start_latency_s})
            records.add(slot.trial, started, log=f"logs/{first.trial}.log")
        for slot in launch:
            place = executor.make_place(slot.trial, first.trial)
            request = self._requests[slot.trial] = make_request(self._run.plan, slot, self._run.context, place)
            self._ask(slot.trial, "prepare", request=codec.to_json(request))

    def _prepare(self) -> None:
        """Run each trial from its first step to the point where only timed turns are left; others are built."""
        budget, protocol, live = self._budget, self._run.plan.study.protocol, self._records.live()
        steps = 2 + MIN_ROUNDS * protocol.steps_per_turn
        first = 1 if budget.is_judging and self._group.turns else len(live)
        for trials in (live[:first], live[first:]):  # one trial alone first: its step shows whether any fits
            self._run_untimed("build", trials)
            known = self._records.values("build_step_time_s")
            if self._group.turns and known:
                budget.require_one(steps * statistics.fmean(known) * len(self._records.live()))
        if not self._trains:
            return
        self._run_untimed("verify", self._records.live())
        self._run_untimed("warm_up", self._records.live(), **({"steps": 1} if budget.limit_s is not None else {}))
        budget.lap(self._rest, once_s=sum(self._records.values("isolation_probe_time_s")) / self._parallel)

    def _take(self, measurement: Measurement) -> None:
        """Take one measurement of all trials that measure it: begin, rounds in turns, end."""
        if measurement is REQUESTS:
            self._serving = self._begin_requests()
        if not self._admits(measurement):
            return
        if measurement.begin and measurement is not REQUESTS:
            for command in measurement.begin:
                self._run_untimed(command.name, self._receivers(command, measurement))
            self._lap(measurement)
        rounds, once_s = self._take_rounds(measurement), 0.0
        if measurement is STEPS:
            once_s = self._end_training(rounds)
        else:
            for command in measurement.end:
                self._run_untimed(command.name, self._receivers(command, measurement))
        if measurement.end:
            of_requests = measurement.needs_requests and not measurement.rounds
            self._lap(REQUESTS if of_requests else measurement, once_s=once_s)

    def _end_training(self, rounds: int) -> float:
        """Run the untimed steps of the requested epochs, and end the training of all trials after the same step.
        Returns the seconds that only the first replicate needs."""
        protocol, records = self._run.plan.study.protocol, self._records
        train, finish, save = STEPS.end
        timed = records.live(STEPS.name)
        epochs = max((records.slots[trial].arm.rounds_after_turns(protocol) for trial in timed), default=0)
        for _ in range(epochs):  # in rounds, because a command that trains for hours looks like one that hangs
            self._run_untimed(train.name, self._receivers(train, STEPS), steps=protocol.steps_per_turn)
        arguments = {}
        if timed and self._budget.limit_s is not None and not epochs:
            # All trials end after the longest warm-up and the timed steps.
            longest = max(len(records.records[trial].samples.get("warmup_step_time_s", ())) for trial in timed)
            arguments["steps"] = 1 + longest + rounds * self._budget.steps(protocol.steps_per_turn)
        finish_s = self._run_untimed(finish.name, self._receivers(finish, STEPS), **arguments)
        self._run_untimed(save.name, self._receivers(save, STEPS))
        # The same loss was computed before training, which occurs once.
        return finish_s if self._group.turns and records.values("held_out_loss_initial") else 0.0

    def _begin_requests(self) -> bool:
        """Run the first requests of all trials, if a trial needs them. With a time limit, those of one trial come
        first, to find out whether there is time for more. Returns whether requests can be made."""
        declared = [MEASUREMENTS[name] for slot in self._group.slots for name in slot.measures]
        if not self._group.isolated and not any(one.needs_requests and one.drop_rank is not None for one in declared):
            return False
        (command,) = REQUESTS.begin
        first = self._records.live()[:1] if self._budget.is_judging and not self._group.isolated else []
        if first:
            seconds = self._run_untimed(command.name, first)
            self._request_s = seconds / (1 + self._run.plan.study.protocol.generate_warmup)
            if not self._admits(REQUESTS):
                self._budget.lap(None)
                return False
        self._run_untimed(command.name, [trial for trial in self._records.live() if trial not in first])
        self._lap(REQUESTS)
        return True

    def _receivers(self, command: Command, measurement: Measurement) -> list[str]:
        """The trials to which a command of a measurement is sent."""
        needed, slots = command.needed_by or (lambda one: one is measurement), self._records.slots
        return [
            trial for trial in self._records.live() if any(needed(MEASUREMENTS[name]) for name in slots[trial].measures)
        ]

    # --- cold starts --------------------------------------------------------------------------------------------------

    def _start_cold(self, trials: Sequence[str]) -> None:
        """Measure cold starts after all processes have ended, so that nothing shares the device with them. In the first
        replicate, a whole cold start of the reference checks the sum."""
        records, budget = self._records, self._budget
        whole_s = 0.0
        for trial in trials:
            slot = records.slots[trial]
            self._run.display.trial_phase(slot, "cold")
            self._add_cold(trial, self._measure_parts)
            if self._checks_sum(slot) and records.is_ok(trial):
                begin = budget.clock()
                self._add_cold(trial, self._measure_whole)
                whole_s += budget.clock() - begin
        budget.lap("cold", once_s=whole_s)

    def _checks_sum(self, slot: Slot) -> bool:
        """Whether a whole cold start of this trial is compared with the sum of its parts."""
        return (
            slot.replicate == 0 and slot.arm.role == "variant" and slot.variant.name == self._run.plan.study.reference
        )

    def _add_cold(self, trial: str, measure: Callable[[Slot, Request], PartialRecord]) -> None:
        """Add a cold start. Its answer must equal that of the trained process; otherwise the trial is invalid."""
        try:
            fragment = measure(self._records.slots[trial], self._requests[trial])
        except WorkerLostError as lost:
            self._records.add_lost_worker([trial], lost)
            return
        warm, cold = self._records.records[trial].tokens.get("completion"), fragment.tokens.get("cold_completion")
        if fragment.status == "ok" and warm is not None and warm != cold:
            message = f"the new process answered {cold} where the trained process had answered {warm}"
            fragment = fragment.failed("invalid", Failure(phase="cold", kind="OtherCompletion", message=message))
        self._records.add(trial, fragment)
        raise_refused(trial, fragment)

    def _measure_parts(self, slot: Slot, request: Request) -> PartialRecord:
        """A cold start as the sum of two parts: the imports of a new interpreter, which depend on the environment and
        not on the variant, and are timed once per replicate and side; and loading plus the first answer, in a fresh
        child of a process that has imported the libraries. Raises `WorkerLostError`."""
        executor, key = self._run.executors[slot.executor], (slot.replicate, slot.arm.side)
        imports = self._run.imports.get(key)
        if imports is None:
            imports = self._run.imports[key] = executor.start_interpreter(request.log_path, self._timeout_s)
        if imports.status != "ok":
            return imports
        with closing(executor.launch()) as worker:
            loaded = worker.ask("cold", slot.trial, self._timeout_s, request=codec.to_json(request))
        if loaded.status != "ok":
            return loaded
        import_s, load_s = imports.values["cold_import_time_s"], loaded.values["cold_after_import_time_s"]
        values = loaded.values | imports.values | {"cold_start_time_s": import_s + load_s}
        del values["cold_after_import_time_s"]
        samples = {"cold_start_time_s": (import_s + load_s,)}
        return msgspec.structs.replace(loaded, values=values, samples=samples)

    def _measure_whole(self, slot: Slot, request: Request) -> PartialRecord:
        """A cold start in one new interpreter, to compare it with the sum. Raises `WorkerLostError`."""
        executor = self._run.executors[slot.executor]
        whole = executor.start_interpreter(request.log_path, self._timeout_s, request)
        if whole.status != "ok":
            return whole
        return PartialRecord(values={"cold_whole_time_s": whole.values["cold_start_time_s"]}, tokens=whole.tokens)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _admits(self, measurement: Measurement) -> bool:
        """Whether trials of the group take a measurement and the budget has room for it."""
        if measurement.drop_rank is None:
            return self._serving or not measurement.needs_requests
        measuring, study, budget = self._records.live(measurement.name), self._run.plan.study, self._budget
        steps_s = self._records.values("build_step_time_s")
        work = Work(
            step_s=statistics.fmean(steps_s or [0.0]), request_s=self._request_s, load_s=budget.load_s,
            workload=study.workload, protocol=study.protocol,
        )  # fmt: skip
        seconds, once_s = len(measuring) * measurement.cost_s(work, MIN_ROUNDS if measurement.rounds else 1), 0.0
        if measurement.in_new_process:
            seconds += len({slot.arm.side for slot in self._group.slots}) * budget.import_s
            whole_s = budget.import_s + measurement.cost_s(work, 1)
            once_s = sum(map(self._checks_sum, self._group.slots)) * whole_s
        return bool(measuring) and budget.admits(measurement.name, seconds, once_s=once_s)

    @property
    def _rest(self) -> Measure | None:
        """The part to which other time is booked; for isolated trials it is needed only once if they only measure
        peaks."""
        if self._group.isolated:
            return "merged" if self._records.live("merged") else None
        return "steps" if self._trains else "requests"

    def _lap(self, measurement: Measurement, *, once_s: float = 0.0) -> None:
        """Book untimed work to its measurement, or to the rest if no trial of the group takes the measurement."""
        measured = self._records.live(measurement.name)
        self._budget.lap(measurement.name if measured else self._rest, once_s=once_s)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _ask(self, trial: str, command: str, **arguments: Any) -> None:
        """Let one trial execute a command while nothing else runs."""
        if self._records.is_ok(trial):
            self._run.display.trial_phase(self._records.slots[trial], command)
            worker = self._workers[trial]
            self._add(trial, command, lambda: worker.ask(command, trial, self._timeout_s, **arguments))

    @property
    def _parallel(self) -> int:
        """The number of trials that execute an untimed command at once."""
        alone = len(set(self._workers.values())) == len(self._workers)
        return self._run.context.max_parallel if alone else 1

    def _run_untimed(self, command: str, trials: Sequence[str], **arguments: Any) -> float:
        """Let these trials execute an untimed command, in parallel on the available cores. Returns its seconds."""
        begin, size, trials = self._budget.clock(), self._parallel, list(filter(self._records.is_ok, trials))
        for batch in (trials[start : start + size] for start in range(0, len(trials), size)):
            if len(batch) == 1:
                self._ask(batch[0], command, **arguments)
                continue
            for trial in batch:
                self._run.display.trial_phase(self._records.slots[trial], command)
                self._workers[trial].send(command, trial, **arguments)
            for trial in batch:
                worker = self._workers[trial]
                self._add(trial, command, lambda: worker.receive(command, self._timeout_s))  # noqa: B023 # called now
        if trials:
            self._records.checkpoint(command)
        return self._budget.clock() - begin

    def _take_rounds(self, measurement: Measurement) -> int:
        """Run the timed rounds that the budget admits if trials take the measurement; returns their number."""
        orders, command, budget = self._group.rounds.get(measurement.rounds, ()), measurement.round, self._budget
        if not (orders and command and self._records.live(measurement.name)):
            return len(orders)
        rounds, begin = budget.rounds(len(orders)), time.monotonic()
        steps = budget.steps(self._run.plan.study.protocol.steps_per_turn)
        arguments = {"steps": steps} if measurement is STEPS else {}
        with self._pinned():
            for order in orders[:rounds]:
                for trial in order:
                    self._ask(trial, command.name, **arguments)
                self._records.checkpoint(command.name)
        budget.lap(measurement.name, rounds=rounds)
        if measurement is STEPS:
            turns = PartialRecord(values={"turns_wall_time_s": time.monotonic() - begin})
            for trial in self._records.live(STEPS.name):
                self._records.add(trial, turns)
        return rounds

    def _add(self, trial: str, command: str, answer: Callable[[], PartialRecord]) -> None:
        try:
            fragment = answer()
        except WorkerLostError as lost:
            worker = self._workers[trial]
            self._records.add_lost_worker([other for other, host in self._workers.items() if host is worker], lost)
            return
        lengths = self._records.records[trial].turn_lengths
        if command == "turn":
            lengths = (*lengths, len(fragment.samples.get("step_time_s", ())))
        self._records.add(trial, fragment, turn_lengths=lengths)
        raise_refused(trial, fragment)

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        """Pin all processes to one CPU while they are timed, if each computes in a single thread: a slow CPU then
        affects all of them alike. Each replicate uses another CPU."""
        workers = set(self._workers.values())
        single = all(slot.workload.threads == slot.workload.ranks == 1 for slot in self._group.slots)
        pins = self._run.context.device == "cpu" and single and len(workers) > 1
        cpus = sorted(set.intersection(*(set(worker.cpus()) for worker in workers))) if pins else []
        movable = workers if len(cpus) > 1 else set[Worker]()
        for worker in movable:
            worker.pin({cpus[self._group.replicate % len(cpus)]})
        try:
            yield
        finally:
            for worker in movable:
                worker.pin(worker.cpus())


def raise_refused(trial: str, fragment: PartialRecord) -> None:
    """Raise `SystemLimitError` for a system error that would also affect the next trials, and that no trial caused."""
    if fragment.failure is not None and fragment.failure.kind == REFUSED:
        raise SystemLimitError(f"{trial} in {fragment.failure.phase}: {fragment.failure.message}")
