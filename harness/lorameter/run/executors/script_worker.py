"""One trial of a script: the words that any trial is asked, carried out by letting the script take its own steps.

build             it is waited for until it stands before its first step
verify            the first step, and one that kernels_check watches where a study or the first replicate asks for it
warm_up           steps until their times are steady, by the rule of every trial
turn              timed steps
finish_training   steps up to the number that all trials of the study take; peaks; the end

The script is told that no step follows, and when its training has ended it is killed where it stands: whatever it would
do next was not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorameter.attach.exit_status import loss_not_finite
from lorameter.attach.observer import StepReading
from lorameter.attach.samples import timed_samples, untimed_samples
from lorameter.errors import UsageError
from lorameter.machine.affinity import cpus_of, has_children, pin_to_cpus
from lorameter.records import codec
from lorameter.records.record import Failure, Notice, PartialRecord
from lorameter.records.requirements import judge_required
from lorameter.records.units import format_count
from lorameter.run.executors import WorkerLostError
from lorameter.run.executors.channel import GarbledError
from lorameter.run.executors.script_client import EndedError, Script
from lorameter.run.executors.script_messages import Begun
from lorameter.run.executors.script_process import ScriptProcess
from lorameter.run.executors.script_watch import ScriptWatch
from lorameter.stats import is_steady
from lorameter.studies.request import TrialRequest

WARMUP = ("warmup_loss", "warmup_tokens")
"""Samples of the steps before the timed ones."""
BEFORE_WARMUP = 2
"""The first step, and the one that may be watched."""

Start = Callable[[TrialRequest], ScriptProcess]
"""Starts a trial's process."""


class ScriptWorker:
    """A process of one script; implements `Worker`. Its process is started when its trial is prepared."""

    start_latency_s = 0.0
    """What it takes to come to the first step is `ready_time_s` in its record."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._parts: tuple[TrialRequest, Script] | None = None
        self._begun: Begun | None = None
        self._watch: ScriptWatch | None = None
        self._timeout_s = 0.0
        self._cpus: tuple[int, ...] = ()

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Carry out a command. Raises `WorkerLostError` where the process says what nobody understands."""
        self._timeout_s = timeout_s
        try:
            method: Callable[..., PartialRecord] = getattr(self, f"_do_{command}")
            return method(**arguments)
        except EndedError as ended:
            self._kill()
            failure = Failure(phase=command, kind=ended.kind, message=ended.message, traceback=ended.traceback)
            partial = timed_samples([ended.partial]) if command == "turn" and ended.partial else {}
            return PartialRecord(samples=partial).failed(ended.status, failure)
        except (GarbledError, UsageError) as error:
            self._kill()
            message = f"the script's process gave no answer that can be read, and was killed: {error}"
            raise WorkerLostError("crashed", Failure(phase=command, kind="Garbled", message=message)) from None

    def close(self) -> None:
        """End all that was started."""
        if self._parts is not None:
            self._script.process.close()

    def cpus(self) -> tuple[int, ...]:
        """All that the training may compute on; none where more than one thread, rank or process is at work for it,
        which would be in each other's way on one of them."""
        begun = self._begun
        if begun is None or begun.cuda or begun.ranks != 1 or begun.threads != 1 or has_children(begun.pid):
            return ()
        self._cpus = self._cpus or cpus_of(begun.pid)
        return self._cpus

    def sit(self, cpu: int) -> None:
        """Compute on one of them until it stands up."""
        if self._begun is not None:
            pin_to_cpus(self._begun.pid, {cpu})

    def stand(self) -> None:
        """Compute on any of them again."""
        if self._begun is not None:
            pin_to_cpus(self._begun.pid, self._cpus)

    # --- the words ----------------------------------------------------------------------------------------------------

    def _do_prepare(self, request: dict[str, Any]) -> PartialRecord:
        asked = codec.from_json(TrialRequest, request, "trial request")
        log = Path(asked.log_path)
        log_begin = log.stat().st_size if log.is_file() else 0
        try:
            self._parts = asked, Script(self._start(asked), log, log_begin)
        except (OSError, UsageError) as error:
            raise EndedError("crashed", "CannotStart", f"the command could not be started: {error}") from None
        return PartialRecord()

    def _do_build(self) -> PartialRecord:
        self._begun = begun = self._script.begin(self._timeout_s)
        ready_time_s = self._script.process.age_s()
        protocol = self._asked.protocol
        least = BEFORE_WARMUP + protocol.warmup_steps_min + protocol.turns * protocol.steps_per_turn
        if begun.planned_steps is not None and begun.planned_steps < least:
            raise EndedError(
                "invalid",
                "TooFewSteps",
                f"the script trains {begun.planned_steps} steps, and at least {least} are measured. Have it train "
                "longer (it is stopped when it has taken them), or ask for fewer turns in [protocol].",
            )
        self._watch = ScriptWatch(begun.cuda)
        names = ("threads", "trainable_parameters", "total_parameters", "accumulation", "ranks")
        values = {name: float(value) for name in names if (value := getattr(begun, name)) is not None}
        tokens: dict[str, Any] = {"source": begun.source}
        if begun.trainable_dtypes:
            tokens["trainable_dtype"] = ", ".join(sorted(begun.trainable_dtypes))
        values["ready_time_s"] = ready_time_s
        return PartialRecord(values=values, tokens=tokens, memory=begun.memory, software=begun.software)

    def _do_verify(self) -> PartialRecord:
        first, required = self._take(1), {**self._own_required, **self._asked.requirements}
        looked_at = bool(required) or self._asked.replicate == 0
        taken = [*first, *self._take(1, watch=required if looked_at else None)]
        checks = tuple(codec.to_json(check) for one in taken for check in one.checks or ())
        fragment = judge_losses(
            PartialRecord(
                checks=checks,
                values={"first_step_time_s": first[0].step_time_s},
                samples=untimed_samples(*WARMUP, taken),
                tokens={"loss_dtype": first[0].loss_dtype} if first[0].loss_dtype else {},
            ),
            taken,
        )
        if fragment.status != "ok":
            return fragment
        name, allowed = self._asked.variant.name, self._asked.allow_fallback
        return judge_required(fragment, required, name=name, allow_fallback=allowed)

    def _do_warm_up(self, steps: int | None = None) -> PartialRecord:
        protocol = self._asked.protocol
        taken: list[StepReading] = []
        times: list[float] = []
        while len(times) < (self._warmup_steps_max() if steps is None else steps):
            taken += self._take(1)
            times.append(taken[-1].step_time_s)
            if steps is None and len(times) >= protocol.warmup_steps_min and is_steady(times):
                break
        fragment = PartialRecord(
            samples={"warmup_step_time_s": tuple(times), **untimed_samples(*WARMUP, taken)},
            values={} if steps is not None else {"warmup_steady": float(is_steady(times))},
        )
        return judge_losses(fragment, taken)

    def _do_turn(self, steps: int) -> PartialRecord:
        watch = self._watch or ScriptWatch(False)
        watch.begin()
        taken = self._take(steps)
        return judge_losses(PartialRecord(samples=timed_samples([taken]), values=watch.end()), taken)

    def _do_finish_training(self, steps: int | None = None) -> PartialRecord:
        last = BEFORE_WARMUP - 1 + (self._asked.protocol.total_steps if steps is None else steps)
        planned = self._begun.planned_steps if self._begun is not None else None
        last = last if planned is None else min(last, planned)
        taken: list[StepReading] = []
        notices: tuple[Notice, ...] = ()
        memory: dict[str, int] = {}
        try:
            while self._script.steps < last:
                taken += self._take(1)
            memory = self._script.peaks(self._timeout_s)
            notices = self._stopped(self._script.stop())
        except EndedError as ended:
            if ended.kind != "EndedEarly":
                raise
            notices = (self._ended_early(),)
        self._kill()
        values = {"training_steps": float(self._script.steps)}
        values |= {} if steps is None else {"training_steps_planned": float(self._asked.protocol.total_steps + 1)}
        samples = untimed_samples("remaining_loss", "remaining_tokens", taken)
        fragment = PartialRecord(samples=samples, values=values, memory=memory, notices=notices)
        return judge_losses(fragment, taken)

    def _do_close(self) -> PartialRecord:
        return PartialRecord()

    # --- what they are made of ----------------------------------------------------------------------------------------

    @property
    def _asked(self) -> TrialRequest:
        return self._prepared[0]

    @property
    def _script(self) -> Script:
        return self._prepared[1]

    @property
    def _prepared(self) -> tuple[TrialRequest, Script]:
        if self._parts is None:
            raise EndedError("crashed", "NotStarted", "the trial was asked to run before it was prepared")
        return self._parts

    @property
    def _own_required(self) -> dict[str, Any]:
        return {} if self._begun is None else self._begun.required

    def _take(self, steps: int, watch: dict[str, Any] | None = None) -> list[StepReading]:
        return self._script.take(steps, self._timeout_s, watch=watch)

    def _kill(self) -> None:
        if self._parts is not None:
            self._script.process.kill()

    def _warmup_steps_max(self) -> int:
        """As the protocol says, or what the script's own number of steps leaves of it."""
        protocol = self._asked.protocol
        planned = self._begun.planned_steps if self._begun is not None else None
        left = None if planned is None else planned - BEFORE_WARMUP - protocol.turns * protocol.steps_per_turn
        return protocol.warmup_steps_max if left is None else min(protocol.warmup_steps_max, left)

    def _ended_early(self) -> Notice:
        return Notice(
            code="training-ended-early",
            message=f"{self._asked.trial}: the script's training ended by itself after "
            f"{format_count(self._script.steps, 'step')}, when all timed ones had been taken.",
            remedy="Have it train longer where losses are to be compared: it is stopped when it has taken its steps.",
        )

    def _stopped(self, why: str) -> tuple[Notice, ...]:
        if not why:
            return ()
        notice = Notice(
            code="not-stopped",
            message=f"{self._asked.trial}: the script could not be stopped cleanly after its {self._script.steps} "
            f"steps ({why}); it was killed.",
            remedy="Nothing to do: its steps had been taken, and what it wrote is thrown away.",
        )
        return (notice,)


def judge_losses(fragment: PartialRecord, readings: Sequence[StepReading]) -> PartialRecord:
    """The fragment, as that of an invalid trial where a loss is not finite."""
    for reading in readings:
        if reading.loss is not None and not math.isfinite(reading.loss):
            return fragment.failed("invalid", loss_not_finite(reading))
    return fragment
