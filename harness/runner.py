"""The parent's loop: conduct a plan group by group, one command at a time, and keep what comes back.

The parent only ever blocks on an answer; it redraws between turns. Each trial ends as a record whatever happens to it:
a lost worker, an exception in the child, Ctrl-C. The sweep goes on after a failed trial, and the summary carries what
the exit code must say.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness import codec
from harness.executors import Executor, Worker, WorkerLostError
from harness.plan import Group, Plan, Slot
from harness.record import Failure, Fragment, Status, TrialRecord, TrialRequest


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


def run_plan(
    plan: Plan, executor: Executor, site: Site, *, save: Callable[[TrialRecord], None], watcher: Watcher
) -> tuple[TrialRecord, ...]:
    """Measure every trial of the plan; each record is saved as soon as its trial has ended.

    On KeyboardInterrupt the trials under way are recorded as `interrupted`, those that never began as `not_run`.
    """
    records: list[TrialRecord] = []

    def keep(record: TrialRecord) -> None:
        save(record)
        records.append(record)
        watcher.trial_ended(record)

    remaining = list(plan.groups)
    interrupted = False
    while remaining and not interrupted:
        conductor = _Conductor(plan, remaining.pop(0), executor, site, watcher)
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
    for slot in (slot for group in remaining for slot in group.slots):
        keep(_blank(plan, slot, "not_run"))
    return tuple(records)


class _Conductor:
    """One group: its workers are live together and take the turns that the plan says."""

    def __init__(self, plan: Plan, group: Group, executor: Executor, site: Site, watcher: Watcher) -> None:
        self._plan = plan
        self._group = group
        self._executor = executor
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
            for order in self._group.turns:
                for trial in order:
                    self._ask(trial, "turn", steps=steps)
            self._each("finish_training")
            if "cold" in self._plan.phases:
                self._each("save_adapter")
            if "generate" in self._plan.phases:
                self._each("generate")
        finally:
            for worker in set(self._workers.values()):
                worker.close()
        if "cold" in self._plan.phases:
            for trial in self._live():
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
            worker = self._executor.launch()
        except WorkerLostError as lost:
            for slot in launch:
                self._add(slot.trial, Fragment().failed(lost.status, lost.failure))
            return
        for slot in launch:
            self._workers[slot.trial] = worker
            self._add(slot.trial, Fragment(values={"start_latency_s": worker.start_latency_s}))
            request = _request(self._plan, slot, self._site)
            Path(request.scratch).mkdir(parents=True, exist_ok=True)
            self._ask(slot.trial, "prepare", request=codec.to_json(request))

    def _live(self) -> list[str]:
        return [trial for trial, record in self._records.items() if record.status == "ok"]

    def _each(self, command: str) -> None:
        for trial in self._live():
            self._ask(trial, command)

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
            fragment = self._executor.cold_start(_request(self._plan, self._slots[trial], self._site))
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
        interleaving=plan.interleaving,
        seed=slot.seed,
        started_unix_s=0.0,
        wall_time_s=0.0,
        log=f"logs/{slot.trial}.log",
    )


def _request(plan: Plan, slot: Slot, site: Site) -> TrialRequest:
    study = plan.study
    return TrialRequest(
        trial=slot.trial,
        variant=slot.variant,
        role=slot.role,
        replicate=slot.replicate,
        seed=slot.seed,
        workload=study.workload,
        protocol=study.protocol,
        interleaving=plan.interleaving,
        phases=plan.phases,
        device=site.device,
        threads=site.threads,
        tokens_path=site.tokens_path,
        scratch=str(site.scratch / slot.trial),
        log_path=str((site.run_path / "logs" / f"{slot.trial}.log").resolve()),
        allow_fallback=study.allow_fallback,
        requirements=study.requirements,
    )
