"""Tests of the command line: its output, its imports and its exit codes.

Tests of the entry point of measuring processes, each of which ends with its parent.

Tests of messages between processes: invalid messages, and those of another version, are refused without waiting.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
from multiprocessing import Pipe

import msgspec
import numpy as np
import psutil
import pytest

from lorameter import wire
from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.commands.table import COMMANDS
from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.processes import CPUS
from lorameter.records.record import SCHEMA, Failure, PartialRecord
from lorameter.run.workers.local import worker_environment


def test_errors_and_lists_escape_control_sequences(capsys, tmp_path):
    """A name with an escape sequence, or with half a character, is escaped."""
    assert main(["report", "\x1b[2J\udcff", "--runs-dir", str(tmp_path)]) == 2
    assert "\\x1b[2J\\udcff" in capsys.readouterr().err
    (tmp_path / "\x1b[2Jrun").mkdir()
    (tmp_path / "\x1b[2Jrun" / "manifest.json").write_text("{")
    assert main(["list", "runs", "--runs-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert any("\\x1b[2Jrun" in line and "damaged" in line for line in shown.splitlines())
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "lora-or-qlora", "--replicates", "1" + "0" * 20], "a plan holds 2000000"),
        (["run", "lora-or-qlora", "--max-minutes", "1e400"], "max_minutes = inf"),
        (["run", "lora-or-qlora", "--model", "x" * 5000], "model"),
        (["run", "x" * 5000], "not known"),
        (["report", "x" * 5000], "not found"),
        (["compare", "/dev/zero", "/dev/zero"], "not found"),
        (["gate", "a", "b", "--policy", "/dev/zero"], "not a regular file"),
        (
            ["ab", "training-step", "--base", "HEAD", "--candidate", "HEAD", "--inject-rows", "1" + "0" * 12],
            "inject-rows",
        ),
        (["calibrate", "--inject-rows", "1" + "0" * 12], "inject-rows"),
        (["profile", "lora-or-qlora:lora-r16", "--try", "nonsense"], "no such finding"),
    ],
)
def test_unbounded_values_are_refused_at_once(capsys, tmp_path, monkeypatch, arguments, word):
    """Unbounded numbers, names and files are refused before anything is profiled, planned or created."""
    monkeypatch.setattr("lorameter.commands.profile.profile_variant", lambda *_, **__: pytest.fail("profiled"))
    runs = tmp_path / "runs"
    assert main([*arguments, "--runs-dir", str(runs)]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["calibrate", "--effort", "quick"], ["run", "x", "--replicates", "1e20"],
     ["run", "x", "--replicates", "9" * 5000]],
)  # fmt: skip
def test_calibration_efforts_and_numbers_have_bounds(capsys, arguments):
    """A calibration has no effort that is too small for it, and numbers have bounds."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_arguments_after_a_double_dash_are_not_checked(tmp_path, capfd):
    """Arguments after `--` are not checked by lorameter."""
    assert main(["wrap", "--runs-dir", str(tmp_path), "--", "echo", "--sep=--", "--", "-x=--"]) == 0
    assert capfd.readouterr().out == "--sep=-- -- -x=--\n"


def test_reading_makes_no_folder(write_run, tmp_path, monkeypatch, capsys):
    """Reading creates no runs directory, and an impossible runs directory is not an error."""
    path = write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for code, arguments in (
        (0, ["report", str(path)]), (2, ["claims", str(path)]), (3, ["compare", str(path), str(path)]),
        (0, ["list", "runs"]), (3, ["gate", str(path), str(path)]), (0, ["estimate", "lora-or-qlora:lora-r16"]),
        (0, ["run", "training-step", "--dry-run"]),
    ):  # fmt: skip
        assert main(arguments) == code, arguments
        assert main([*arguments, "--runs-dir", "/dev/null/runs"]) == code, arguments
    assert not list(elsewhere.iterdir())
    assert main(["run", "training-step", "--runs-dir", "/dev/null/runs"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_every_command_is_a_function_and_ends_its_help_with_an_example_that_it_takes(monkeypatch, capsys):
    """Each example is valid as printed, and its command exists."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert command.example.startswith(f"lorameter {command.name}")
        with contextlib.suppress(SystemExit):
            main([*command.name.split(), "--help"])
        assert f"\nexample: {command.example}\n" in capsys.readouterr().out, "on one line, as it is copied"
        options = build_parser().parse_args(shlex.split(command.example.partition(" > ")[0])[1:])
        module, _, name = options.calls.partition(":")
        assert callable(getattr(importlib.import_module(f"lorameter.commands.{module}"), name))


INTERRUPTED = """
import os, signal, sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "lorameter.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupted())
from lorameter.entry import main
sys.argv = ["lorameter", "list", "models"]
sys.exit(main())
"""


@pytest.mark.parametrize(("ignored", "code"), [(False, -signal.SIGINT), (True, 0)])
def test_an_interrupt_during_imports_ends_without_a_traceback(ignored, code):
    """The command ends like other tools, without a traceback; a process that ignores SIGINT continues."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")


def test_an_interrupt_while_options_are_read_is_a_stop(monkeypatch, capsys):
    """The exit code is that of an incomplete measurement."""
    monkeypatch.setattr("lorameter.cli.build_parser", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["list", "models"]) == 4
    assert capsys.readouterr().err == "lorameter: stopped\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "training-step", "--replcates", "3"], "unknown option --replcates. Did you mean --replicates?"),
        (
            ["run", "training-step", "--html", "x"],
            "unknown option --html. It is an option of ab, profile, parity, report,",
        ),
        (["sample", "a", "b", "--xyzzy"], "unknown option --xyzzy. `lorameter sample --help` lists them."),
        (["list", "runs", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_mistyped_option_gets_the_nearest(capsys, words, expected):
    """The error is one line on every Python version."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert expected in last
    assert "bisect" not in last


STARTER = """
import os, subprocess, sys
from lorameter.run.workers.local import worker_environment
descriptor = int(sys.argv[1])
child = subprocess.Popen(
    [sys.executable, "-m", "lorameter.worker", "zygote", str(descriptor)],
    pass_fds=[descriptor], stdin=descriptor, env=worker_environment(1), start_new_session=True,
)
print(child.pid, flush=True)
child.wait()
"""
"""Starts a measuring process as an executor does, and is then killed by the test."""


def test_a_measuring_process_ends_with_its_parent():
    """The parent is killed while the child imports or waits; this process keeps the connection open, so that the child
    cannot notice its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            command = [sys.executable, "-c", STARTER, str(theirs.fileno())]
            starter = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
        with starter:
            child = psutil.Process(int(starter.stdout.readline()))
            starter.kill()
        _, alive = psutil.wait_procs([child], timeout=60)
        assert not alive


def test_a_process_whose_parent_died_before_its_start_exits():
    """The parent died between the fork and the child's first instruction."""
    environment = worker_environment(1) | {"LORAMETER_PARENT": str(os.getppid())}
    words = [sys.executable, "-m", "lorameter.worker", "tokens", "0"]
    done = subprocess.run(words, env=environment, input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_an_interrupt_ends_a_process_as_any_signal_does():
    """SIGINT raises no exception that a library could catch."""
    ours, theirs = Pipe()
    words = [sys.executable, "-m", "lorameter.worker", "tokens", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            words, env=worker_environment(1), pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as process,
    ):
        wire.receive(ours, wire.Hello, 60.0)  # it now waits for its command
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGINT, b"")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one CPU every process stays there")
def test_a_measuring_process_stays_on_the_cpus_of_its_site():
    """It is pinned from its first instruction on; without the variable it may use all CPUs of its parent."""
    lines = "import os\nfrom lorameter import worker\ntry: worker.main(['none'])\n"
    lines += "except IndexError: print(*sorted(os.sched_getaffinity(0)))"
    every = sorted(os.sched_getaffinity(0))
    for cpus, expected in (({CPUS: str(every[-1])}, every[-1:]), ({}, every)):
        environment = worker_environment(1) | cpus
        done = subprocess.run(
            [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True
        )
        assert [int(cpu) for cpu in done.stdout.split()] == expected


@pytest.fixture
def ends():
    """Both ends of a connection."""
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


def test_a_record_arrives_as_it_was_sent(ends):
    """The record has numbers that JSON cannot represent."""
    record = PartialRecord(
        samples={"step_time_s": (0.1, math.inf)},
        values={"loss": np.float64(2.0)},
        checks=({"path": "loss", "observed": None},),
        failure=Failure(phase="turn", kind="LossNotFinite", message="the loss is nan"),
        status="invalid",
    )
    wire.send(ends[1], wire.answer_with(record))
    assert wire.receive_answer(ends[0], PartialRecord) == record
    wire.send(ends[1], wire.answer_with(msgspec.structs.replace(record, values={"loss": math.nan})))
    assert math.isnan(wire.receive_answer(ends[0], PartialRecord).values["loss"])


@pytest.mark.parametrize("data", [b'{"pid": 7, "schema": 5}\n', b"\0\0\0\4junk", b"\0\0\0\1\xc0"])
def test_an_invalid_message_is_refused_at_once(ends, data):
    """The test covers a line of an older protocol, a text, and another value in MessagePack."""
    os.write(ends[1].fileno(), data)
    with pytest.raises(wire.GarbledError):
        wire.receive(ends[0], wire.Hello, 5.0)


def test_an_older_version_is_refused_with_one_sentence():
    """The error names both versions and the remedy."""
    with pytest.raises(InvalidRunError, match=rf"the worker speaks schema 1, this program {SCHEMA} .*\. Choose a rev"):
        wire.check_schema(wire.Hello(schema=1), "the worker")


def test_an_answer_of_another_type_is_garbled_and_a_refusal_is_an_error(ends):
    """The error has the message and the exit code of the other end."""
    wire.send(ends[1], wire.answer_with({"status": "fine"}))
    with pytest.raises(wire.GarbledError, match="not the answer that is expected"):
        wire.receive_answer(ends[0], PartialRecord)
    wire.send(ends[1], wire.Refused("no such file. Mend the path.", UsageError.exit_code))
    with pytest.raises(UsageError, match="no such file"):
        wire.receive_answer(ends[0], PartialRecord)


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(3)", 3), ("import os, time; os.fork() and os._exit(9); time.sleep(60)", 9)]
)
def test_a_process_that_ends_without_an_answer_is_not_waited_for(ends, program, code):
    """The call returns although a child of the process keeps the connection open."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[ends[1].fileno()], start_new_session=True, stderr=subprocess.DEVNULL
    )
    assert wire.ask_process(process, ends[0], wire.Command("look"), int, 60.0) is None
    assert process.returncode == code
