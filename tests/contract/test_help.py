"""Tests of the commands and options in `--help`.

Tests of exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 invalid, 5 not comparable, 70 internal error.

A command that refuses prints nothing on standard output and names the refused value on standard error. The exit codes
of measuring commands are in the tests that measure with them.

Tests of `python -m kernels_check`: the content of a recording, and the fast paths of this machine.
"""

import argparse
import re
from pathlib import Path

import pytest

from tests.contract import doors
from tests.contract.doors import COMMANDS
from tests.contract.expected import check_document, check_shape, check_text, parse

NO_JSON = ("wrap", "model")
"""wrap leaves standard output to the command, and model only has subcommands."""


def test_help_lists_all_commands(lorameter, monkeypatch):
    """`lorameter --help` lists exactly these commands."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = lorameter("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.findall(r"^    ([a-z]+)", outcome.out, re.M) == [name for name in COMMANDS if " " not in name]
    check_text("help/lorameter.txt", outcome.out, ignore_space=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_every_option(command, lorameter, monkeypatch):
    """Help exits with 0 and names every option; all commands but two have --json and --runs-dir."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = lorameter(f"{command} --help")
    assert (outcome.code, outcome.err) == (0, "")
    assert ("--json" in outcome.out) == (command not in NO_JSON)
    check_text(f"help/{command.replace(' ', '-')}.txt", outcome.out, ignore_space=True)


def test_the_version_is_one_line(lorameter):
    """The output is one line with the name of the program."""
    outcome = lorameter("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(r"lorameter \S+\n", outcome.out)


@pytest.mark.parametrize("command", ["", "run", "list"])
def test_help_imports_nothing_heavy(command):
    """The console script runs in a new interpreter."""
    outcome = doors.start("lorameter", *command.split(), "--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in outcome.err.splitlines()}
    assert outcome.code == 0
    assert "argparse" in imported
    assert not {"torch", "numpy", "pandas", "scipy", "rich", "pytest", "psutil"} & imported


@pytest.mark.parametrize("command", ["", "probe", "trace", "selftest"])
def test_help_of_kernels_check_names_every_option(command, kernels_check, monkeypatch):
    """`python -m kernels_check COMMAND --help` exits with 0."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = kernels_check(f"{command} --help")
    assert (outcome.code, outcome.err) == (0, "")
    check_text(f"help/kernels_check-{command or 'main'}.txt", outcome.out, ignore_space=True)


DERIVED = "--runs-dir derived"
CODES = {
    0: (
        "list keys", "list runs --runs-dir damaged", "report base --verbose --sort ratio",
        f"report elsewhere {DERIVED}",
        f"claims steady {DERIVED}", f"compare steady faster --metric '*peak*' {DERIVED}",
        f"gate steady faster --policy lenient.toml {DERIVED}", "gate base candidate --policy lenient.toml",
        "export base --format csv --table trials", "export base --format github-action-benchmark",
        "export base --format bencher", "prune --older 900w --dry-run", "run study.toml --dry-run",
        "estimate lora-or-qlora:lora-r16 --model random:llama2-7b",
    ),
    1: (f"compare faster steady {DERIVED}", f"gate steady slower {DERIVED}"),
    3: (f"compare steady steady {DERIVED}",),
    4: (
        f"report interrupted {DERIVED}", f"report control-failed {DERIVED}", f"compare steady failed {DERIVED}",
        f"compare failed steady {DERIVED}", f"compare steady interrupted {DERIVED}",
        f"compare steady control-failed {DERIVED}", f"gate steady failed {DERIVED}", f"claims control-failed {DERIVED}",
    ),
    5: (f"gate steady elsewhere {DERIVED}", "compare baseline base", "gate baseline base"),
}  # fmt: skip
"""Commands by the exit code of their verdict, without those of test_reports.py and test_documents.py."""
REFUSED = {
    2: {
        "": "COMMAND", "no-such-command": "no-such-command",
        "run": "study", "run no-such-study": "no-such-study", "run study.toml --replicates 0": "replicates",
        "run study.toml --variant nf5": "nf5", "run study.toml --model nothing": "nothing",
        "run study.toml --effort quick --replicates 2": "--replicates",
        "run study.toml --interleave shared-base --dry-run": "shared-base",
        "run study.toml --data absent.jsonl": "absent",
        "run study.toml --no-such-option": "--no-such-option", "run --resume no-such-run": "no-such-run",
        "run --resume base --effort quick": "--effort", "run llama2-lora-parameters --resume base": "base",
        "ab study.toml": "--base", "ab study.toml --base HEAD --candidate no-such-revision": "HEAD",
        "ab --base-command 'python script.py'": "--candidate-command",
        "ab --base-command 'python absent.py' --candidate-command 'python script.py'": "absent.py",
        "ab study.toml --base HEAD --candidate HEAD --policy mistyped.toml": "tolerence",
        "calibrate --inject-rows 0": "inject-rows", "calibrate study.toml --replicates 2": "replicates",
        "calibrate --resume base": "base", "bisect study.toml --good no-such --bad HEAD": "no-such",
        "bisect study.toml": "--good", "wrap": "command", "wrap --require nonsense -- python script.py": "nonsense",
        "estimate study.toml": "study.toml", "estimate study.toml:no-such": "no-such",
        "estimate study.toml:lora --gpu MI300X": "MI300X", "profile study.toml:no-such": "no-such",
        "profile study.toml:lora --try no-such-finding": "no-such-finding", "parity study.toml:no-such": "no-such",
        "parity study.toml:lora --adapter absent": "absent",
        "report no-such-run": "no-such-run", "report run --runs-dir damaged": "run",
        "report base --metric no_such_metric": "no_such_metric", "report base --variant nf5": "nf5",
        "report base --format html": "html",
        "list": "studies", "list no-such-thing": "no-such-thing", "list variants": "study",
        "list variants no-such-study": "no-such-study", "list sizes": "study",
        "model": "ACTION", "model fetch no-such-model": "no-such-model", "model fetch tiny-llama": "tiny-llama",
        "compare": "BASE", "compare base no-such-run": "no-such-run", "compare mistyped.toml base": "mistyped.toml",
        "compare base candidate --metric no_such_metric": "no_such_metric",
        "gate base candidate --policy mistyped.toml": "tolerence", "gate base candidate --policy absent.toml": "absent",
        "accept no-such-run": "no-such-run", "sample base no-such": "no-such", "sample base lora --replicate 9": "9",
        f"claims no-claims {DERIVED}": "no-claims", "claims no-such-run": "no-such-run",
        "export no-such-run": "no-such-run", "export base --format xml": "xml",
        "history no_such_metric": "no_such_metric", "history --runs-dir none": "run",
        "prune --keep -1": "-1", "prune --older 5": "5",
        "pack no-such-run": "no-such-run", "completion fish": "fish", "doctor --no-such-option": "--no-such-option",
    },
    4: {
        f"accept failed {DERIVED}": "failed", f"accept interrupted {DERIVED}": "interrupted",
        f"accept control-failed {DERIVED}": "control-failed",
    },
}  # fmt: skip


def make_cases(codes):
    return [pytest.param(line, code, id=line or "nothing") for code, lines in codes.items() for line in lines]


@pytest.mark.parametrize(("line", "code"), make_cases(CODES))
def test_exit_code_and_output_of_a_verdict(line, code, lorameter):
    """The exit code gives the verdict, and standard output has the answer."""
    outcome = lorameter(line)
    assert outcome.code == code, outcome.err
    assert outcome.out


@pytest.mark.parametrize(("line", "code"), make_cases(REFUSED))
def test_a_refused_command_names_the_value(line, code, lorameter):
    """The exit code gives the reason, standard output is empty, standard error names the refused value, and nothing is
    measured."""
    outcome = lorameter(line)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert REFUSED[code][line] in outcome.err
    assert "Traceback" not in outcome.err
    assert {path.name for path in Path("runs").iterdir()} == {"base", "candidate"}


@pytest.mark.parametrize("line", ["report no-such-run --json", "run no-such-study --json", "compare base --json"])
def test_a_refusal_prints_no_document(line, lorameter):
    """With --json standard output stays empty as well."""
    outcome = lorameter(line)
    assert (outcome.code, outcome.out) == (2, "")


def test_baseline_is_the_accepted_run(lorameter, own_folder):
    """`baseline` is the accepted run of the same fingerprint and study."""
    derived = "--runs-dir derived"
    assert lorameter(f"accept steady {derived}").code == 0
    assert lorameter(f"compare baseline slower {derived}").code == 1
    assert lorameter(f"gate baseline slower {derived}").code == 1
    assert lorameter(f"compare baseline elsewhere {derived}").code == 5


def test_pruning_keeps_the_newest_run(lorameter, own_folder):
    """The exit code is 0 whether or not a run is removed, and the newest run stays."""
    assert lorameter("prune --keep 1").code == 0
    assert lorameter("prune --keep 1").code == 0
    assert len([path for path in (own_folder / "runs").iterdir() if path.is_dir()]) == 1


def test_a_packed_run_is_one_file(lorameter, own_folder):
    """The file is in the current folder unless --output sets another path."""
    assert lorameter("pack base").code == 0
    assert (own_folder / "base.lorameter.zip").is_file()
    assert lorameter("report base.lorameter.zip").code == 0
    assert lorameter("pack base --output absent/x.zip").code in (2, 4)


@pytest.mark.parametrize(("raised", "code"), [(RuntimeError("planted"), 70), (KeyboardInterrupt(), 4)])
def test_a_defect_and_an_interrupt_have_exit_codes_of_their_own(raised, code, lorameter, monkeypatch):
    """An unexpected error exits with 70 and a traceback, and never as a regression; Ctrl-C exits with 4 and without a
    traceback."""

    def broken(*_, **__):
        raise raised

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", broken)
    outcome = lorameter("report base")
    assert (outcome.code, outcome.out) == (code, "")
    assert ("RuntimeError: planted" in outcome.err) == (code == 70)


@pytest.mark.parametrize("file", ["trace.json", "trace.csv"])
def test_a_recording_is_summarised(file, kernels_check):
    """The output has backends, 4-bit paths and shares of time, as text and as a document."""
    text, document = kernels_check(f"trace {file}"), kernels_check(f"trace {file} --json")
    assert (text.code, document.code) == (0, 0)
    check_text(f"kernels_check/{file}.txt", text.out)
    check_document(f"kernels_check/{file}", parse(document.out))


@pytest.mark.parametrize("line", [
    "no-such-command", "trace", "trace a b", "trace absent.json", "trace strict.toml", "rules", "probe --fast",
])  # fmt: skip
def test_a_bad_call_of_kernels_check_is_refused(line, kernels_check):
    """A bad call exits with 2, with the reason on standard error and nothing on standard output."""
    outcome = kernels_check(line)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_the_probe_tries_every_fast_path(kernels_check, monkeypatch):
    """The document has an entry for each fast path, whether it ran, and the evidence."""

    def refuse(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", refuse)  # a compilation takes most of a minute
    outcome = kernels_check("probe --json")
    document = parse(outcome.out)
    assert document["machine"].pop("versions")["torch"]
    check_shape("kernels_check/probe", document)
    paths = {path["name"]: path for path in document["paths"]}
    assert paths["SDPA math"]["status"] == paths["NF4"]["status"] == "ran"
    assert paths["compile"]["status"] == "unavailable"
    assert outcome.code == 0
