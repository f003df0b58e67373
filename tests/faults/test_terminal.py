"""Ctrl-C pressed at a terminal: the trials under way are interrupted, and what was measured is reported."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import termios
import threading

STYLED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A terminal that a process is started at; what is shown on it is kept."""

    def __init__(self):
        self._ours, self._theirs = pty.openpty()
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def options(self):
        """Of `Popen`: the process leads a session of its own, of which this is the terminal."""
        take = self._theirs
        return {
            "stdin": take, "stdout": take, "stderr": take, "text": False, "start_new_session": True,
            "preexec_fn": lambda: fcntl.ioctl(take, termios.TIOCSCTTY, 0),
        }  # fmt: skip

    def press(self, key):
        os.write(self._ours, key)

    def close(self):
        """All that was shown."""
        os.close(self._theirs)
        self._reader.join(timeout=60)
        os.close(self._ours)
        return self._shown.decode()

    def _read(self):
        while True:
            try:
                data = os.read(self._ours, 4096)
            except OSError:  # nobody holds the other end any more
                return
            self._shown += data


def test_ctrl_c(command, stopped, only_run):
    """The trials under way are broken off, the grid was drawn, the run is reported, and the exit code says that it is
    not complete."""
    terminal = Terminal()
    with stopped(command(stop="r1-a:turn"), **terminal.options) as process:
        terminal.press(b"\x03")
        assert process.wait(timeout=120) == 4
    shown = " ".join(STYLED.sub("", terminal.close()).split())
    assert "ratio so far" in shown
    assert "This run is not complete (interrupted)" in shown
    assert "Traceback" not in shown
    statuses = {record.trial: record.status for record in only_run().records}
    assert {status for trial, status in statuses.items() if trial.startswith("r0-")} == {"ok"}
    assert {status for trial, status in statuses.items() if trial.startswith("r2-")} == {"not_run"}
    assert statuses["r1-a"] == statuses["r1-b"] == "interrupted"
