"""Measures one group of a plan: its processes are live together and take the turns that the plan says.

What is timed is alone: the parent sends one command and blocks on the answer. Building, checking, warming up and first
requests are in no number, so as many processes at once do these as there are cores for them; when the last has
answered nothing is at work any more. What a process answers goes into the record of its trial; its death is a row for
each trial that it hosted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from lorameter.records import codec
from lorameter.records.os_errors import REFUSED, SystemLimitError
from lorameter.records.record import UNDER_WAY, Failure, Measure, PartialRecord, Status, TrialRecord
from lorameter.records.store import checkpoint_is_due
from lorameter.records.trials import find_fault
from lorameter.run.budget import LEAST_ROUNDS, Budget, Part
from lorameter.run.cold_start import ColdStart
from lorameter.run.display import ProgressListener
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.prepare import RunContext, begin_record, request_of, script_request_of
from lorameter.run.workers import AsyncWorker, Executor, PinnableWorker, Worker, WorkerLostError
from lorameter.studies.request import COMMANDS, ROUNDS, Command, RoundKind, TrialRequest

WARM = "warmup_step_time_s"
PART_OF: dict[RoundKind, Part] = {
    "steps": "training", "epochs": "training", "requests": "requests", "open_ended": "open_ended", "merged": "merged",
}  # fmt: skip


class GroupRecords:
    """One record a trial of a group under way. Those of a long group are saved between its commands as well, so that
    killing the parent never costs all of its time."""

    def __init__(
        self,
        group: Group,
        context: RunContext,
        save: Callable[[TrialRecord], None],
        clock: Callable[[], float],
        attempt: int,
    ) -> None:
        self.slots = {slot.trial: slot for slot in group.slots}
        self.records = {slot.trial: begin_record(slot, "ok").replaced(attempt=attempt) for slot in group.slots}
        self.ended: set[str] = set()
        """Trials of which nothing is left to be measured."""
        self.saving_s = 0.0
        """Seconds that checkpoints have taken."""
        self._context, self._save, self._clock = context, save, clock
        self._entered = self._saved = clock()
        self._begun: dict[str, tuple[float, float]] = {}
        """When each trial began: Unix time and monotonic clock."""

    def begin(self, slots: Iterable[Slot]) -> None:
        """Their process is being started."""
        for slot in slots:
            self._begun[slot.trial] = time.time(), time.monotonic()

    def unbegin(self, slots: Iterable[Slot]) -> None:
        """There is no process after all."""
        for slot in slots:
            del self._begun[slot.trial]

    def is_ok(self, trial: str) -> bool:
        """Whether nothing has gone wrong with it so far."""
        return self.records[trial].status == "ok"

    def live(self, measure: Measure | None = None) -> list[str]:
        """Trials that are still ok and, if a measure is given, measure it."""
        return [
            trial
            for trial in self.records
            if self.is_ok(trial) and (measure is None or measure in self.slots[trial].measures)
        ]

    def add(self, trial: str, fragment: PartialRecord, turn: bool = False) -> None:
        """Add what a command, or a `turn`, has answered."""
        record = self.records[trial].merged(fragment)
        changes: dict[str, Any] = {"tokens": record.tokens | self._context.of(self.slots[trial].workload).tokens}
        if trial in self._begun:
            started_unix_s, begin = self._begun[trial]
            changes |= {"started_unix_s": started_unix_s, "wall_time_s": time.monotonic() - begin}
        if turn:
            changes["turn_lengths"] = (*record.turn_lengths, len(fragment.samples.get("step_time_s", ())))
        record = record.replaced(**changes)
        if flaw := find_fault(record):  # no reader would take it, and with it the whole run
            failure = Failure(phase="record", kind="Unreadable", message=flaw)
            record = self.records[trial].merged(PartialRecord().failed("invalid", failure))
        self.records[trial] = record

    def break_off(self, kind: str, message: str) -> None:
        """Mark what has not ended as interrupted, or as not run if it had not begun."""
        for trial in self.live():
            if trial not in self.ended:
                status: Status = "interrupted" if trial in self._begun else "not_run"
                self.add(trial, PartialRecord().failed(status, Failure(phase="run", kind=kind, message=message)))

    def checkpoint(self, command: str) -> None:
        """Save what every trial has so far, if that is due; nothing is timed between two rounds.

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


class GroupRunner:
    """Measures all phases of all trials of one group; a trial that fails takes no further part."""

    def __init__(
        self,
        plan: Plan,
        group: Group,
        executors: Mapping[str, Executor],
        context: RunContext,
        listener: ProgressListener,
        save: Callable[[TrialRecord], None],
        budget: Budget,
        attempt: int = 0,
        imports: dict[tuple[int, str], PartialRecord] | None = None,
    ) -> None:
        """`imports` are what new interpreters took to import so far, by replicate and side."""
        self._plan, self._group, self._executors, self._context = plan, group, executors, context
        self._listener, self._budget = listener, budget
        self._records = GroupRecords(group, context, save, budget.clock, attempt)
        self._workers: dict[str, Worker] = {}
        """By the trials that they host."""
        self._requests: dict[str, TrialRequest] = {}
        self._timeout_s = plan.study.protocol.step_timeout_s
        self._request_s = 0.0
        """What one request has taken of one trial."""
        self._imports = {} if imports is None else imports

    def measure(self) -> None:
        """Measure the group, and end its processes."""
        try:
            for launch in self._group.launches:
                self._launch(launch)
            self._prepare()
            self._train()
            self._each("save_adapter")
            self._budget.lap(self._rest)
            self._generate()
            if any(len(launch) > 1 for launch in self._group.launches):
                self._each("close")
        finally:
            for worker in set(self._workers.values()):
                worker.close()
        self._start_cold()
        for slot in self._group.slots:
            self._executors[slot.executor].clear_place(slot.trial)

    def interrupt(self) -> None:
        """Mark what was under way as interrupted by the user."""
        self._records.break_off("Interrupted", "stopped by the user")

    def abandon(self, error: Exception) -> None:
        """Mark what was under way when the parent itself failed, for which no trial is to blame."""
        self._records.break_off(type(error).__name__, f"the parent failed: {error}")

    def records(self) -> Iterable[TrialRecord]:
        """The group's records in the order of the plan."""
        return self._records.records.values()

    # --- the parts of a trial -----------------------------------------------------------------------------------------

    def _launch(self, launch: tuple[Slot, ...]) -> None:
        records = self._records
        if failed := self._plan.failed.get(launch[0].arm.name):  # in a rehearsal of scripts
            trial = launch[0].trial
            records.add(trial, PartialRecord(status=failed.status, failure=failed.failure))
            records.records[trial] = records.records[trial].replaced(log=failed.log)
            return
        records.begin(launch)
        try:
            worker = self._executors[launch[0].executor].launch()
        except WorkerLostError as lost:
            for slot in launch:
                records.add(slot.trial, PartialRecord().failed(lost.status, lost.failure))
            return
        except BaseException:  # there is no process, so these have not begun
            records.unbegin(launch)
            raise
        log = launch[0].trial  # trials of one process print into one log
        for slot in launch:  # all of them before any is asked: should it die then, it is a row for each
            self._workers[slot.trial] = worker
            records.add(slot.trial, PartialRecord(values={"start_latency_s": worker.start_latency_s}))
            records.records[slot.trial] = records.records[slot.trial].replaced(log=f"logs/{log}.log")
        for slot in launch:
            if records.is_ok(slot.trial):
                place = self._executors[slot.executor].make_place(slot.trial, log)
                if self._plan.study.of_scripts:
                    message = codec.to_json(script_request_of(self._plan, slot, self._context, place))
                else:
                    self._requests[slot.trial] = request_of(self._plan, slot, self._context, place)
                    message = codec.to_json(self._requests[slot.trial])
                self._ask(slot.trial, "prepare", request=message)

    def _prepare(self) -> None:
        """From the first step of each trial to where only timed turns are left."""
        protocol, budget = self._plan.study.protocol, self._budget
        self._each("build")
        first = self._values("build_step_time_s")
        if self._group.turns:
            budget.require_one((2 + LEAST_ROUNDS * protocol.steps_per_turn) * sum(first))
        self._each("verify")
        self._each("warm_up", arguments={"steps": 1} if budget.is_limited else {})
        budget.lap(self._rest, once_s=sum(self._values("isolation_probe_time_s")))

    def _train(self) -> None:
        """The timed turns, and the untimed steps of the epochs asked for."""
        protocol, records, turns = self._plan.study.protocol, self._records, self._group.turns
        begin, saving_s = time.monotonic(), records.saving_s
        taken = self._take_rounds("steps", turns, steps=protocol.steps_per_turn)
        wall_time_s = time.monotonic() - begin - (records.saving_s - saving_s)
        timed = records.live("steps")
        for trial in timed:
            records.add(trial, PartialRecord(values={"turns_wall_time_s": wall_time_s}))
        if timed and turns:
            self._budget.note_turns(self._group, taken)
        epochs = max((records.slots[trial].arm.rounds_after_turns(protocol) for trial in timed), default=0)
        # In rounds as well: a command that trains for hours looks like one that hangs.
        self._take_rounds("epochs", tuple(turns[number % len(turns)] for number in range(epochs)),
                          steps=protocol.steps_per_turn)  # fmt: skip
        arguments = {}
        if timed and self._budget.is_limited and not epochs:  # all end after the longest warm-up and the timed steps
            longest = max(map(len, self._warm_up_times()), default=0)
            arguments["steps"] = 1 + longest + taken * protocol.steps_per_turn
        finish_s = self._each("finish_training", arguments=arguments)
        if turns and self._values("held_out_loss_initial"):
            self._budget.lap("training", once_s=finish_s)  # in place of the same loss before training, which came once

    def _generate(self) -> None:
        wanted = {"requests", "open_ended", "merged", "cold"} & {
            one for slot in self._group.slots for one in slot.measures
        }
        if self._group.turns and not (wanted and self._begin_requests()):
            for part in ("open_ended", "merged"):  # which need requests, and are counted in what is missing
                self._admits(part)
            return
        if not self._group.turns:
            self._each("begin_generate")
        if self._admits("requests"):
            self._take_rounds("requests", self._group.requests)
        if self._admits("open_ended"):
            self._take_rounds("open_ended", self._group.open_ended)
            self._each("base_answers")
            self._budget.lap("open_ended")
        self._each("end_generate")
        self._lap_requests()
        if self._admits("merged"):
            self._each("merge")
            self._budget.lap("merged")
            self._take_rounds("merged", self._group.requests)

    def _begin_requests(self) -> bool:
        """The first requests of all trials that take turns. Where time is limited those of one trial come first, and
        say whether there is time for more."""
        if not self._due(COMMANDS["begin_generate"]):
            return True
        one = self._records.live()[:1] if self._budget.is_judging else []
        seconds = self._each("begin_generate", trials=one)
        self._request_s = seconds / self._first_requests
        if one and not self._admits("requests"):
            self._budget.lap(None)
            return False
        self._each("begin_generate", trials=[trial for trial in self._records.live() if trial not in one])
        self._lap_requests()
        return True

    def _start_cold(self) -> None:
        """Cold starts, when all processes have ended, so that nothing shares the device with them."""
        records, budget = self._records, self._budget
        trials = records.live("cold") if self._admits("cold") else []
        records.ended |= set(records.records) - set(trials)
        whole_s = 0.0
        for trial in trials:
            slot, warm = records.slots[trial], records.records[trial].tokens.get("completion")
            self._listener.trial_phase(slot, "cold")
            start = ColdStart(
                self._executors[slot.executor], self._requests[trial], self._imports, side=slot.side, warm=warm
            )
            fragment = start.measure()
            records.add(trial, fragment)
            raise_refused(trial, fragment)
            if slot.replicate == 0 and slot.role == "variant" and fragment.status == "ok":
                begin = budget.clock()
                records.add(trial, start.measure_whole())
                whole_s += budget.clock() - begin
            records.ended.add(trial)
        if trials:
            budget.lap("cold", once_s=whole_s)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _admits(self, part: Literal["requests", "open_ended", "merged", "cold"]) -> bool:
        """Whether trials of the group measure a part and the budget has room for it."""
        measuring, workload, budget = len(self._records.live(part)), self._plan.study.workload, self._budget
        once_s = 0.0
        if part == "cold":
            load_s = budget.load_s + self._request_s
            sides = len({slot.side for slot in self._group.slots})
            seconds = measuring * load_s + sides * budget.import_s
            once_s = measuring * (budget.import_s + load_s)  # whole cold starts, which check the sum
        elif part == "open_ended":  # complete answers are requested before training as well
            answer_s = self._request_s * workload.open_ended_tokens / workload.new_tokens
            seconds = measuring * 2 * LEAST_ROUNDS * answer_s
        else:
            seconds = measuring * (self._first_requests + LEAST_ROUNDS) * self._request_s
        return bool(measuring) and budget.admits(part, seconds, once_s=once_s)

    @property
    def _first_requests(self) -> int:
        return 1 + self._plan.study.protocol.generate_warmup

    @property
    def _rest(self) -> Part | None:
        """What the time goes to that is spent on nothing else; that of isolated trials comes once if they measure peaks
        alone."""
        return "training" if self._group.turns else "merged" if self._records.live("merged") else None

    def _lap_requests(self) -> None:
        self._budget.lap("requests" if self._records.live("requests") else self._rest)

    def _values(self, name: str) -> list[float]:
        """A value of the live trials that have it."""
        records = (self._records.records[trial] for trial in self._records.live())
        return [record.values[name] for record in records if name in record.values]

    def _warm_up_times(self) -> list[tuple[float, ...]]:
        return [self._records.records[trial].samples.get(WARM, ()) for trial in self._records.live("steps")]

    # --- commands -----------------------------------------------------------------------------------------------------

    def _due(self, command: Command) -> bool:
        """Whether the plan has the command's phase; training is part of every plan."""
        return command.phase == "train" or command.phase in self._plan.phases

    def _ask(self, trial: str, command: str, **arguments: Any) -> None:
        """Have one trial carry out a command, while nothing else is at work."""
        if self._records.is_ok(trial):
            self._show(trial, command)
            worker = self._workers[trial]
            turn = COMMANDS[command] is ROUNDS["steps"]
            self._take(trial, lambda: worker.ask(command, trial, self._timeout_s, **arguments), turn=turn)

    def _each(
        self, word: str, *, trials: Sequence[str] | None = None, arguments: Mapping[str, Any] | None = None
    ) -> float:
        """Have all trials, or some, carry out a command that is not timed, as many at once as there are cores for them.
        Returns the seconds that it took."""
        command, begin, arguments = COMMANDS[word], self._budget.clock(), arguments or {}
        if not self._due(command):
            return 0.0
        live = [trial for trial in self._records.live(command.measure) if trials is None or trial in trials]
        alone = len({id(worker) for worker in self._workers.values()}) == len(self._workers)
        size = self._context.max_parallel if alone else 1
        for batch in (live[start : start + size] for start in range(0, len(live), size)):
            if len(batch) == 1:
                self._ask(batch[0], word, **arguments)
                continue
            for trial in batch:
                self._show(trial, word)
                cast(AsyncWorker, self._workers[trial]).send(word, trial, **arguments)
            for trial in batch:
                worker = cast(AsyncWorker, self._workers[trial])
                self._take(trial, lambda worker=worker: worker.receive(word, self._timeout_s))  # type: ignore[misc]
        self._records.checkpoint(word)
        return self._budget.clock() - begin

    def _take_rounds(self, kind: RoundKind, orders: Sequence[Sequence[str]], **arguments: Any) -> int:
        """As many of the rounds as the budget gives, each of all trials that measure this; returns how many."""
        command = ROUNDS[kind]
        measuring = set(self._records.live("steps" if kind == "epochs" else kind))
        if not (self._due(command) and orders and measuring):
            return len(orders)
        rounds = len(orders) if kind == "epochs" else self._budget.rounds(len(orders))
        with self._pinned(command):
            for order in orders[:rounds]:
                for trial in order:
                    if trial in measuring:
                        self._ask(trial, command.name, **arguments)
                self._records.checkpoint(command.name)
        self._budget.lap(PART_OF[kind], rounds=rounds if command.timed else 0)
        return rounds

    def _show(self, trial: str, command: str) -> None:
        if COMMANDS[command].by == "trial":
            self._listener.trial_phase(self._records.slots[trial], command)

    def _take(self, trial: str, answer: Callable[[], PartialRecord], *, turn: bool = False) -> None:
        try:
            fragment = answer()
        except WorkerLostError as lost:
            worker = self._workers[trial]
            for other, host in self._workers.items():
                if host is worker and self._records.is_ok(other):
                    self._records.add(other, PartialRecord().failed(lost.status, lost.failure))
            return
        self._records.add(trial, fragment, turn=turn)
        raise_refused(trial, fragment)

    @contextmanager
    def _pinned(self, command: Command) -> Iterator[None]:
        """Pins all processes to one CPU while they are timed, if each computes in one thread there: what is slow about
        a CPU is then slow for all of them. It is another CPU in each replicate."""
        single = self._context.threads == 1 == max(slot.workload.ranks for slot in self._group.slots)
        workers = set(self._workers.values())
        pinnable = [worker for worker in workers if isinstance(worker, PinnableWorker)]
        cpus: set[int] = set()
        if command.timed and self._context.device == "cpu" and single and len(pinnable) == len(workers) > 1:
            cpus = set.intersection(*(set(worker.cpus()) for worker in pinnable))
        if len(cpus) < 2:
            yield
            return
        for worker in pinnable:
            worker.pin({sorted(cpus)[self._group.replicate % len(cpus)]})
        try:
            yield
        finally:
            for worker in pinnable:
                worker.pin(worker.cpus())


def raise_refused(trial: str, fragment: PartialRecord) -> None:
    """Raise `SystemLimitError` for what the system refuses to this trial: it would refuse it to the next ones too, and
    none of them is to blame."""
    if fragment.failure is not None and fragment.failure.kind == REFUSED:
        raise SystemLimitError(f"{trial} in {fragment.failure.phase}: {fragment.failure.message}")
