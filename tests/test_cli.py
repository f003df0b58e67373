"""The command line: what it prints, what it loads, how it exits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.commands.table import COMMANDS
from lorameter.records import store


def test_errors_and_lists_act_on_no_terminal(capsys, tmp_path):
    """A name with an escape sequence in it, or with half a character, is shown and not obeyed."""
    assert main(["report", "\x1b[2J\udcff", "--runs-dir", str(tmp_path)]) == 2
    assert "\\x1b[2J\\udcff" in capsys.readouterr().err
    (tmp_path / "\x1b[2Jrun").mkdir()
    (tmp_path / "\x1b[2Jrun" / "manifest.json").write_text("{")
    assert main(["list", "runs", "--runs-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert any("\\x1b[2Jrun" in line and "damaged" in line for line in shown.splitlines())
    assert "\x1b" not in shown


@pytest.mark.parametrize(("failing", "said"), [
    (lambda record: record, "complete"),
    (lambda record: record.replaced(status="oom" if record.replicate else "ok"), "complete, 3 of 6 trials ok"),
])  # fmt: skip
def test_a_list_of_runs_says_how_many_trials_are_ok(write_run, capsys, failing, said):
    """A run of which every trial crashed has come to its end, and is not to be taken for one that can be used."""
    path = write_run("20260101-000000-small-0000", {"plain": (1.0, 1.0), "nf4": (1.0, 1.0)}, change=failing)
    assert main(["list", "runs", "--runs-dir", str(path.parent)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "20260101" in line]
    assert re.split(r"\s{2,}", line.strip())[:3] == ["20260101-000000-small-0000", "small", said]
    assert main(["list", "runs", "--json", "--runs-dir", str(path.parent)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["status"] == "complete"
    assert sum(row["trials"].values()) == 6


def test_a_dry_run_shows_order_time_memory_and_disk(capsys, tmp_path):
    """And starts nothing: no run directory is made."""
    assert main(["run", "lora-or-qlora", "--dry-run", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for word in (
        "3 replicates",
        "lora-r16-control",
        "lockstep",
        "quantization",
        "time",
        "memory",
        "disk",
        "random-weights",
    ):
        assert word in text
    assert main(["run", "lora-or-qlora", "--dry-run", "--json", "--runs-dir", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["order"]) == 15 + 12  # in turns, and isolated for peaks, which the control does without
    assert document["time_s"] > 0
    assert not list(tmp_path.iterdir())


WORKLOAD = "[workload]\nsequence_length=32\nbatch_size=2\ntrain_sequences=16\nnew_tokens=4\n"
PROTOCOL = (
    "[protocol]\nreplicates=1\nwarmup_steps_min=1\nwarmup_steps_max=2\nturns=2\ngenerate_requests=1\n"
    "[controls]\nquantization='nf4'\n"
)
"""As little as still is a trial."""


def measured(folder, study, *options):
    """A real run of a study in a folder, on bases of its own, which another test may have prepared already: the
    finished process."""
    (folder / "mine.toml").write_text(study)
    command = [sys.executable, "-m", "lorameter.cli", "run", str(folder / "mine.toml"), "--json", *options]
    bases = os.environ | {"LORAMETER_BASES": str(folder / "bases")}
    command += ["--runs-dir", str(folder / "runs")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=bases)


SWEEP = f"{WORKLOAD}prompt_tokens=8\n{PROTOCOL}[[variant]]\nname='a'\nr=4\n[[variant]]\nname='b'\nr=8\n"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A real run of two small variants that share their base: the finished process and the folder of its run."""
    folder = tmp_path_factory.mktemp("swept")
    return measured(folder, SWEEP, "--interleave", "shared-base"), folder / "runs"


@pytest.mark.selftest
def test_a_sweep_of_adapters_runs_on_one_base(swept):
    """From study to records: one process and one load a replicate, isolated trials for what needs a process alone."""
    done, runs = swept
    run = store.read_run(json.loads(done.stdout)["run"], runs)
    records = run.records
    timed = [record for record in records if "step_time_s" in record.samples]
    isolated = [record for record in records if record.trial.endswith("-isolated")]
    assert len(timed) == len(isolated) == 3
    assert sum(record.values["base_loads"] for record in timed) == 1
    assert [(base.conversions, base.quantisations) for base in run.manifest.bases] == [(1, 1)]
    assert not any(record.values["base_conversions"] for record in records)
    cold = [record for record in records if "cold_start_time_s" in record.samples]
    assert {record.name for record in cold} == {record.name for record in records}
    assert all(record.values["cold_base_conversions"] == 1 for record in cold)  # as a user's
    assert all(record.interleaving == "shared-base" and not record.memory for record in timed)
    assert all("merged_request_time_s" in record.samples for record in isolated)
    assert all(record.memory["adapter_bytes"] > 0 for record in isolated)
    twins = {record.role: record.samples["timed_loss"] for record in timed if record.name == "a"}
    assert twins["variant"] == twins["control"]


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
def test_what_no_machine_could_do_is_refused_at_once(capsys, tmp_path, monkeypatch, arguments, word):
    """Numbers, names and files without bound; before anything is profiled, planned or made."""
    monkeypatch.setattr("lorameter.commands.profile.profile_variant", lambda *_, **__: pytest.fail("profiled"))
    runs = tmp_path / "runs"
    assert main([*arguments, "--runs-dir", str(runs)]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["calibrate", "--effort", "quick"], ["run", "x", "--replicates", "1e20"],
     ["run", "x", "--replicates", "9" * 5000]],
)  # fmt: skip
def test_what_the_parser_could_not_keep_is_refused(capsys, arguments):
    """An effort that is too small for a calibration is not offered; numbers have bounds."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_words_of_another_program_are_its_own(tmp_path, capfd):
    """Behind `--` nothing is refused that lorameter could not keep."""
    assert main(["wrap", "--runs-dir", str(tmp_path), "--", "echo", "--sep=--", "--", "-x=--"]) == 0
    assert capfd.readouterr().out == "--sep=-- -- -x=--\n"


def test_reading_makes_no_folder(write_run, tmp_path, monkeypatch, capsys):
    """A report by its path needs no runs directory: none is made, and one that could not be made is no error."""
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
    """Each can be typed as it is printed."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert command.example.startswith(f"lorameter {command.name}")
        with contextlib.suppress(SystemExit):
            main([*command.name.split(), "--help"])
        assert f"\nexample: {command.example}\n" in capsys.readouterr().out, "on one line, as it is copied"
        build_parser().parse_args(shlex.split(command.example.partition(" > ")[0])[1:])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_by_it(tmp_path, capsys):
    """Asked in a real shell."""
    main(["completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    asked = "source completion; COMP_WORDS=(lorameter rep); COMP_CWORD=1; _shtab_lorameter; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["report"]


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
def test_an_interrupt_while_it_imports_ends_it_in_silence(ignored, code):
    """As any other tool, without a traceback; who has it ignored from the start is not stopped by it."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")


def test_an_interrupt_while_options_are_read_is_a_stop(monkeypatch, capsys):
    """With the exit code of what was not measured."""
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
    """In one line, on every version of Python, without a list of all commands."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert said in last
    assert "bisect" not in last
