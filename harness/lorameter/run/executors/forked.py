"""A process that was forked from a zygote to host trials, as its parent sees it: asked, silent, or dead."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any, Protocol

from lorameter.errors import UsageError
from lorameter.machine.affinity import cpus_of, pin_to_cpus
from lorameter.machine.processes import exit_words, kill_group
from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.executors import WorkerLostError
from lorameter.run.executors.channel import Channel, GarbledError

START_TIMEOUT_S = 180.0
"""Importing takes 3 to 5 s on a quiet machine; a cold disk and a busy one can make it a minute."""
END_TIMEOUT_S = 10.0
"""A process that is at rest ends as soon as its parent hangs up."""


class Mother(Protocol):
    """The process that forked this one."""

    @property
    def lives(self) -> bool:
        """Whether it runs; its children die with it."""

    def reap(self, pid: int) -> int | None:
        """The exit status of a child that was told to end."""

    def last_words(self) -> str:
        """How it ended."""


class ForkedWorker:
    """A forked process; implements `Worker`."""

    def __init__(self, pid: int, channel: Channel, mother: Mother) -> None:
        self.pid = pid
        self.channel = channel
        self.start_latency_s = float("nan")
        self._mother = mother
        self._reaped = False
        self._sent_s = 0.0
        """When it was last asked something."""
        self._cpus: tuple[int, ...] = ()
        """All that it may compute on, once somebody has asked."""

    def greet(self, asked_monotonic_s: float) -> None:
        """Wait for its first word, which says when it began. Raises `WorkerLostError`."""
        hello = self._receive("start", START_TIMEOUT_S)
        began = hello.get("started_monotonic_s")
        if not isinstance(began, float):
            raise self._garbled("start", "its first word does not say when it began")
        self.start_latency_s = began - asked_monotonic_s

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Send a command and block until its answer, the process's death, or `timeout_s`."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Have it begin with a command, and wait for nothing."""
        self._sent_s = time.monotonic()
        self.channel.send({"do": command, "trial": trial, **arguments})

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """Its answer to the command that was sent, within `timeout_s` of that, whoever was waited for meanwhile."""
        answer = self._receive(command, timeout_s, self._sent_s)
        try:
            return codec.from_json(PartialRecord, answer, f"answer to {command}")
        except UsageError as error:
            raise self._garbled(command, str(error)) from None

    def cpus(self) -> tuple[int, ...]:
        """All that it may compute on; none where it is gone."""
        self._cpus = self._cpus or cpus_of(self.pid)
        return self._cpus

    def sit(self, cpu: int) -> None:
        """Compute on one of them until it stands up."""
        pin_to_cpus(self.pid, {cpu})

    def stand(self) -> None:
        """Compute on any of them again."""
        pin_to_cpus(self.pid, self._cpus)

    def fileno(self) -> int:
        """Of the socket that its answer comes by."""
        return self.channel.fileno()

    def _receive(self, phase: str, timeout_s: float, since_s: float | None = None) -> dict[str, Any]:
        gone_s = 0.0 if since_s is None else time.monotonic() - since_s
        try:
            answer = self.channel.receive(max(0.0, timeout_s - gone_s))
        except GarbledError as error:
            raise self._garbled(phase, str(error)) from None
        if answer is None:
            raise self._lost(phase, timeout_s)
        return answer

    def _garbled(self, phase: str, why: str) -> WorkerLostError:
        """It lives, and nothing that it says can be trusted: something else writes where only its loop may."""
        self._reap()
        message = f"the trial's process gave no answer that can be read, and was killed: {why}"
        return WorkerLostError("crashed", Failure(phase=phase, kind="Garbled", message=message))

    def _lost(self, phase: str, timeout_s: float) -> WorkerLostError:
        """What became of a process that did not answer: killed for silence, or dead by itself."""
        silent = not self.channel.closed_by_peer
        code = self._reap()
        if silent:
            return WorkerLostError("timeout", silence(phase, timeout_s))
        if code is None and not self._mother.lives:
            message = f"{self._mother.last_words()}, and the trial's process with it, during {phase}"
            return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))
        message = f"the trial's process ended with {exit_words(code)} during {phase}"
        if code == -signal.SIGKILL:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))

    def close(self) -> None:
        """Close the connection, which ends the child's loop, and reap it; one that is at work is killed."""
        at_rest = not self.channel.asked
        self.channel.close()
        self._reap(grace_s=END_TIMEOUT_S if at_rest else 0.0)

    def _reap(self, grace_s: float = 0.0) -> int | None:
        if self._reaped:
            return None
        self._reaped = True
        deadline = time.monotonic() + grace_s
        while grace_s and time.monotonic() < deadline and _runs(self.pid):
            time.sleep(0.01)
        if not self._mother.lives:  # it has died with it, and its number may be another's
            return None
        kill_group(self.pid)
        return self._mother.reap(self.pid)


def _runs(pid: int) -> bool:
    """Whether a process still runs (a zombie that waits to be reaped does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def silence(phase: str, timeout_s: float) -> Failure:
    """What is said of a process that gave no answer in time."""
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)
