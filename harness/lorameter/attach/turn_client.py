"""A follower that takes turns: it holds its training until a parent lets it take some steps, and tells what they were.

Other scripts of the same replicate are held meanwhile, so that one computes at a time and whatever slows the machine
slows all of them alike. The two ends speak lines of JSON over a Unix socket, whose name is in the environment: a name
goes through every launcher, which an open descriptor would not.

child   {"begin": {...}}                         it stands before its first step, and waits
parent  {"do": "go", "steps": n, "watch": {...}} it takes so many steps; the first of them is watched, or none
child   {"steps": [{...}, ...]}                  it has taken them, and waits
parent  {"do": "peaks"}
child   {"peaks": {...}}                         peaks of memory since the first step, by phase, and waits
parent  {"do": "end"}                            no further step
child   {"end": {...}, "steps": [...]}           the training has ended, by an error or not, asked or not, and waits
child   {"fault": "..."}                         it did what ends a trial, and waits

Whoever waits is let go or killed. A training that has ended is never let go: what the script would do next (evaluate,
save, publish) is not what was asked for. Where the parent is gone the process ends at once, for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lorameter.attach.observer import ObserverReply, Phase, StepReading, TrainingInfo
from lorameter.attach.peaks import Peaks
from lorameter.errors import redact
from lorameter.machine.memory import host_bytes
from lorameter.machine.software import own_software
from lorameter.records import codec

SOCKET = "LORAMETER_TURN_SOCKET"
"""The variable that holds the name of the parent's socket: of those that lie in no folder, whose path might be too
long (`address`)."""
EXIT_ORPHAN = 75
"""How a process ends whose parent is gone."""
MOST_TRACEBACK = 8000
"""Characters of a traceback that are told; the trial's log has all."""


def address(named: str) -> str:
    """The address of a socket by its name, of Linux's abstract ones, which begin with a byte that no variable holds."""
    return "\0" + named.removeprefix("@")


class TurnClient:
    """Implements `Follower` in a script's process; a fork of that process is not followed."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._connection: socket.socket | None = None
        self._received = b""
        self._due = 0
        """Steps that may still be taken in this turn."""
        self._taken: list[dict[str, Any]] = []
        self._last = False

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Say that the training stands before its first step, and wait for the first turn."""
        if os.getpid() != self._pid:
            return ObserverReply()
        if self._connection is not None:
            self._stop_at("a second training began in the same process while the first had not ended")
        self._connect()
        facts = _facts_of(training)
        self._peaks = Peaks("cuda" if facts["cuda"] else "cpu")
        self._tell({"begin": facts | {"memory": {"host_peak_load_bytes": host_bytes("VmHWM")}}})
        self._peaks.begin()
        return self._wait()

    def step(self, reading: StepReading) -> ObserverReply:
        """Keep what a step showed; at the end of the turn tell it, and wait for the next one."""
        if os.getpid() != self._pid or self._connection is None:
            return ObserverReply()
        if self._last:
            self._stop_at("it was asked to end its training and took another step")
        self._taken.append(codec.to_json(reading))
        self._due -= 1
        if self._due > 0:
            return ObserverReply()
        self._tell({"steps": self._taken})
        self._taken = []
        return self._wait()

    def phase(self, phase: Phase) -> None:
        """What lies between steps is in none of them, and nobody waits for it; its peaks of memory are its own."""
        if os.getpid() == self._pid and self._connection is not None:
            self._peaks.enter(phase)

    def so_far(self, readings: Sequence[StepReading]) -> Mapping[str, float]:
        """Nothing: what is measured is its parent's."""
        return {}

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Say how the training has ended, and never come back."""
        if os.getpid() != self._pid or self._connection is None:
            return
        told = {"error": None} if error is None else _error(error)
        self._tell({"end": told, "steps": self._taken})
        self._rest()

    def _wait(self) -> ObserverReply:
        while True:
            asked = self._receive()
            if asked["do"] == "go":
                self._due = int(asked["steps"])
                return ObserverReply(watch=asked.get("watch"))
            if asked["do"] == "end":
                self._last = True
                return ObserverReply(go_on=False)
            self._tell({"peaks": self._peaks.so_far()})

    def _stop_at(self, fault: str) -> NoReturn:
        self._tell({"fault": fault})
        self._rest()

    def _rest(self) -> NoReturn:
        """Wait to be killed; whatever is said, nothing of the script runs any more."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # whatever the script has put in its place
                stream.flush()
        while True:
            self._receive()

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address(os.environ[SOCKET]))
        except (OSError, KeyError):
            os._exit(EXIT_ORPHAN)
        self._connection = connection
        cpus = os.sched_getaffinity(0)

        def leave() -> None:
            connection.close()  # a fork that lives on would hide that this process is gone
            with contextlib.suppress(OSError):  # such as a worker that loads data: it has no part in this one's seat
                os.sched_setaffinity(0, cpus)

        os.register_at_fork(after_in_child=leave)

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            assert self._connection is not None
            self._connection.sendall((json.dumps(message, allow_nan=False) + "\n").encode())
        except OSError:
            os._exit(EXIT_ORPHAN)

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        while b"\n" not in self._received:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                os._exit(EXIT_ORPHAN)
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def _facts_of(training: TrainingInfo) -> dict[str, Any]:
    """What is told of a training: counts, types and versions, and nothing that would have to be carried over. Whoever
    has started the script knows no other interpreter than his own."""
    torch = sys.modules.get("torch")
    dtypes: dict[str, int] = {}
    if training.module is not None:
        for parameter in training.module.parameters():
            if parameter.requires_grad:
                name = str(parameter.dtype).removeprefix("torch.")
                dtypes[name] = dtypes.get(name, 0) + parameter.numel()
    return {
        "pid": os.getpid(),
        "source": training.source,
        "planned_steps": training.planned_steps,
        "trainable_parameters": training.trainable_parameters,
        "total_parameters": training.total_parameters,
        "trainable_dtypes": dtypes,
        "accumulation": training.accumulation,
        "required": dict(training.required),
        "ranks": training.ranks,
        "threads": None if torch is None else torch.get_num_threads(),
        "cuda": bool(torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()),
        "software": own_software(None if torch is None else torch.version.cuda),
    }


def _error(error: BaseException) -> dict[str, Any]:
    text = redact("".join(traceback.format_exception(error)))
    message = redact(str(error)).strip().splitlines()
    said = message[0] if message else type(error).__name__
    return {"error": type(error).__name__, "message": said, "traceback": text[-MOST_TRACEBACK:]}
