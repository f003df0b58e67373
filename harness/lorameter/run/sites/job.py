"""A job of a batch system: a post (`lorameter.run.sites.remote_worker`) whose orders and messages are lines of files.

It ends when it is told to, by the driver or the batch system, and by itself when the driver gives no sign of life any
more or when it was started again elsewhere: nobody would read what it measures. Whatever ends it in order is said in
its last line. From a signal on nothing else is sent: the batch system ends measuring processes as well, and their
deaths are no results.

The main thread hears signals, which is where submitit's requeueing happens, and another carries orders out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lorameter.records import codec, journal
from lorameter.records.atomic_json import write_whole
from lorameter.run.sites.file_queue import (
    ABOUT,
    BEAT,
    DRIVER,
    LEFT,
    MESSAGES,
    ORDERS,
    HeartbeatMonitor,
    LineReader,
    beat_of,
    beating,
    begin_start,
    home_of,
    starts_of,
)
from lorameter.run.sites.messages import NodeMessage, read_message
from lorameter.run.sites.private import check_private
from lorameter.run.sites.remote_worker import ReplicateWorker

END, CLOSE = "end", "close"
"""Lines that are no orders: end what is under way; end."""
BUSY_LOOK_S = 1.0
"""How often it looks for these while something is measured: a look takes a fraction of a millisecond."""
IDLE_LOOK_S = 0.1
GRACE_S = 1.0
"""So long a trial that has failed is held back: what ends the job may have ended the trial's process first."""
STAY_S = 20.0
"""After TERM it stays for so long: at preemption submitit's signal comes after it, and requeues the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a job says of itself when it starts."""

    node: str
    pid: int
    cards: str = ""
    """Numbers of the GPUs that it was given, as the batch system counts those of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteJob:
    """What submitit is given: is called on the node, and again after each requeueing."""

    folder: str
    """Of all jobs of a driver."""
    number: int
    silent_s: float
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables to set there; None removes one."""

    def __call__(self) -> str:
        """Carry orders out until it ends; returns why. Raises `UsageError` where other users can write them."""
        for name, value in self.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        home = home_of(Path(self.folder), self.number)
        if beat_of(home.parent / DRIVER) is None:
            return "whoever started it is gone"
        check_private(home.parent)
        box = begin_start(home)
        with beating(box / BEAT, self.silent_s):
            desk = _JobLoop(box)
            write_whole(box / ABOUT, codec.dumps(_about()))
            why = "its job was told to end"  # by an exception: submitit's at requeueing, Python's at an interrupt
            try:
                why = desk.work(home, self.silent_s)
            finally:
                desk.leave(why)
            if desk.told.is_set():
                desk.stay()
        return why

    def checkpoint(self) -> Any:
        """What submitit starts again when the job is requeued: the same, which begins anew."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _about() -> About:
    cards = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    return About(node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(), pid=os.getpid(), cards=cards)


class _JobLoop:
    """The post of one start, and the files that it answers in."""

    def __init__(self, box: Path) -> None:
        self._box, self._post = box, ReplicateWorker()
        self._lines = LineReader(box / ORDERS)
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._taken = self._carried_out = 0
        """Orders; each number is changed by one thread."""
        self.told = threading.Event()
        """Set by TERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)
        threading.Thread(target=self._carry_out, daemon=True).start()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told.set()

    def _carry_out(self) -> None:
        while True:
            self._post.carry_out(self._orders.get(), self._send)
            self._carried_out += 1

    def _send(self, line: str) -> None:
        if '"crashed"' in line:
            message = read_message(line)
            if message.record is not None and message.record.status == "crashed":
                self.told.wait(GRACE_S)
        with self._lock:
            if not (self._closed or self.told.is_set()):
                journal.append(self._box / MESSAGES, f"{line}\n")

    def work(self, home: Path, silent_s: float) -> str:
        """Take orders until it is time to end; returns why it is."""
        driver = HeartbeatMonitor(home.parent / DRIVER, silent_s)
        while True:
            for line in self._lines.lines():
                if line == CLOSE:
                    return "it was told to end"
                if line == END:
                    self._post.end()
                else:
                    self._taken += 1
                    self._orders.put(line)
            if driver.is_silent() or not home.parent.is_dir():
                return "whoever started it is gone"
            if starts_of(home)[-1:] != [self._box]:
                return "its job was started again"
            if self.told.wait(BUSY_LOOK_S if self._taken > self._carried_out else IDLE_LOOK_S):
                return "its job was cancelled or preempted"

    def stay(self) -> None:
        """For a signal that may come, unless the driver is done."""
        until = time.monotonic() + STAY_S
        while time.monotonic() < until and CLOSE not in self._lines.lines():
            time.sleep(IDLE_LOOK_S)

    def leave(self, why: str) -> None:
        """Say why, as the answer to whatever is asked; then end what is measured."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                journal.append(self._box / MESSAGES, f"{codec.dumps(NodeMessage(says='failed', text=why))}\n")
        self._post.close()
        with contextlib.suppress(OSError):
            (self._box / LEFT).touch()
