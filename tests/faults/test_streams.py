"""Tests of closed readers and unwritable outputs: all measurements are saved, and no exit code looks like a verdict.

Tests of Ctrl-C at a terminal: running trials are interrupted, and the earlier results are reported.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.pipes import EXIT_CLOSED_PIPE
from tests.constructed import RUNS


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe whose reader is closed."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize(
    "line",
    ["list models --json", "report sound", "gate sound slower", "gate sound slower --format github"],
)
def test_a_closed_reader_ends_a_command_with_sigpipes_exit_code(line, closed_pipe, monkeypatch, capsys):
    """A closed reader ends the command with the exit code of SIGPIPE, whatever the verdict is, and without a
    message."""
    words = line.split()
    words += ["--runs-dir", str(RUNS)]
    with open(closed_pipe, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(words) == EXIT_CLOSED_PIPE == 128 + 13
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("program", [["lorameter.cli", "list", "models"], ["kernels_check", "--help"]])
def test_buffered_output_at_exit_causes_no_error(program, closed_pipe):
    """Output that is still buffered at exit does not cause the interpreter's error message and exit code 120."""
    done = subprocess.run([sys.executable, "-m", *program], stdout=closed_pipe, stderr=subprocess.PIPE, check=False)
    killed = -signal.SIGPIPE  # which a shell reports as EXIT_CLOSED_PIPE
    assert (done.returncode, done.stderr) == (killed if program[0] == "kernels_check" else EXIT_CLOSED_PIPE, b"")


@pytest.mark.parametrize("program", [["lorameter.cli", "list", "models"]])
def test_a_full_disk_for_the_output_is_reported(program):
    """A full disk gives one line and the exit code of a machine fault, not of a defect or a verdict."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", *program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert done.stderr.endswith("standard output cannot be written: No space left on device.\n")
    assert done.stderr.count("\n") == 1


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path, command, read_run):
    """No file is opened under the number of a closed stream, so that nothing is printed into the run."""
    line = " ".join(f"'{word}'" for word in command())
    done = subprocess.run(f"{line} <&- >&- 2>&-", shell=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    run = read_run()
    assert (run.state, run.damaged_lines, {record.status for record in run.records}) == ("complete", 0, {"ok"})


@pytest.mark.parametrize("ends", ["stderr", "both"])
def test_a_measurement_continues_after_its_reader_closes(ends, command, closed_pipe, read_run):
    """Every trial is measured and saved; a closed stderr does not change the exit code, and a closed stdout gives that
    of SIGPIPE."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= dict.fromkeys(("stdout", "stderr") if ends == "both" else ("stderr",), closed_pipe)
    done = subprocess.run(command(), check=False, **streams)
    assert done.returncode == (0 if ends == "stderr" else EXIT_CLOSED_PIPE)
    run = read_run()
    assert (run.state, {record.status for record in run.records}) == ("complete", {"ok"})
    assert len(run.records) == len(run.manifest.order)


def test_a_pytest_session_continues_after_its_reader_closes(session, closed_pipe, read_run, tmp_path):
    """Every trial is measured and saved, and the exit code is 141, not pytest's 1, which means a regression."""
    done = subprocess.run(session(), stdout=closed_pipe, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == EXIT_CLOSED_PIPE, done.stderr
    assert "Traceback" not in done.stderr
    run = read_run()
    assert (run.state, {record.status for record in run.records}) == ("complete", {"ok"})


def test_a_terminal_that_is_closed_loses_nothing(command, read_run):
    """A terminal that closes before the first line of progress, so that reads and writes fail with EIO, does not stop
    the measurement, and the display is silent."""
    master, slave = os.openpty()
    with subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        os.close(master)
        process.communicate()
    assert process.returncode == 0
    assert read_run().state == "complete"


def test_an_output_that_knows_ascii_only_shows_all_text(tmp_path):
    """Characters outside ASCII are escaped; a JSON document stays valid."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for words in (["report", "sound"], ["compare", "sound", "slower", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "lorameter.cli", *words, "--runs-dir", str(RUNS)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1)
        assert done.stdout.isascii()
        assert "Traceback" not in done.stderr
        assert words[-1] != "--json" or json.loads(done.stdout)["schema"] == 2


STYLED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_ctrl_c_ends_the_run_with_its_report(command, start_until_stop, read_run):
    """Running trials are interrupted, the run is reported, and the exit code says that it is incomplete."""
    master, slave = pty.openpty()
    shown = []

    def read():
        try:
            while data := os.read(master, 4096):
                shown.append(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options = {
        "stdin": slave, "stdout": slave, "stderr": slave, "text": False, "start_new_session": True,
        "preexec_fn": lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    }  # fmt: skip
    with start_until_stop(command(stop="r1-a:turn"), **options) as process:
        os.write(master, b"\x03")
        assert process.wait(timeout=120) == 4
    os.close(slave)
    reader.join(timeout=60)
    os.close(master)
    text = " ".join(STYLED.sub("", b"".join(shown).decode()).split())
    assert "trials last ratio now" in text
    assert "This run is not complete (interrupted)" in text
    assert "Traceback" not in text
    statuses = {record.trial: record.status for record in read_run().records}
    assert {status for trial, status in statuses.items() if trial.startswith("r0-")} == {"ok"}
    assert {status for trial, status in statuses.items() if trial.startswith("r2-")} == {"not_run"}
    assert statuses["r1-a"] == statuses["r1-b"] == "interrupted"
