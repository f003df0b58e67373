"""Tests of Ctrl-C at a terminal: running trials are interrupted, and the earlier results are reported."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import termios
import threading

STYLED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_ctrl_c(command, stopped, only_run):
    """Running trials are interrupted after the display was drawn, the run is reported, and the exit code says that it
    is incomplete."""
    ours, theirs = pty.openpty()
    shown = []

    def read():
        try:
            while data := os.read(ours, 4096):
                shown.append(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options = {
        "stdin": theirs, "stdout": theirs, "stderr": theirs, "text": False, "start_new_session": True,
        "preexec_fn": lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    }  # fmt: skip
    with stopped(command(stop="r1-a:turn"), **options) as process:
        os.write(ours, b"\x03")
        assert process.wait(timeout=120) == 4
    os.close(theirs)
    reader.join(timeout=60)
    os.close(ours)
    text = " ".join(STYLED.sub("", b"".join(shown).decode()).split())
    assert "ratio so far" in text
    assert "This run is not complete (interrupted)" in text
    assert "Traceback" not in text
    statuses = {record.trial: record.status for record in only_run().records}
    assert {status for trial, status in statuses.items() if trial.startswith("r0-")} == {"ok"}
    assert {status for trial, status in statuses.items() if trial.startswith("r2-")} == {"not_run"}
    assert statuses["r1-a"] == statuses["r1-b"] == "interrupted"
