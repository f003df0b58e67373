"""One group of a plan, conducted: its processes are live together and take the turns that the plan says.

The parent sends one command at a time and blocks on the answer. Of a long group the records so far are saved between
its commands as well, so that killing the parent costs a part of the group's time and never all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from harness.records import codec
from harness.records.checkpoints import checkpoint_is_due
from harness.records.forms import flaw_of
from harness.records.record import UNDER_WAY, Failure, Fragment, Measure, Status, TrialRecord
from harness.records.refusals import REFUSED, RefusedError
from harness.run.budget import COLD, MERGING, SERVING, Budget
from harness.run.executors import Executor, Worker, WorkerLostError
from harness.run.plan import Group, Plan, Slot
from harness.run.site import Site, begin_record, request_of
from harness.studies.command import COMMANDS, ROUNDS, Command, RoundKind
from harness.studies.request import TrialRequest

SPIED_STEPS = 2
"""What a check under the spy is worth: the step that it watches, and what it looks at."""


class Watcher(Protocol):
    """Is told what is going on, between turns; must return quickly."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has its record."""


class Conductor:
    """One group: its workers are live together and take the turns that the plan says."""

    def __init__(
        self,
        plan: Plan,
        group: Group,
        executors: Mapping[str, Executor],
        site: Site,
        watcher: Watcher,
        save: Callable[[TrialRecord], None],
        budget: Budget,
        attempt: int = 0,
    ) -> None:
        self._plan = plan
        self._group = group
        self._executors = executors
        self._site = site
        self._watcher = watcher
        self._save = save
        self._budget = budget
        self._entered = self._saved = budget.clock()
        self._saving_s = 0.0
        self._slots = {slot.trial: slot for slot in group.slots}
        self._records = {slot.trial: begin_record(slot, "ok").replaced(attempt=attempt) for slot in group.slots}
        self._begun: dict[str, tuple[float, float]] = {}
        """When each trial began: by the calendar, and by the clock that nobody sets."""
        self._ended: set[str] = set()
        """Trials of which nothing is left to be measured."""
        self._workers: dict[str, Worker] = {}
        self._requests: dict[str, TrialRequest] = {}
        self._timeout = plan.study.protocol.step_timeout_s

    def measure(self) -> None:
        """All phases of all trials of the group; a trial that fails takes no further part."""
        try:
            for launch in self._group.launches:
                self._launch(launch)
            begin = self._budget.clock()
            self._each("build")
            building_s = self._budget.clock() - begin
            begin = self._budget.clock()
            self._each("verify")
            verifying_s = self._budget.clock() - begin
            self._each("warm_up")
            step_s = self._warm_step_s()
            spying_s = SPIED_STEPS * step_s * len(self._live())
            self._budget.pay_once(max(0.0, verifying_s - spying_s) if self._is_profiled else 0.0)
            if step_s:
                self._budget.expect("steps", step_s * self._plan.study.protocol.steps_per_turn)
            # A trial ends by evaluating, which takes what building it took: that was a step, and losses as well.
            self._budget.foresee(building_s + self._catching_up_s(), len(self._slots))
            self._train()
            self._each("save_adapter")
            if self._serves:
                self._generate()
            if any(len(launch) > 1 for launch in self._group.launches):
                self._each("close")
        finally:
            for worker in set(self._workers.values()):
                worker.close()
        cold = self._live("cold")
        self._ended = set(self._records) - set(cold)
        for trial in cold:  # all processes have ended: nothing shares the device with a cold start
            self._watcher.trial_phase(self._slots[trial], "cold")
            begin = self._budget.clock()
            fragment = self._cold(trial)
            self._budget.pay_once(self._budget.clock() - begin, COLD)
            self._add(trial, fragment)
            self._raise_refused(trial, fragment)
            self._ended.add(trial)
        for slot in self._group.slots:
            self._executors[slot.arm].clear_place(slot.trial)

    @property
    def _serves(self) -> bool:
        """Whether anything is measured of its trials beside their steps."""
        return any(set(slot.measures) - {"steps"} for slot in self._group.slots)

    def _generate(self) -> None:
        self._budget.pass_to(SERVING)
        self._each("begin_generate")
        self._in_turns("requests", self._group.requests)
        self._in_turns("natural", self._group.natural)
        self._each("untrained")
        self._each("end_generate")
        self._budget.pass_to(MERGING)
        self._each("merge")
        self._in_turns("merged", self._group.requests)

    def _train(self) -> None:
        """The timed turns and the untimed steps that they leave; fewer of both where the time does not suffice."""
        protocol = self._plan.study.protocol
        begin, saving_s = time.monotonic(), self._saving_s
        turns = self._in_turns("steps", self._group.turns, steps=protocol.steps_per_turn)
        wall_time_s = time.monotonic() - begin - (self._saving_s - saving_s)
        timed = self._live("steps")
        for trial in timed:
            self._add(trial, Fragment(values={"turns_wall_time_s": wall_time_s}))
        planned = max((self._slots[trial].contender.rounds_after_turns(protocol) for trial in timed), default=0)
        orders = tuple(self._group.turns[number % len(self._group.turns)] for number in range(planned))
        # In rounds as well: a command that trained for hours could neither be cut nor be told from one that hangs.
        untimed = self._in_turns("epochs", orders, steps=protocol.steps_per_turn)
        dropped = len(self._group.turns) - turns
        if timed and (dropped or untimed < planned):
            # All after the same step, if not the planned one: that of the longest warm-up that there was so far.
            warm_up = self._budget.settle_warm_up(max(self._warm_ups(), default=0))
            shorter = protocol.warmup_steps_max - warm_up
            last = protocol.total_steps - shorter + (untimed - dropped) * protocol.steps_per_turn
            self._each("finish_training", steps=last)
        else:
            self._each("finish_training")

    def _catching_up_s(self) -> float:
        """Seconds of the untimed steps that shorter warm-ups than the longest leave to be taken."""
        seconds = 0.0
        for trial in self._live("steps"):
            times = self._records[trial].samples.get("warmup_step_time_s", ())
            if times:
                seconds += (self._plan.study.protocol.warmup_steps_max - len(times)) * times[-1]
        return seconds

    @property
    def _is_profiled(self) -> bool:
        return any(slot.instrument == "profile" for slot in self._group.slots)

    def _warm_ups(self) -> list[int]:
        """How many steps it took each trial to warm up."""
        return [len(self._records[trial].samples.get("warmup_step_time_s", ())) for trial in self._live("steps")]

    def _warm_step_s(self) -> float:
        """Seconds of a warm step, in the mean of the trials."""
        times = [self._records[trial].samples.get("warmup_step_time_s", ()) for trial in self._live()]
        last = [one[-1] for one in times if one]
        return sum(last) / len(last) if last else 0.0

    def interrupt(self) -> None:
        """Mark what was under way."""
        self._break_off("Interrupted", "stopped by the user")

    def abandon(self, error: Exception) -> None:
        """Mark what was under way when the parent itself failed, for which no trial is to blame."""
        self._break_off(type(error).__name__, f"the parent failed: {error}")

    def _break_off(self, kind: str, message: str) -> None:
        """What has not come to its end was interrupted, or not run if it had not begun."""
        for trial in self._live():
            if trial not in self._ended:
                status: Status = "interrupted" if trial in self._begun else "not_run"
                self._add(trial, Fragment().failed(status, Failure(phase="run", kind=kind, message=message)))

    def records(self) -> Iterable[TrialRecord]:
        """The group's records in the order of the plan."""
        return self._records.values()

    def _launch(self, launch: tuple[Slot, ...]) -> None:
        for slot in launch:
            self._begun[slot.trial] = time.time(), time.monotonic()
        try:
            worker = self._executors[launch[0].arm].launch()
        except WorkerLostError as lost:
            for slot in launch:
                self._add(slot.trial, Fragment().failed(lost.status, lost.failure))
            return
        except BaseException:  # there is no process, so these have not begun
            for slot in launch:
                del self._begun[slot.trial]
            raise
        log = launch[0].trial  # trials of one process print into one log
        for slot in launch:  # all of them before any is asked: should it die then, it is a row for each
            self._workers[slot.trial] = worker
            self._add(slot.trial, Fragment(values={"start_latency_s": worker.start_latency_s}))
            self._records[slot.trial] = self._records[slot.trial].replaced(log=f"logs/{log}.log")
        for slot in launch:
            if self._records[slot.trial].status != "ok":
                continue
            place = self._executors[slot.arm].make_place(slot.trial, log)
            request = self._requests[slot.trial] = request_of(self._plan, slot, self._site, place)
            self._ask(slot.trial, "prepare", request=codec.to_json(request))

    def _live(self, measure: Measure | None = None) -> list[str]:
        """Trials that are still ok and, if a measure is given, are there to measure it."""
        return [
            trial
            for trial, record in self._records.items()
            if record.status == "ok" and (measure is None or measure in self._slots[trial].measures)
        ]

    def _due(self, command: Command) -> bool:
        """Whether the plan has the command's phase; training is part of every plan."""
        return command.phase == "train" or command.phase in self._plan.phases

    def _each(self, word: str, **arguments: Any) -> None:
        """One command of all trials that are there for it, one after the other."""
        command = COMMANDS[word]
        if not self._due(command):
            return
        for trial in self._live(command.measure):
            self._ask(trial, word, **arguments)
        self._checkpoint(word)

    def _in_turns(self, kind: RoundKind, rounds: tuple[tuple[str, ...], ...], **arguments: Any) -> int:
        """The rounds that the time allows, each by all trials that are there for it; returns how many these were."""
        command = ROUNDS[kind]
        if not self._due(command):
            return len(rounds)
        measuring = self._live("steps" if kind == "epochs" else kind)
        if not rounds or not measuring:
            return len(rounds)
        taken = 0
        for order in self._budget.rounds(kind, rounds, len(measuring)):
            for trial in order:
                if trial in measuring:
                    self._ask(trial, command.word, **arguments)
            taken += 1
            self._checkpoint(command.word)
        if taken < len(rounds):
            counts = {f"{kind}_rounds": float(taken), f"{kind}_rounds_planned": float(len(rounds))}
            for trial in measuring:
                self._add(trial, Fragment(values=counts))
        return taken

    def _checkpoint(self, command: str) -> None:
        """Save what every trial has so far; nothing is timed between the commands of a round and those of the next.

        The evidence of the checks is left out: it is half of a record, and the record at the end has it.
        """
        now = self._budget.clock()
        if not checkpoint_is_due(now, begun_s=self._entered, saved_s=self._saved):
            return
        begin = time.monotonic()
        failure = Failure(phase=command, kind=UNDER_WAY, message=f"under way when this was written, after {command}")
        for record in self._records.values():
            if record.status == "ok":
                record = record.replaced(status="interrupted", failure=failure, checks=())
            self._save(record)
        self._saving_s += time.monotonic() - begin
        self._saved = self._budget.clock()

    def _ask(self, trial: str, command: str, **arguments: Any) -> None:
        if self._records[trial].status != "ok":
            return
        if COMMANDS[command].by == "trial":
            self._watcher.trial_phase(self._slots[trial], command)
        worker = self._workers[trial]
        try:
            fragment = worker.ask(command, trial, self._timeout, **arguments)
        except WorkerLostError as lost:  # its death is a row for each trial that it hosted
            for other, host in self._workers.items():
                if host is worker and self._records[other].status == "ok":
                    self._add(other, Fragment().failed(lost.status, lost.failure))
            return
        self._add(trial, fragment, turn=arguments["steps"] if COMMANDS[command] is ROUNDS["steps"] else None)
        self._raise_refused(trial, fragment)

    def _raise_refused(self, trial: str, fragment: Fragment) -> None:
        """What the system refuses to this trial it would refuse to the next ones, and none of them is to blame."""
        if fragment.failure is not None and fragment.failure.kind == REFUSED:
            raise RefusedError(f"{trial} in {fragment.failure.phase}: {fragment.failure.message}")

    def _cold(self, trial: str) -> Fragment:
        try:
            fragment = self._executors[self._slots[trial].arm].cold_start(self._requests[trial])
        except WorkerLostError as lost:
            return Fragment().failed(lost.status, lost.failure)
        if fragment.status != "ok":  # it says itself why it has no answer
            return fragment
        warm, cold = self._records[trial].tokens.get("completion"), fragment.tokens.get("cold_completion")
        if warm is not None and warm != cold:  # it would be the cold start of another model
            message = f"the new interpreter answered {cold} where the trained process had answered {warm}"
            return fragment.failed("invalid", Failure(phase="cold", kind="OtherCompletion", message=message))
        return fragment

    def _add(self, trial: str, fragment: Fragment, turn: int | None = None) -> None:
        record = self._records[trial].merged(fragment)
        changes: dict[str, Any] = {"tokens": record.tokens | self._site.of(self._slots[trial].workload).tokens}
        if trial in self._begun:
            started_unix_s, begin = self._begun[trial]
            changes |= {"started_unix_s": started_unix_s, "wall_time_s": time.monotonic() - begin}
        if turn is not None:
            changes["turn_lengths"] = (*record.turn_lengths, len(fragment.samples.get("step_time_s", ())))
        record = record.replaced(**changes)
        if flaw := flaw_of(record):  # no reader would take it, and with it the whole run
            failure = Failure(phase="record", kind="Unreadable", message=flaw)
            record = self._records[trial].merged(Fragment().failed("invalid", failure))
        self._records[trial] = record
