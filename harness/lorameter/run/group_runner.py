"""One group of a plan, conducted: its processes are live together and take the turns that the plan says.

Whatever is timed is alone: the parent sends one command and blocks on the answer. What is not is carried out on all
idle cores at once (`lorameter.run.parallel`), and nothing is timed before the last of it has been answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord, TrialRecord
from lorameter.records.time_breakdown import Allocation
from lorameter.run.budget import Budget
from lorameter.run.costs import COLD, MERGING, SERVING
from lorameter.run.cpu_pinning import CpuPinning
from lorameter.run.dispatch import Dispatcher, PhaseListener, raise_refused
from lorameter.run.executors import Executor, Worker, WorkerLostError
from lorameter.run.foresight import ReplicateCostEstimate, warmup_lengths
from lorameter.run.group_records import GroupRecords
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.shared_checks import find_askers, told_by
from lorameter.run.thinning import Part, parts_in
from lorameter.run.trial_setup import RunContext, request_of
from lorameter.studies.command import COMMANDS, ROUNDS, Command, RoundKind
from lorameter.studies.request import TrialRequest


class ProgressListener(PhaseListener, Protocol):
    """Is told what is going on, between turns; must return quickly."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has its record."""


class GroupRunner:
    """One group: its workers are live together and take the turns that the plan says; `later` are the groups of its
    replicate that come after it."""

    def __init__(
        self,
        plan: Plan,
        group: Group,
        executors: Mapping[str, Executor],
        site: RunContext,
        watcher: ProgressListener,
        save: Callable[[TrialRecord], None],
        budget: Budget,
        attempt: int = 0,
        later: Iterable[Group] = (),
    ) -> None:
        self._plan = plan
        self._group = group
        self._executors = executors
        self._site = site
        self._watcher = watcher
        self._budget = budget
        self._sheet = GroupRecords(group, site, save, budget.clock, attempt)
        self._askers = find_askers(group.slots)
        self._foresight = ReplicateCostEstimate(plan, group, tuple(later), budget, site)
        self.left_out: set[Part] = set()
        """What there was no time for after all."""
        self._requests: dict[str, TrialRequest] = {}
        timeout_s = plan.study.protocol.step_timeout_s
        self._asking = Dispatcher(self._sheet, watcher, budget.clock, lanes=site.lanes, timeout_s=timeout_s)
        self._asking.first = frozenset(self._askers.values())

    def measure(self) -> None:
        """All phases of all trials of the group; a trial that fails takes no further part."""
        try:
            for launch in self._group.launches:
                self._launch(launch)
            self._prepare()
            self._train()
            self._each("save_adapter")
            if self._serves:
                self._generate()
            if any(len(launch) > 1 for launch in self._group.launches):
                self._each("close")
        finally:
            for worker in set(self._asking.workers.values()):
                worker.close()
        cold = self._sheet.live("cold")
        self._sheet.ended |= set(self._sheet.records) - set(cold)
        for trial in cold:  # all processes have ended: nothing shares the device with a cold start
            self._watcher.trial_phase(self._sheet.slots[trial], "cold")
            begin = self._budget.clock()
            fragment = self._cold(trial)
            seconds = self._budget.clock() - begin
            self._budget.pay_once(seconds, COLD)
            self._budget.ledger.measured("cold", seconds)
            self._sheet.add(trial, fragment)
            raise_refused(trial, fragment)
            self._sheet.ended.add(trial)
        for slot in self._group.slots:
            self._executors[slot.arm].clear_place(slot.trial)

    def _prepare(self) -> None:
        """From the first step of each to where nothing but timed turns are left to be taken. Where these processes are
        the first of all, their first step is waited for: it says what to expect."""
        words: tuple[str, ...] = ("build", "verify", "warm_up")
        if self._foresight.waits:
            building = self._each("build")["build"]
            self._ask_others()
            self._tell_others("build")
            self._foresight.built(self._sheet, building)
            words = words[1:]
        took = self._each(*words, warm_up={} if self._shares_warm_up else self._brief)
        self._tell_others("verify")
        self._foresight.warmed(self._sheet, took, shared=self._shares_warm_up)

    @property
    def _serves(self) -> bool:
        """Whether anything is measured of its trials beside their steps."""
        served = set(parts_in([self._group])) - {"steps", "peaks", "losses"}
        return bool(served) or not self._group.turns

    @property
    def _brief(self) -> dict[str, bool]:
        """Has what is not timed be short where minutes are; an older side of an A/B does not know the word."""
        return {"brief": True} if self._budget.is_tight and not self._group.slots[0].side else {}

    @property
    def _shares_warm_up(self) -> bool:
        """Whether its trials were told how long their warm-up need be."""
        return any(request.warm_up_steps is not None for request in self._requests.values())

    def _generate(self) -> None:
        self._budget.pass_to(SERVING)
        brief = self._brief
        self._each("begin_generate", begin_generate=brief)
        self._foresight.served(self._sheet, "requests")
        if self._has_room("requests"):
            self._in_turns("requests", self._group.requests)
        if self._has_room("open_ended"):
            self._in_turns("open_ended", self._group.open_ended)
            self._each("base_answers")
        self._each("end_generate")
        for trial in self._sheet.live("cold"):  # what it answers must be known, though nobody has asked it anything
            owes = brief and "completion" not in self._sheet.records[trial].tokens
            if owes and self._due(COMMANDS["end_generate"]):
                self._asking.ask(trial, "end_generate")
        self._budget.pass_to(MERGING)
        if self._has_room("merged"):
            self._each("merge", merge=self._brief)
            self._foresight.served(self._sheet, "merged")
            self._in_turns("merged", self._group.requests)

    def _has_room(self, kind: Literal["requests", "open_ended", "merged"]) -> bool:
        if not self._sheet.live(kind) or self._budget.has_room(self._plan, kind):
            return True
        self.left_out.add(kind)
        return False

    def _train(self) -> None:
        """The timed turns and the untimed steps that they leave; fewer of both where the time does not suffice."""
        protocol, sheet = self._plan.study.protocol, self._sheet
        begin, saving_s = time.monotonic(), sheet.saving_s
        timed = sheet.live("steps")
        each = self._budget.turn_steps(len(self._group.turns), len(timed)) if timed else protocol.steps_per_turn
        turns = self._in_turns("steps", self._group.turns, more=self._foresight.further_turns(), steps=each)
        wall_time_s = time.monotonic() - begin - (sheet.saving_s - saving_s)
        if timed and self._budget.is_limited and self._group.turns:
            self._budget.ledger.allocated(
                Allocation(
                    replicate=self._group.replicate,
                    turns=turns,
                    steps_per_turn=each,
                    planned=len(self._group.turns),
                    optimum=self._budget.optimum,
                )
            )
        timed = sheet.live("steps")
        for trial in timed:
            sheet.add(trial, PartialRecord(values={"turns_wall_time_s": wall_time_s}))
        planned = max((sheet.slots[trial].contender.rounds_after_turns(protocol) for trial in timed), default=0)
        orders = tuple(self._group.turns[number % len(self._group.turns)] for number in range(planned))
        # In rounds as well: a command that trained for hours could neither be cut nor be told from one that hangs.
        untimed = self._in_turns("epochs", orders, steps=protocol.steps_per_turn)
        taken = turns * each + untimed * protocol.steps_per_turn
        arguments: dict[str, Any] = {} if self._group.held_out else {"held_out": False}
        if timed and (self._shares_warm_up or taken != (len(self._group.turns) + planned) * protocol.steps_per_turn):
            # All after the same step, if not the planned one: that of the longest warm-up that there was so far.
            longest = max(warmup_lengths(sheet), default=0)
            before = 1 + (longest if self._shares_warm_up else self._budget.settle_warm_up(longest))
            arguments["steps"] = before + taken
            if turns > len(self._group.turns):
                arguments["least"] = before + turns * each
        finishing = self._each("finish_training", finish_training=arguments)
        self._foresight.ended(sheet, finishing["finish_training"])

    def interrupt(self) -> None:
        """Mark what was under way."""
        self._sheet.break_off("Interrupted", "stopped by the user")

    def abandon(self, error: Exception) -> None:
        """Mark what was under way when the parent itself failed, for which no trial is to blame."""
        self._sheet.break_off(type(error).__name__, f"the parent failed: {error}")

    def records(self) -> Iterable[TrialRecord]:
        """The group's records in the order of the plan."""
        return self._sheet.records.values()

    def _launch(self, launch: tuple[Slot, ...]) -> None:
        sheet = self._sheet
        if rehearsal := self._plan.failed.get(launch[0].contender.name):  # of scripts, which have a process each
            trial = launch[0].trial
            sheet.add(trial, PartialRecord(status=rehearsal.status, failure=rehearsal.failure))
            sheet.records[trial] = sheet.records[trial].replaced(log=rehearsal.log)
            return
        sheet.begin(launch)
        try:
            worker = self._executors[launch[0].arm].launch()
        except WorkerLostError as lost:
            for slot in launch:
                sheet.add(slot.trial, PartialRecord().failed(lost.status, lost.failure))
            return
        except BaseException:  # there is no process, so these have not begun
            sheet.unbegin(launch)
            raise
        log = launch[0].trial  # trials of one process print into one log
        for slot in launch:  # all of them before any is asked: should it die then, it is a row for each
            self._asking.workers[slot.trial] = worker
            sheet.add(slot.trial, PartialRecord(values={"start_latency_s": worker.start_latency_s}))
            sheet.records[slot.trial] = sheet.records[slot.trial].replaced(log=f"logs/{log}.log")
        for slot in launch:
            if not sheet.is_ok(slot.trial):
                continue
            place = self._executors[slot.arm].make_place(slot.trial, log)
            request = self._requests[slot.trial] = request_of(
                self._plan,
                slot,
                self._site,
                place,
                asks_base=self._askers[slot.trial] == slot.trial,
                natural=self._foresight.is_natural(slot),
                warm_up_steps=self._foresight.warm_up_steps(slot),
            )
            self._asking.ask(slot.trial, "prepare", request=codec.to_json(request))

    def _due(self, command: Command) -> bool:
        """Whether the plan has the command's phase; training is part of every plan."""
        return command.phase == "train" or command.phase in self._plan.phases

    def _each(self, *words: str, **arguments: Mapping[str, Any]) -> dict[str, float]:
        """Commands of all trials that are there for them, none of them timed; the seconds that went to each."""
        took = self._asking.each([word for word in words if self._due(COMMANDS[word])], arguments)
        return dict.fromkeys(words, 0.0) | took

    def _ask_others(self) -> None:
        """Where who was to find out what is the base's has failed, another that stands on it does."""
        left = find_askers(slot for slot in self._group.slots if self._sheet.is_ok(slot.trial))
        for trial, asker in left.items():
            if trial == asker != self._askers[trial]:
                self._asking.own[trial, "verify"] = {"asks_base": True}
        self._askers |= left

    def _tell_others(self, word: str) -> None:
        """What one trial has found out of its base, to those that stand on it as well."""
        for trial in self._sheet.live():
            asker, fallback = self._sheet.records[self._askers[trial]], self._plan.study.allow_fallback
            if asker.trial != trial:
                self._sheet.add(trial, told_by(asker, self._sheet.slots[trial], allow_fallback=fallback, word=word))

    def _in_turns(
        self,
        kind: RoundKind,
        rounds: tuple[tuple[str, ...], ...],
        *,
        more: Iterator[tuple[str, ...]] | None = None,
        **arguments: Any,
    ) -> int:
        """The rounds that the time allows, each by all trials that are there for it; returns how many these were."""
        command = ROUNDS[kind]
        if not self._due(command):
            return len(rounds)
        measuring = self._sheet.live("steps" if kind == "epochs" else kind)
        if not rounds or not measuring:
            return len(rounds)
        taken = 0
        each = arguments.get("steps", 1)
        with CpuPinning(self._seated(command), self._group.replicate) as seats:
            for order in self._budget.rounds(kind, rounds, len(measuring), each=each, more=more):
                seats.begin_round()
                for trial in order:
                    if trial in measuring:
                        begin = self._budget.clock()
                        self._asking.ask(trial, command.name, **arguments)
                        if command.timed:
                            self._budget.ledger.measured(kind, self._budget.clock() - begin)
                taken += 1
                self._sheet.checkpoint(command.name)
        if taken < len(rounds):
            counts = {f"{kind}_rounds": float(taken), f"{kind}_rounds_planned": float(len(rounds))}
            for trial in measuring:
                self._sheet.add(trial, PartialRecord(values=counts))
        return taken

    def _seated(self, command: Command) -> list[Worker]:
        """Workers that are timed on one CPU where there are several: each computes there in one thread of one rank."""
        single = self._site.threads == 1 == max(slot.workload.ranks for slot in self._group.slots)
        seated = command.timed and self._site.device == "cpu" and single
        return list(dict.fromkeys(self._asking.workers.values())) if seated else []

    def _cold(self, trial: str) -> PartialRecord:
        try:
            fragment = self._executors[self._sheet.slots[trial].arm].cold_start(self._requests[trial])
        except WorkerLostError as lost:
            return PartialRecord().failed(lost.status, lost.failure)
        if fragment.status != "ok":  # it says itself why it has no answer
            return fragment
        warm, cold = self._sheet.records[trial].tokens.get("completion"), fragment.tokens.get("cold_completion")
        if warm is not None and warm != cold:  # it would be the cold start of another model
            message = f"the new interpreter answered {cold} where the trained process had answered {warm}"
            return fragment.failed("invalid", Failure(phase="cold", kind="OtherCompletion", message=message))
        return fragment
