"""Sites that are jobs of a batch system: links to them over files, those that start late, and what dead drivers left.

Whoever starts a run has a folder beside the runs, which all nodes must see, and in it one for each start of each job
(`lorameter.run.sites.file_queue`). A job that is requeued starts again: what it was before is lost, and what it is now
is a site that has come. So nobody here asks what a job does: it has started when it says so, and is lost when it says
so, falls silent, or has started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from lorameter.errors import InvalidRunError, UsageError, shorten
from lorameter.machine.nvml import VARIABLE
from lorameter.records import codec, journal, locks
from lorameter.records.atomic_json import write_whole
from lorameter.records.record import Notice
from lorameter.run.device_lock import IfBusy, tell_stderr
from lorameter.run.sites.batch import Batch, cancel_jobs, check_here, check_started
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
    home_of,
    starts_of,
)
from lorameter.run.sites.job import CLOSE, END, About, SiteJob
from lorameter.run.sites.messages import read_message
from lorameter.run.sites.private import check_private, make_private
from lorameter.run.sites.remote import RemoteNode
from lorameter.run.sites.remote_worker import BOOT_ID
from lorameter.studies.placement import LOCAL, SLURM, BatchRequest

FOLDER = f".jobs-{os.geteuid()}"
"""In the folder of the runs, one for each user; what it holds is removed when a run ends."""
OWNER = "owner.json"
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
LOOK_S = 0.2
ASK_S = 10.0
"""How often the batch system is asked what is in its queue while somebody is waited for."""
CLOSE_TIMEOUT_S = 20.0
"""A post that is told to end kills its processes and removes its folder."""


class FileLink:
    """Implements `Link` by the files of one start of a job."""

    def __init__(self, box: Path, silent_s: float, last_words: Callable[[], str]) -> None:
        self.box = box
        self._silent_s, self._last_words = silent_s, last_words
        self._messages, self._pulse = LineReader(box / MESSAGES), HeartbeatMonitor(box / BEAT, silent_s)
        self._waiting: deque[str] = deque()
        self._lock = threading.Lock()

    def ask(self, order: str) -> Iterator[str]:
        """Raises `InvalidRunError` where the job is silent or was started again."""
        self._write(order)
        while True:
            self._waiting += self._messages.lines()
            while self._waiting:
                line = self._waiting.popleft()
                yield line
                if read_message(line).is_last:
                    return
            self._check()
            time.sleep(LOOK_S)

    def _check(self) -> None:
        if starts_of(self.box.parent)[-1:] != [self.box]:
            why = "its job was started again"
        elif self._pulse.is_silent():
            why = f"its job has given no sign of life for {self._silent_s:g} s"
        else:
            return
        self._waiting += self._messages.lines()  # a last line may have come meanwhile
        if not self._waiting:
            raise InvalidRunError(f"{why}{f' ({words})' if (words := self._last_words()) else ''}")

    def _write(self, line: str) -> None:
        with self._lock:
            journal.append(self.box / ORDERS, f"{line}\n")

    def end(self) -> None:
        """It goes on answering."""
        with contextlib.suppress(OSError):
            self._write(END)

    def close(self) -> None:
        """It is told to; whoever cancels the jobs waits for it first."""
        with contextlib.suppress(OSError):
            self._write(CLOSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose folder it is, and which jobs are to be cancelled when that one is dead."""

    host: str
    boot: str
    silent_s: float
    array: str = ""
    """Of SLURM. Raises `UsageError` for what is no id of a job: it becomes an argument of scancel."""

    def __post_init__(self) -> None:
        if self.array and not _JOB_ID.fullmatch(self.array):
            raise UsageError(f"array = {shorten(repr(self.array), 60)}: no id of a SLURM job. Remove the file.")


class Jobs:
    """The jobs of a driver, and their starts. Implements `Arrivals`."""

    def __init__(self, asked: BatchRequest, folder: Path, batch: Batch) -> None:
        self._asked, self._folder, self._batch = asked, folder, batch
        self._known: dict[int, Path] = {}
        """The last start of each job that was seen."""
        self._links: list[FileLink] = []
        self._taken: dict[str, int] = {}
        """Names of sites, and whose they are."""
        self.if_busy: IfBusy = "wait"

    def come(self) -> list[RemoteNode]:
        """Those that have started since the last time."""
        found: list[tuple[int, About]] = []
        for number in range(self._asked.sites):
            starts = starts_of(home_of(self._folder, number))
            if starts and self._known.get(number) != starts[-1] and (about := _about_of(starts[-1])) is not None:
                self._known[number] = starts[-1]
                found.append((number, about))
        return [self._station(number, self._name(number, about)) for number, about in found]

    def _name(self, number: int, about: About) -> str:
        """The node's, with the GPUs of the job if it has any; told apart where two jobs have the same."""
        name = f"{about.node}-GPU-{about.cards.replace(',', '-')}" if about.cards else about.node
        if self._taken.setdefault(name, number) != number:
            name = f"{name}-{number}"
        return name

    def _station(self, number: int, name: str) -> RemoteNode:
        link = FileLink(self._known[number], self._asked.silent_s, lambda: self._batch.last_words(number))
        self._links.append(link)
        return RemoteNode(name, link)

    def is_expected(self) -> bool:
        """Whether one may come that has not: a job in the queue has not ended."""
        states = self._batch.states()
        return states is None or bool(states)

    def gather(self) -> tuple[list[RemoteNode], tuple[Notice, ...]]:
        """Those that start in time, and what is to be known of the others.

        Raises `InvalidRunError` where there is none.
        """
        begun = asked = time.monotonic()
        found = self.come()
        states = self._batch.states()
        while states is None or set(states) - set(self._known):
            if time.monotonic() - begun > 60 * self._asked.start_minutes:
                break
            time.sleep(LOOK_S)
            if time.monotonic() - asked > ASK_S or self._asked.kind == LOCAL:
                states, asked = self._batch.states(), time.monotonic()
            found += self.come()
        found += self.come()  # those that have ended have their last line to say
        check_started(states, len(found), self._asked)
        return found, tuple(
            self._late(number, (states or {}).get(number))
            for number in range(self._asked.sites)
            if number not in self._known
        )

    def _late(self, number: int, state: str | None) -> Notice:
        words = self._batch.last_words(number)
        said = state or " ".join(filter(None, ("it has ended:", words))).rstrip(":")
        return Notice(
            code="site-not-started",
            message=f"job {number} of {self._asked.on} has not started within {self._asked.start_minutes:g} min "
            f"({said}); the others go on without it.",
            remedy="It takes part when it starts. Wait for longer with start_minutes=… if all are to begin together.",
        )

    def close(self) -> None:
        """End all: those that answer are asked first, and remove what they have made."""
        for link in self._links:
            link.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        live = [link.box for link in self._links if link.box in self._known.values()]
        while any(not (box / LEFT).exists() for box in live) and time.monotonic() < deadline:
            states = self._batch.states() if self._asked.kind == LOCAL else None
            if states is not None and not states:
                break
            time.sleep(LOOK_S)
        while self._asked.kind == LOCAL and live and self._batch.states() and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        self._batch.cancel()


def _about_of(box: Path) -> About | None:
    try:
        return codec.from_json(About, codec.parse((box / ABOUT).read_text()), "about a job")
    except (OSError, UsageError, codec.NotJsonError):
        return None  # not written yet


@contextlib.contextmanager
def open_jobs(asked: BatchRequest, runs: Path) -> Iterator[tuple[list[RemoteNode], tuple[Notice, ...], Jobs]]:
    """Jobs that have started, each a station, what is to be known of the others, and those to come.

    Args:
        asked: how many, and what is passed on.
        runs: the folder of the runs; all nodes must see it.

    Raises:
        UsageError: no submitit, no SLURM, no job of this kind can be had, or other users can write where its files
            lie.
        InvalidRunError: none has started in time.
    """
    check_here(asked)
    home = runs.resolve() / FOLDER
    clear_dead(home)
    folder = home / f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(2)}"
    make_private(home)
    make_private(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, folder)
        stack.enter_context(locks.alone(folder / OWNER, f"folder {folder}: another process has it."))
        stack.enter_context(beating(folder / DRIVER, asked.silent_s))
        owner = Owner(host=socket.gethostname(), boot=_boot(), silent_s=asked.silent_s)
        write_whole(folder / OWNER, codec.dumps(owner))
        batch = Batch(asked, folder)
        jobs = Jobs(asked, folder, batch)
        stack.callback(jobs.close)
        batch.submit([_job(asked, folder, number) for number in range(asked.sites)])
        if asked.kind == SLURM:
            owner = dataclasses.replace(owner, array=batch.array)
            write_whole(folder / OWNER, codec.dumps(owner))
            tell_stderr(f"{asked.sites} jobs are submitted ({owner.array}), and waited for.")
        stations, notices = jobs.gather()
        yield stations, notices, jobs


def _job(asked: BatchRequest, folder: Path, number: int) -> SiteJob:
    # submitit's local processes would see no GPU.
    variables = {VARIABLE: os.environ.get(VARIABLE)} if asked.kind == LOCAL else {}
    return SiteJob(folder=str(folder), number=number, silent_s=asked.silent_s, environment=variables)


def clear_dead(home: Path) -> None:
    """Cancel the jobs of drivers that are dead, and remove their folders; of the living nothing is touched.

    Raises `UsageError` where other users can write into `home`.
    """
    if not os.path.lexists(home):
        return
    check_private(home)
    for folder in home.iterdir():
        with contextlib.suppress(OSError, UsageError, codec.NotJsonError):  # of a driver that is just beginning
            owner = codec.from_json(Owner, codec.parse((folder / OWNER).read_text()), str(folder))
            if _is_dead(folder, owner):
                if owner.array:
                    cancel_jobs(owner.array)
                _remove(folder)


def _is_dead(folder: Path, owner: Owner) -> bool:
    """Here by its lock, which ends with its process; elsewhere by its silence, both times being the file server's."""
    if (owner.host, owner.boot) == (socket.gethostname(), _boot()):
        return not locks.is_locked(folder / OWNER)
    probe = folder.parent / f".{token_hex(4)}"
    probe.touch()
    try:
        last, now = beat_of(folder / DRIVER), beat_of(probe)
    finally:
        probe.unlink(missing_ok=True)
    return last is not None and now is not None and now - last > owner.silent_s * 1e9


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""


def _remove(folder: Path) -> None:
    """All of it: what a job that is just ending, or the batch system for it, adds meanwhile would keep it there."""
    deadline = time.monotonic() + CLOSE_TIMEOUT_S
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # others have theirs in it
        folder.parent.rmdir()
