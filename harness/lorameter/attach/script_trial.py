"""The trial of a script: it suspends the script's training until its parent requests steps, and measures those.

Other scripts of the same replicate are suspended at the same time, so that only one computes and a slow-down of the
machine affects all of them alike. The process answers the commands of every measuring process (`lorameter.wire`), with
these differences: it sends its first message before the first step of its training, and it finds the connection by the
name of a socket in the environment, which every launcher passes on, unlike an open descriptor.

build             facts of the training before its first step
verify            the first step, and one that kernels_check watches where a study or the first replicate requires it
warm_up           steps until their times are steady
turn              timed steps
finish_training   steps up to the number that all trials of the study take, and peaks

A training is suspended after its last step, and at its end: the script's next actions (evaluate, save, publish) are not
measured. It waits until it is killed, and ends at once if its parent has ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from multiprocessing.connection import Client, Connection
from typing import Any, NoReturn

import torch

from lorameter import wire
from lorameter.attach.launch import SOCKET, socket_address
from lorameter.attach.measures import (
    Peaks,
    complete_columns,
    describe_end,
    loss_not_finite,
    turn_columns,
    untimed_columns,
)
from lorameter.attach.observer import ObserverReply, Phase, StepReading, TrainingInfo
from lorameter.machine.host import host_bytes
from lorameter.machine.provenance import own_software
from lorameter.records import codec
from lorameter.records.os_errors import describe_error
from lorameter.records.record import Failure, Notice, PartialRecord, Status, judge_required
from lorameter.records.units import format_count
from lorameter.stats import is_steady, is_warm
from lorameter.studies.request import Request

EXIT_ORPHAN = 75
"""Exit code of a process whose parent has ended."""
BEFORE_WARMUP = 2
"""The first step, and the step that may be watched."""

Command = Generator[ObserverReply, None, PartialRecord]
"""Yields once for each step that it needs; the step's reading is then in `ScriptTrial._readings`."""


class TrainingOverError(Exception):
    """Raised if no further step will come; it holds the reason."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


class ScriptTrial:
    """Implements `TrainingObserver` in a script's process."""

    _program: Generator[ObserverReply, None, NoReturn]

    def __init__(self) -> None:
        self._steps = 0
        self._readings: list[StepReading] = []
        """The steps of the current command."""
        self._phase = "prepare"

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Wait for commands before the first step of the training."""
        self._training = training
        self._connection = _connect()
        self._program = self._run()
        return next(self._program)

    def step(self, reading: StepReading) -> ObserverReply:
        """Pass the reading of a step to the current command, and wait if that command is done."""
        self._steps += 1
        self._readings.append(reading)
        return next(self._program)

    def phase(self, phase: Phase) -> None:
        """Track memory peaks of evaluation and saving, which are outside all steps."""
        self._peaks.enter(phase)

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Answer with the end of the training, and never return."""
        if error is None:
            self._stop(
                "invalid",
                "EndedEarly",
                f"the script's first training ended by itself after {format_count(self._steps, 'step')}, and more are "
                f"needed. {TRAIN_LONGER}",
            )
        status, failure = describe_end(error, self._phase)
        message = f"{type(error).__name__} in step {self._steps + 1}: {failure.message}"
        self._stop(status, failure.kind, message, failure.traceback)

    def _stop(self, status: Status, kind: str, message: str, traceback: str = "") -> NoReturn:
        """Stop the script; every further command fails for this reason."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the script may have replaced the stream
                stream.flush()
        failure = Failure(phase=self._phase, kind=kind[:120], message=message, traceback=traceback)
        while True:
            self._program.throw(TrainingOverError(status, failure))

    def _run(self) -> Generator[ObserverReply, None, NoReturn]:
        """Send the first message, and execute one command after the other; a yield lets the training run a step."""
        commands: dict[str, Callable[..., Command | PartialRecord]] = {
            "prepare": self._prepare,
            "build": self._build,
            "verify": self._verify,
            "warm_up": self._warm_up,
            "turn": self._turn,
            "finish_training": self._finish,
        }
        try:
            wire.send(self._connection, wire.Hello(pid=os.getpid(), device=torch.device(self._training.device).type))
            while True:
                command = wire.receive(self._connection, wire.Command)
                self._phase, self._readings = command.name, []
                try:
                    record = commands[command.name](**command.arguments)
                    if not isinstance(record, PartialRecord):
                        record = yield from record
                    if (failure := loss_not_finite(self._readings)) is not None:
                        record = record.failed("invalid", failure)
                except TrainingOverError as end:
                    samples = complete_columns(turn_columns(self._readings)) if command.name == "turn" else {}
                    record = PartialRecord(samples=samples).failed(end.status, end.failure)
                except Exception as error:
                    record = PartialRecord().failed(*describe_error(error, command.name))
                wire.send(self._connection, wire.answer_with(record))
        except (wire.ClosedError, wire.GarbledError):
            os._exit(EXIT_ORPHAN)

    def _prepare(self, request: dict[str, Any]) -> PartialRecord:
        self._request = codec.from_json(Request, request, "trial request")
        return PartialRecord()

    def _build(self) -> PartialRecord:
        training, protocol = self._training, self._request.protocol
        min_steps = BEFORE_WARMUP + protocol.warmup_steps_min + protocol.turns * protocol.steps_per_turn
        if training.planned_steps is not None and training.planned_steps < min_steps:
            message = (
                f"the script trains {training.planned_steps} steps, and at least {min_steps} are needed. {TRAIN_LONGER}"
            )
            raise TrainingOverError("invalid", Failure(phase="build", kind="TooFewSteps", message=message))
        parameters = [] if training.module is None else training.module.parameters()
        dtypes = {str(one.dtype).removeprefix("torch.") for one in parameters if one.requires_grad}
        tokens: dict[str, Any] = {"source": training.source}
        tokens |= {"trainable_dtype": ", ".join(sorted(dtypes))} if dtypes else {}
        memory = {"host_peak_load_bytes": host_bytes("VmHWM")}
        self._peaks = Peaks(training.device)
        values = training.counts | {"threads": float(torch.get_num_threads())}
        return PartialRecord(values=values, tokens=tokens, memory=memory, software=own_software(torch.version.cuda))

    def _verify(self) -> Command:
        request = self._request
        required = {**self._training.required, **request.requirements}
        yield ObserverReply()
        yield ObserverReply(watch=required if required or request.replicate == 0 else None)
        first, second = self._readings
        record = PartialRecord(
            checks=tuple(codec.to_json(check) for check in second.checks or ()),
            values={"first_step_time_s": first.step_time_s},
            samples=complete_columns(untimed_columns("warmup", self._readings)),
            tokens={"loss_dtype": first.loss_dtype} if first.loss_dtype else {},
        )
        return judge_required(record, required, name=request.variant.name, allow_fallback=request.allow_fallback)

    def _warm_up(self, steps: int | None = None) -> Command:
        protocol, planned = self._request.protocol, self._training.planned_steps
        max_steps = protocol.warmup_steps_max
        if planned is not None:
            max_steps = min(max_steps, planned - BEFORE_WARMUP - protocol.turns * protocol.steps_per_turn)
        times: list[float] = []
        while not is_warm(times, protocol.warmup_steps_min, max_steps) if steps is None else len(times) < steps:
            yield ObserverReply()
            times.append(self._readings[-1].step_time_s)
        return PartialRecord(
            samples=complete_columns({"warmup_step_time_s": [*times], **untimed_columns("warmup", self._readings)}),
            values={"warmup_steady": float(is_steady(times))} if steps is None else {},
        )

    def _turn(self, steps: int) -> Command:
        for _ in range(steps):
            yield ObserverReply()
        return PartialRecord(samples=complete_columns(turn_columns(self._readings)))

    def _finish(self, steps: int | None = None) -> Command:
        planned = self._request.protocol.total_steps
        last = BEFORE_WARMUP - 1 + (planned if steps is None else steps)
        notices: tuple[Notice, ...] = ()
        try:
            while self._steps < min(last, self._training.planned_steps or last):
                yield ObserverReply()
        except TrainingOverError as end:
            if end.failure.kind != "EndedEarly":
                raise
            notices = (
                Notice(
                    code="training-ended-early",
                    message=f"{self._request.trial}: the script's training ended by itself after "
                    f"{format_count(self._steps, 'step')}, after all timed steps.",
                    remedy="Have it train longer where losses are to be compared: it is stopped when it has taken its "
                    "steps.",
                ),
            )
        values = {"training_steps": float(self._steps)}
        values |= {} if steps is None else {"training_steps_planned": float(planned + 1)}
        return PartialRecord(
            samples=complete_columns(untimed_columns("remaining", self._readings)),
            values=values,
            memory=self._peaks.read(),
            notices=notices,
        )


TRAIN_LONGER = "Make it train longer (it is stopped after the measured steps), or set fewer turns in [protocol]."


def _connect() -> Connection:
    try:
        connection = Client(socket_address(os.environ[SOCKET]), "AF_UNIX")
    except (OSError, KeyError):
        os._exit(EXIT_ORPHAN)
    cpus = os.sched_getaffinity(0)

    def leave() -> None:
        connection.close()  # a surviving fork would hide the end of this process
        with contextlib.suppress(OSError):  # such as a data-loading worker, which may use every CPU
            os.sched_setaffinity(0, cpus)

    os.register_at_fork(after_in_child=leave)
    return connection
