"""The trial of a script: it holds the script's training until its parent asks for steps, and measures those.

Other scripts of the same replicate are held meanwhile, so that one computes at a time and whatever slows the machine
slows all of them alike. It answers the commands of every measuring process (`lorameter.wire`), with these differences:
the process greets when its training is before its first step, and the connection is found by the name of a socket
in the environment, which goes through every launcher, as an open descriptor would not.

build             what is known of the training before its first step
verify            the first step, and one that kernels_check watches where a study or the first replicate asks for it
warm_up           steps until their times are steady
turn              timed steps
finish_training   steps up to the number that all trials of the study take, and peaks

A training is never let go after its last step, nor when it has ended: what the script would do next (evaluate, save,
publish) is not what is measured. It waits until it is killed, and ends at once where its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from multiprocessing.connection import Client, Connection
from typing import Any, NoReturn

from lorameter import wire
from lorameter.attach.environment import SOCKET, address
from lorameter.attach.measures import Peaks
from lorameter.attach.observer import ObserverReply, Phase, StepReading, TrainingInfo
from lorameter.attach.samples import describe_end, loss_not_finite, timed_samples, untimed_samples
from lorameter.machine.memory import host_bytes
from lorameter.machine.software import own_software
from lorameter.records import codec
from lorameter.records.failures import describe_error
from lorameter.records.record import Failure, Notice, PartialRecord, Status, judge_required
from lorameter.records.units import format_count
from lorameter.stats import is_steady, is_warm
from lorameter.studies.request import ScriptRequest

EXIT_ORPHAN = 75
"""How a process ends whose parent is gone."""
WARMUP = ("warmup_loss", "warmup_tokens")
"""Samples of the steps before the timed ones."""
BEFORE_WARMUP = 2
"""The first step, and the one that may be watched."""

Steps = Generator[ObserverReply, StepReading, None]
Command = Generator[ObserverReply, StepReading, PartialRecord]
"""Yields once for each step that it needs, and is sent what that step showed."""


class TrainingOverError(Exception):
    """No further step will come, for this reason."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status: Status = status
        self.failure = failure


class ScriptTrial:
    """Implements `TrainingObserver` in a script's process; a fork of that process is not followed."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._program: Generator[ObserverReply, StepReading, NoReturn] | None = None
        self._steps = 0
        self._phase = "prepare"

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Wait for commands before the first step of the training."""
        if os.getpid() != self._pid:
            return ObserverReply()
        if self._program is not None:
            message = (
                "a second training began in the same process while the first had not ended. Measure a script that "
                "trains once"
            )
            self._stop("invalid", "TwoTrainings", message)
        self._training = training
        self._connection = _connect()
        self._program = self._run()
        return next(self._program)

    def step(self, reading: StepReading) -> ObserverReply:
        """Take what a step showed, and wait where the command that needed it is done."""
        if os.getpid() != self._pid or self._program is None:
            return ObserverReply()
        self._steps += 1
        return self._program.send(reading)

    def phase(self, phase: Phase) -> None:
        """What lies between steps is in none of them; its peaks of memory are its own."""
        if os.getpid() == self._pid and self._program is not None:
            self._peaks.enter(phase)

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Answer with how the training has ended, and never come back."""
        if os.getpid() != self._pid or self._program is None:
            return
        if error is None:
            message = (
                f"the script's first training ended by itself after {format_count(self._steps, 'step')}, and more are "
                "measured. Have it train longer (it is stopped when it has taken them), or ask for fewer turns in "
                "[protocol]."
            )
            self._stop("invalid", "EndedEarly", message)
        status, failure = describe_end(error, self._phase)
        message = f"{type(error).__name__} in step {self._steps + 1}: {failure.message}"
        self._stop(status, failure.kind, message, failure.traceback)

    def _stop(self, status: Status, kind: str, message: str, traceback: str = "") -> NoReturn:
        """Nothing of the script runs any more; what is asked of it fails for this reason."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # whatever the script has put in its place
                stream.flush()
        failure = Failure(phase=self._phase, kind=kind[:120], message=message, traceback=traceback)
        assert self._program is not None
        while True:
            self._program.throw(TrainingOverError(status, failure))

    def _run(self) -> Generator[ObserverReply, StepReading, NoReturn]:
        """Greet, and carry out one command after the other; a yield lets the training take a step."""
        try:
            torch = sys.modules.get("torch")
            cuda = bool(torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized())
            self._peaks = Peaks("cuda" if cuda else "cpu")
            wire.send(self._connection, wire.Hello(pid=os.getpid(), device="cuda" if cuda else "cpu"))
            while True:
                command = wire.receive(self._connection, wire.Command)
                self._phase = command.name
                try:
                    record = yield from self._carry_out(command.name, command.arguments)
                except TrainingOverError as over:
                    record = PartialRecord().failed(over.status, over.failure)
                except Exception as error:
                    record = PartialRecord().failed(*describe_error(error, command.name))
                wire.send(self._connection, wire.answer_with(record))
        except (wire.ClosedError, wire.GarbledError):
            os._exit(EXIT_ORPHAN)

    def _carry_out(self, name: str, arguments: dict[str, Any]) -> Command:
        if name == "prepare":
            self._request = codec.from_json(ScriptRequest, arguments["request"], "trial request")
            return PartialRecord()
        if name == "build":
            return self._build()
        steps: dict[str, Callable[..., Command]] = {
            "verify": self._verify, "warm_up": self._warm_up, "turn": self._turn, "finish_training": self._finish,
        }  # fmt: skip
        return (yield from steps[name](**arguments))

    def _build(self) -> PartialRecord:
        training, protocol = self._training, self._request.protocol
        least = BEFORE_WARMUP + protocol.warmup_steps_min + protocol.turns * protocol.steps_per_turn
        if training.planned_steps is not None and training.planned_steps < least:
            message = (
                f"the script trains {training.planned_steps} steps, and at least {least} are measured. Have it train "
                "longer (it is stopped when it has taken them), or ask for fewer turns in [protocol]."
            )
            raise TrainingOverError("invalid", Failure(phase="build", kind="TooFewSteps", message=message))
        torch = sys.modules.get("torch")
        values = {"threads": None if torch is None else torch.get_num_threads()}
        values |= {
            name: getattr(training, name)
            for name in ("trainable_parameters", "total_parameters", "accumulation", "ranks")
        }
        parameters = [] if training.module is None else training.module.parameters()
        dtypes = {str(one.dtype).removeprefix("torch.") for one in parameters if one.requires_grad}
        tokens: dict[str, Any] = {"source": training.source}
        tokens |= {"trainable_dtype": ", ".join(sorted(dtypes))} if dtypes else {}
        memory = {"host_peak_load_bytes": host_bytes("VmHWM")}
        self._peaks.begin()
        return PartialRecord(
            values={name: float(value) for name, value in values.items() if value is not None},
            tokens=tokens,
            memory=memory,
            software=own_software(None if torch is None else torch.version.cuda),
        )

    def _take(self, steps: int, taken: list[StepReading], watch: dict[str, Any] | None = None) -> Steps:
        """Let the training take steps; the first of them is watched for these requirements, or none is."""
        for _ in range(steps):
            taken.append((yield ObserverReply(watch=watch)))
            watch = None

    def _verify(self) -> Command:
        request, taken = self._request, list[StepReading]()
        required = {**self._training.required, **request.requirements}
        yield from self._take(1, taken)
        yield from self._take(1, taken, required if required or request.replicate == 0 else None)
        record = PartialRecord(
            checks=tuple(codec.to_json(check) for one in taken for check in one.checks or ()),
            values={"first_step_time_s": taken[0].step_time_s},
            samples=untimed_samples(*WARMUP, taken),
            tokens={"loss_dtype": taken[0].loss_dtype} if taken[0].loss_dtype else {},
        )
        record = _judge_losses(record, taken)
        if record.status != "ok":
            return record
        return judge_required(record, required, name=request.variant.name, allow_fallback=request.allow_fallback)

    def _warm_up(self, steps: int | None = None) -> Command:
        protocol, planned = self._request.protocol, self._training.planned_steps
        most = protocol.warmup_steps_max
        if planned is not None:
            most = min(most, planned - BEFORE_WARMUP - protocol.turns * protocol.steps_per_turn)
        taken: list[StepReading] = []
        times: list[float] = []
        while not is_warm(times, protocol.warmup_steps_min, most) if steps is None else len(times) < steps:
            yield from self._take(1, taken)
            times.append(taken[-1].step_time_s)
        record = PartialRecord(
            samples={"warmup_step_time_s": tuple(times), **untimed_samples(*WARMUP, taken)},
            values={"warmup_steady": float(is_steady(times))} if steps is None else {},
        )
        return _judge_losses(record, taken)

    def _turn(self, steps: int) -> Command:
        taken: list[StepReading] = []
        try:
            yield from self._take(steps, taken)
        except TrainingOverError as over:
            samples = timed_samples([taken]) if taken else {}
            return PartialRecord(samples=samples).failed(over.status, over.failure)
        return _judge_losses(PartialRecord(samples=timed_samples([taken])), taken)

    def _finish(self, steps: int | None = None) -> Command:
        planned = self._request.protocol.total_steps
        last = BEFORE_WARMUP - 1 + (planned if steps is None else steps)
        taken: list[StepReading] = []
        notices: tuple[Notice, ...] = ()
        try:
            yield from self._take(max(0, min(last, self._training.planned_steps or last) - self._steps), taken)
        except TrainingOverError as over:
            if over.failure.kind != "EndedEarly":
                raise
            notices = (self._ended_early(),)
        values = {"training_steps": float(self._steps)}
        values |= {} if steps is None else {"training_steps_planned": float(planned + 1)}
        samples = untimed_samples("remaining_loss", "remaining_tokens", taken)
        record = PartialRecord(samples=samples, values=values, memory=self._peaks.so_far(), notices=notices)
        return _judge_losses(record, taken)

    def _ended_early(self) -> Notice:
        return Notice(
            code="training-ended-early",
            message=f"{self._request.trial}: the script's training ended by itself after "
            f"{format_count(self._steps, 'step')}, when all timed ones had been taken.",
            remedy="Have it train longer where losses are to be compared: it is stopped when it has taken its steps.",
        )


def _judge_losses(record: PartialRecord, readings: list[StepReading]) -> PartialRecord:
    failure = loss_not_finite(readings)
    return record if failure is None else record.failed("invalid", failure)


def _connect() -> Connection:
    try:
        connection = Client(address(os.environ[SOCKET]), "AF_UNIX")
    except (OSError, KeyError):
        os._exit(EXIT_ORPHAN)
    cpus = os.sched_getaffinity(0)

    def leave() -> None:
        connection.close()  # a fork that lives on would hide that this process is gone
        with contextlib.suppress(OSError):  # such as a worker that loads data, which may use every CPU
            os.sched_setaffinity(0, cpus)

    os.register_at_fork(after_in_child=leave)
    return connection
