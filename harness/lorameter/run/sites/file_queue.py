"""Lines between processes that share nothing but a folder, which may lie on another machine.

Each file has one writer, which appends whole lines and waits until the disk has them, and one reader, which takes what
ends with a line break and looks again later. NFS is what has to be borne: a file is seen anew when it is opened, so it
is opened for each look, and a name that was just made can be seen up to a minute late. Clocks of machines differ, so
nobody compares a time with its own clock: a sign of life is a time of the file server that changes, and silence is
that it has not changed for so long by the observer's clock.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ORDERS, MESSAGES, BEAT, ABOUT, LEFT = "orders", "messages", "beat", "about.json", "left"
"""Files of one start of a job: lines to it and from it, its sign of life, what it is, that it has ended in order."""
DRIVER = "driver"
"""The sign of life of whoever started the jobs, in the folder of all."""
BEATS = 8
"""Signs of life in the time after which there is silence: some may come late or not at all."""


class LineReader:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def lines(self) -> list[str]:
        """Those that are whole, since the last time; none where the file is not there yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._read += end
        return [line for line in data[:end].decode("utf-8", errors="backslashreplace").split("\n") if line]


class HeartbeatMonitor:
    """Watches a sign of life."""

    def __init__(self, path: Path, silent_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._silent_s, self._clock = path, silent_s, clock
        self._seen: int | None = None
        self._since = clock()

    def is_silent(self) -> bool:
        """Whether it has not changed for so long; one that is missing does not change."""
        seen, now = beat_of(self._path), self._clock()
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since > self._silent_s


def beat_of(path: Path) -> int | None:
    """When it last gave a sign of life, in nanoseconds of the file server; None where it cannot be seen."""
    try:
        with path.open("rb") as file:  # what is opened is asked for anew
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def beating(path: Path, silent_s: float) -> Iterator[None]:
    """Meanwhile a thread gives signs of life, in the file server's time."""
    path.touch()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(silent_s / BEATS):
            with contextlib.suppress(OSError):  # a disk that is away for a while: whoever watches has patience
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def home_of(folder: Path, number: int) -> Path:
    """Where one of the jobs of a driver has the folders of its starts."""
    return folder / f"site-{number}"


def starts_of(folder: Path) -> list[Path]:
    """The folders of the starts of one job, oldest first: a job that is requeued starts again."""
    try:
        found = [path for path in folder.iterdir() if path.name.isdigit()]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name))


def begin_start(folder: Path) -> Path:
    """A new folder for one start of a job; making it is what numbers it."""
    while True:
        starts = starts_of(folder)
        path = folder / str(int(starts[-1].name) + 1 if starts else 1)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
