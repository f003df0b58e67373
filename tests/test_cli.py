"""Tests of the command line: its output, its imports and its exit codes."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys

import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.commands.table import COMMANDS


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
        (["gate", "a", "b", "--policy", "/dev/zero"], "no plain file"),
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
    for arguments in (["report", str(path)], ["claims", str(path)], ["compare", str(path), str(path)], ["list", "runs"],
                      ["gate", str(path), str(path)], ["estimate", "lora-or-qlora:lora-r16"],
                      ["run", "training-step", "--dry-run"]):  # fmt: skip
        assert main(arguments) in (0, 2, 3, 4)
        assert main([*arguments, "--runs-dir", "/dev/null/runs"]) in (0, 2, 3, 4)
    assert not list(elsewhere.iterdir())
    assert main(["run", "training-step", "--runs-dir", "/dev/null/runs"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_every_command_ends_its_help_with_an_example_that_it_takes(monkeypatch, capsys):
    """Each example is valid as printed."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert command.example.startswith(f"lorameter {command.name}")
        with contextlib.suppress(SystemExit):
            main([*command.name.split(), "--help"])
        assert f"\nexample: {command.example}\n" in capsys.readouterr().out, "on one line, as it is copied"
        build_parser().parse_args(shlex.split(command.example.partition(" > ")[0])[1:])


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
    ("words", "said"),
    [
        (["reprot"], "unknown command 'reprot'. Did you mean report?"),
        (["xyzzy"], "unknown command 'xyzzy'. `lorameter --help` lists them."),
        (["list", "rnus"], "argument what: invalid choice: 'rnus'. Did you mean runs?"),
        (["run", "training-step", "--replcates", "3"], "unknown option --replcates. Did you mean --replicates?"),
        (["sample", "a", "b", "--xyzzy"], "unknown option --xyzzy. `lorameter sample --help` lists them."),
        (["list", "runs", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_mistyped_command_or_option_gets_the_nearest(capsys, words, said):
    """The error is one line on every Python version, without a list of all commands."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert said in last
    assert "bisect" not in last
