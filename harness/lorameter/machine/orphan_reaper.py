"""What ends a script's processes when the parent was killed: a process of its own that waits for nothing else.

The kernel ends the script with its parent, and not what a launcher has started in sessions of its own. This module is
run as a file by an interpreter without its site, with a pipe of the parent as its standard input: the pipe's end is the
parent's, however that came. It is idle until then, and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ATTEMPTS = 5
"""What is being started while others are looked for is found the next time."""


def marked(marker: bytes) -> list[int]:
    """Processes with this variable in the environment that they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def kill_marked(marker: bytes) -> None:
    """Kill them all, and what they start meanwhile."""
    for _ in range(ATTEMPTS):
        pids = marked(marker)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break


class OrphanReaper:
    """Kills what has a variable in its environment as soon as this process has ended."""

    def __init__(self, marker: bytes) -> None:
        """Raises OSError where the system starts no process."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, marker.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # what a terminal sends is not for it
        )

    def close(self) -> None:
        """There is nothing to be watched any more."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def main(marker: str) -> None:
    """Wait for the end of the parent, whatever is sent to this process meanwhile."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    kill_marked(marker.encode())


if __name__ == "__main__":
    main(sys.argv[1])
