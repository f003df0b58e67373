"""What is refused: the message on standard error, nothing on standard output, and the exit code."""

import dataclasses
import json

import pytest

DAMAGED = (
    "unknown-field unknown-field-of-manifest newer-schema newer-schema-of-a-record wrong-type wrong-type-inside "
    "wrong-word missing-key missing-key-of-manifest impossible-study no-records cut-manifest no-such-run"
).split()
LINES = (
    *(f"report {run} --runs-dir damaged" for run in DAMAGED),
    *(
        f"{command} unknown-field --runs-dir damaged"
        for command in ("claims", "accept", "compare no-records", "gate no-records")
    ),
    "report no-such-run --runs-dir none",
    "report no-such-run --runs-dir files/sound.json",
    "compare no-such-run sound --runs-dir runs",
    "compare files/not-json.json sound --runs-dir runs",
    "compare files/not-a-benchmark.json sound --runs-dir runs",
    "run --runs-dir runs",
    "run no-such-study --runs-dir runs",
    "run lora-or-qlora --effort quick --replicates 2 --runs-dir runs",
    "run --resume sound --effort quick --runs-dir runs",
    "run --resume ab --runs-dir runs",
    "run --resume no-such-run --runs-dir runs",
    "run no-such-study --resume sound --runs-dir runs",
    "run llama2-lora-parameters --resume sound --runs-dir runs",
    "list variants",
    "list variants no-such-study",
    "list sizes",
    "ab training-step --base HEAD --candidate HEAD --inject-rows -1 --runs-dir runs",
    "ab training-step --base HEAD --candidate HEAD --policy files/mistyped.toml --runs-dir runs",
    "calibrate --inject-rows 0 --runs-dir runs",
    "estimate lora-or-qlora --runs-dir runs",
    "estimate lora-or-qlora:lora-r16 --gpu A100 --runs-dir runs",
    "estimate lora-or-qlora:lora-r16 --gpu MI300X --runs-dir runs",
    "estimate lora-or-qlora:lora-r16 --gpu 1e30GiB --runs-dir runs",
    "profile no-such-study:variant --runs-dir runs",
    "profile lora-or-qlora:qlora-nf4-r16 --try no-such-finding --runs-dir runs",
    "model fetch no-such-model",
)
MISUSED = ("", "no-such-command", "report", "list no-such-thing", "gate sound slower --format html", "compare")


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("line", LINES)
def test_what_is_refused(line, form, lorameter, holds):
    """The message names what is wrong and what to do, and is that which was kept."""
    holds(line + form, lorameter(line + form))


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
def test_a_complete_run_is_shown_and_not_gone_on_with(form, lorameter, holds):
    """`--resume` of a complete run prints what was measured."""
    line = f"run --resume sound --runs-dir runs{form}"
    holds(line, lorameter(line))


@pytest.mark.parametrize("line", MISUSED)
def test_a_misused_command_line(line, lorameter):
    """Exit code 2 and nothing on standard output; how it is worded is argparse's."""
    outcome = lorameter(line)
    assert (outcome.code, outcome.out) == (2, "")
    assert "error:" in outcome.err


def test_a_defect_of_ours(lorameter, monkeypatch):
    """It ends with 70 and says whose fault it is; the traceback is for us."""

    def broken(*_, **__):
        raise RuntimeError("constructed")

    monkeypatch.setattr(json, "loads", broken)
    outcome = lorameter("report sound --runs-dir runs")
    assert "RuntimeError: constructed" in outcome.err
    assert outcome.out == ""
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        70,
        "lorameter: unexpected error; this is a defect of lorameter, please report it.",
    )


def test_a_command_that_is_stopped(lorameter, monkeypatch):
    """It ends with 4, as what is not valid does."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "loads", stopped)
    outcome = lorameter("report sound --runs-dir runs")
    assert dataclasses.astuple(outcome) == (4, "", "lorameter: stopped\n")
