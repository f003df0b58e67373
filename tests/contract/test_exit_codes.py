"""Tests of exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 invalid, 5 not comparable, 70 internal error.

A command that refuses prints nothing on standard output and names the refused value on standard error. The exit codes
of measuring commands are in the tests that measure with them.
"""

import argparse
from pathlib import Path

import pytest

DERIVED = "--runs-dir derived"
CODES = {
    0: (
        "list runs", "list studies", "list models", "list keys", "list variants study.toml",
        "list runs --runs-dir damaged",
        "report base", "report base --verbose --sort ratio", f"report elsewhere {DERIVED}",
        "claims base", f"claims steady {DERIVED}", "sample base lora --count 1", "history",
        f"compare steady faster --metric '*peak*' {DERIVED}",
        f"gate steady faster --policy lenient.toml {DERIVED}", "gate base candidate --policy lenient.toml",
        "export base --format csv --table trials", "export base --format github-action-benchmark",
        "export base --format bencher", "prune --keep 5 --dry-run",
        "prune --older 900w --dry-run", "completion bash", "run study.toml --dry-run", "run --resume base",
        "estimate study.toml:lora", "estimate lora-or-qlora:lora-r16 --model random:llama2-7b",
    ),
    1: (
        f"compare steady slower {DERIVED}", f"compare faster steady {DERIVED}", f"gate steady slower {DERIVED}",
        f"gate steady slower --policy strict.toml {DERIVED}",
    ),
    3: ("compare base candidate", f"compare steady steady {DERIVED}", "gate base candidate"),
    4: (
        f"report failed {DERIVED}", f"report interrupted {DERIVED}", f"report control-failed {DERIVED}",
        f"compare steady failed {DERIVED}", f"compare failed steady {DERIVED}", f"compare steady interrupted {DERIVED}",
        f"compare steady control-failed {DERIVED}", f"gate steady failed {DERIVED}",
        f"claims control-failed {DERIVED}",
    ),
    5: (
        f"compare steady elsewhere {DERIVED}", f"gate steady elsewhere {DERIVED}", "compare baseline base",
        "gate baseline base",
    ),
}  # fmt: skip
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
        "report": "RUN", "report no-such-run": "no-such-run", "report run --runs-dir damaged": "run",
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


def of(codes):
    return [pytest.param(line, code, id=line or "nothing") for code, lines in codes.items() for line in lines]


@pytest.mark.parametrize(("line", "code"), of(CODES))
def test_exit_code_and_output_of_a_verdict(line, code, lorameter):
    """The exit code gives the verdict, and standard output has the answer."""
    outcome = lorameter(line)
    assert outcome.code == code, outcome.err
    assert outcome.out


@pytest.mark.parametrize(("line", "code"), of(REFUSED))
def test_a_command_that_refuses(line, code, lorameter):
    """The exit code gives the reason, standard output is empty, standard error names the refused value, and nothing is
    measured."""
    outcome = lorameter(line)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert REFUSED[code][line] in outcome.err
    assert "Traceback" not in outcome.err
    assert {path.name for path in Path("runs").iterdir()} == {"base", "candidate"}


@pytest.mark.parametrize("line", ["report no-such-run --json", "run no-such-study --json", "compare base --json"])
def test_a_refusal_is_no_document(line, lorameter):
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


def test_pruning(lorameter, own_folder):
    """The exit code is 0 whether or not a run is removed, and the newest run stays."""
    assert lorameter("prune --keep 1").code == 0
    assert lorameter("prune --keep 1").code == 0
    assert len([path for path in (own_folder / "runs").iterdir() if path.is_dir()]) == 1


def test_packing(lorameter, own_folder):
    """The file is in the current folder unless --output sets another path."""
    assert lorameter("pack base").code == 0
    assert (own_folder / "base.lorameter.zip").is_file()
    assert lorameter("report base.lorameter.zip").code == 0
    assert lorameter("pack base --output absent/x.zip").code in (2, 4)


@pytest.mark.parametrize(("raised", "code"), [(RuntimeError("planted"), 70), (KeyboardInterrupt(), 4)])
def test_a_defect_and_a_stop(raised, code, lorameter, monkeypatch):
    """An unexpected error exits with 70 and a traceback, and never as a regression; Ctrl-C exits with 4 and without a
    traceback."""

    def broken(*_, **__):
        raise raised

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", broken)
    outcome = lorameter("report base")
    assert (outcome.code, outcome.out) == (code, "")
    assert ("RuntimeError: planted" in outcome.err) == (code == 70)
