"""The parent's loop: conduct a plan group by group, one command at a time, and keep what comes back.

The parent only ever blocks on an answer; it redraws between turns. Each trial ends as a record whatever happens to it:
a lost worker, an exception in the child, Ctrl-C. The sweep goes on after a failed trial, and the summary carries what
the exit code must say.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness import codec
from harness.executors import Executor, Worker, WorkerLostError
from harness.plan import Group, Plan, Slot
from harness.record import Failure, Fragment, Measure, Status, TrialRecord, TrialRequest


class Watcher(Protocol):
    """Is told what is going on, between turns; must return quickly."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has its record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run happens: what every request of it has in common."""

    run_path: Path
    scratch: Path
    device: str
    threads: int
    tokens_path: str
    tokens: dict[str, Any]


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
) -> Measured:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended.

    On KeyboardInterrupt the trials under way are recorded as `interrupted`, those that never began as `not_run`.
    Replicates that `stop` makes needless leave no record.
    """
    records: list[TrialRecord] = []

    def keep(record: TrialRecord) -> None:
        save(record)
        records.append(record)
        watcher.trial_ended(record)

    remaining = list(plan.groups)
    interrupted = False
    while remaining and not interrupted:
        group = remaining.pop(0)
        conductor = _Conductor(plan, group, executors, site, watcher)
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
        if error is not None:
            for slot in (slot for group in remaining for slot in group.slots):
                keep(_blank(plan, slot, "not_run"))
            raise error
        between = bool(remaining) and remaining[0].replicate != group.replicate
        if between and not interrupted and (reason := stop(records)):
            return Measured(records=tuple(records), stopped=reason)
    for slot in (slot for group in remaining for slot in group.slots):
        keep(_blank(plan, slot, "not_run"))
    return Measured(records=tuple(records))


class _Conductor:
    """One group: its workers are live together and take the turns that the plan says."""

    def __init__(
        self, plan: Plan, group: Group, executors: Mapping[str, Executor], site: Site, watcher: Watcher
    ) -> None:
        self._plan = plan
        self._group = group
        self._executors = executors
        self._site = site
        self._watcher = watcher
        self._slots = {slot.trial: slot for slot in group.slots}
        self._records = {slot.trial: _blank(plan, slot, "ok") for slot in group.slots}
        self._begun: dict[str, float] = {}
        self._workers: dict[str, Worker] = {}
        self._timeout = plan.study.protocol.step_timeout_s

    def measure(self) -> None:
        """All phases of all trials of the group; a trial that fails takes no further part."""
        try:
            for launch in self._group.launches:
                self._launch(launch)
            for command in ("build", "verify", "warm_up"):
                self._each(command)
            steps = self._plan.study.protocol.steps_per_turn
            begin = time.monotonic()
            self._in_turns("steps", self._group.turns, "turn", steps=steps)
            for trial in self._live("steps"):
                self._add(trial, Fragment(values={"turns_wall_time_s": time.monotonic() - begin}))
            self._each("finish_training")
            self._each("save_adapter", "cold")
            if "generate" in self._plan.phases:
                self._each("begin_generate")
                self._in_turns("requests", self._group.requests, "request")
                self._in_turns("natural", self._group.requests, "natural")
                self._each("untrained", "natural")
                self._each("end_generate", "peaks")
                self._each("merge", "merged")
                self._in_turns("merged", self._group.requests, "request")
            if any(len(launch) > 1 for launch in self._group.launches):
                self._each("close")
        finally:
            for worker in set(self._workers.values()):
                worker.close()
        for trial in self._live("cold"):  # all processes have ended: nothing shares the device with a cold start
            self._watcher.trial_phase(self._slots[trial], "cold")
            self._add(trial, self._cold(trial))
        for trial in self._records:  # adapters and compile caches of a long run would fill the disk
            shutil.rmtree(self._site.scratch / trial, ignore_errors=True)

    def interrupt(self) -> None:
        """Mark what was under way."""
        for trial, record in self._records.items():
            status: Status = "interrupted" if trial in self._begun else "not_run"
            if record.status == "ok":
                failure = Failure(phase="run", kind="Interrupted", message="stopped by the user")
                self._add(trial, Fragment().failed(status, failure))

    def abandon(self, error: Exception) -> None:
        """Mark what was under way when the parent itself failed."""
        for trial, record in self._records.items():
            if record.status == "ok":
                failure = Failure(phase="run", kind=type(error).__name__, message=f"the parent failed: {error}")
                self._add(trial, Fragment().failed("crashed", failure))

    def records(self) -> Iterable[TrialRecord]:
        """The group's records in the order of the plan."""
        return self._records.values()

    def _launch(self, launch: tuple[Slot, ...]) -> None:
        for slot in launch:
            self._begun[slot.trial] = time.time()
        try:
            worker = self._executors[launch[0].arm].launch()
        except WorkerLostError as lost:
            for slot in launch:
                self._add(slot.trial, Fragment().failed(lost.status, lost.failure))
            return
        for slot in launch:
            self._workers[slot.trial] = worker
            self._add(slot.trial, Fragment(values={"start_latency_s": worker.start_latency_s}))
            log = launch[0].trial if len(launch) > 1 else slot.trial  # trials of one process print into one log
            self._records[slot.trial] = self._records[slot.trial].replaced(log=f"logs/{log}.log")
            request = _request(self._plan, slot, self._site, log)
            Path(request.scratch).mkdir(parents=True, exist_ok=True)
            self._ask(slot.trial, "prepare", request=codec.to_json(request))

    def _live(self, measure: Measure | None = None) -> list[str]:
        """Trials that are still ok and, if a measure is given, are there to measure it."""
        return [
            trial
            for trial, record in self._records.items()
            if record.status == "ok" and (measure is None or measure in self._slots[trial].measures)
        ]

    def _each(self, command: str, measure: Measure | None = None) -> None:
        for trial in self._live(measure):
            self._ask(trial, command)

    def _in_turns(self, measure: Measure, rounds: tuple[tuple[str, ...], ...], command: str, **arguments: Any) -> None:
        for order in rounds:
            for trial in order:
                if measure in self._slots[trial].measures:
                    self._ask(trial, command, **arguments)

    def _ask(self, trial: str, command: str, **arguments: Any) -> None:
        if self._records[trial].status != "ok":
            return
        if command != "prepare":
            self._watcher.trial_phase(self._slots[trial], command)
        worker = self._workers[trial]
        try:
            fragment = worker.ask(command, trial, self._timeout, **arguments)
        except WorkerLostError as lost:  # its death is a row for each trial that it hosted
            for other, host in self._workers.items():
                if host is worker and self._records[other].status == "ok":
                    self._add(other, Fragment().failed(lost.status, lost.failure))
            return
        self._add(trial, fragment, turn=arguments.get("steps") if command == "turn" else None)

    def _cold(self, trial: str) -> Fragment:
        try:
            slot = self._slots[trial]
            fragment = self._executors[slot.arm].cold_start(_request(self._plan, slot, self._site, trial))
        except WorkerLostError as lost:
            return Fragment().failed(lost.status, lost.failure)
        warm, cold = self._records[trial].tokens.get("completion"), fragment.tokens.get("cold_completion")
        if warm is not None and warm != cold:  # it would be the cold start of another model
            message = f"the new interpreter answered {cold} where the trained process had answered {warm}"
            return fragment.failed("invalid", Failure(phase="cold", kind="OtherCompletion", message=message))
        return fragment

    def _add(self, trial: str, fragment: Fragment, turn: int | None = None) -> None:
        record = self._records[trial].merged(fragment)
        changes: dict[str, Any] = {"tokens": record.tokens | self._site.tokens}
        if trial in self._begun:
            changes |= {"started_unix_s": self._begun[trial], "wall_time_s": time.time() - self._begun[trial]}
        if turn is not None:
            changes["turn_lengths"] = (*record.turn_lengths, len(fragment.samples.get("step_time_s", ())))
        self._records[trial] = record.replaced(**changes)


def _blank(plan: Plan, slot: Slot, status: Status) -> TrialRecord:
    return TrialRecord(
        trial=slot.trial,
        status=status,
        name=slot.variant.name,
        variant=slot.variant.id,
        role=slot.role,
        replicate=slot.replicate,
        position=slot.position,
        interleaving=slot.interleaving,
        side=slot.side,
        seed=slot.seed,
        started_unix_s=0.0,
        wall_time_s=0.0,
        log=f"logs/{slot.trial}.log",
    )


def _request(plan: Plan, slot: Slot, site: Site, log: str) -> TrialRequest:
    study = plan.study
    return TrialRequest(
        trial=slot.trial,
        variant=slot.variant,
        role=slot.role,
        replicate=slot.replicate,
        seed=slot.seed,
        workload=study.workload,
        protocol=study.protocol,
        interleaving=slot.interleaving,
        measures=slot.measures,
        instrument=slot.instrument,
        injected_rows=slot.injected_rows,
        device=site.device,
        threads=site.threads,
        tokens_path=site.tokens_path,
        scratch=str(site.scratch / slot.trial),
        log_path=str((site.run_path / "logs" / f"{log}.log").resolve()),
        allow_fallback=study.allow_fallback,
        requirements=study.requirements,
    )
