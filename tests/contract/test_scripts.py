"""Tests of a user's training scripts: `wrap`, `ab` of two commands, and the meter."""

import json
import shutil
from pathlib import Path

import pytest

from tests.contract import doors
from tests.contract.expected import check_run, check_shape, parse, read_records

LOOP = doors.SCRIPT.read_text(encoding="utf-8")
COMMAND = "python script.py"


def only_run(runs):
    (run,) = (path for path in Path(runs).iterdir() if path.is_dir())
    return run


@pytest.fixture(scope="module")
def wrapped(filled, tmp_path_factory):
    """The outcome and the run of a wrapped training."""
    runs = tmp_path_factory.mktemp("wrapped")
    outcome = doors.start("lorameter", "wrap", "--runs-dir", runs, "--", "python", filled / "script.py")
    return outcome, only_run(runs)


def test_a_wrapped_command_keeps_its_output_and_exit_code(wrapped):
    """Standard output and exit code are the command's own; the report goes to standard error."""
    outcome, run = wrapped
    assert outcome.code == 0
    assert outcome.out.startswith("last loss ")
    assert "Training" in outcome.err
    assert run.name in outcome.err


def test_the_run_of_a_wrapped_command(wrapped, lorameter):
    """File names, keys and types are the expected ones; every command that reads runs reads it, and it cannot be
    resumed."""
    _, run = wrapped
    check_run("wrap", run)
    check_shape("json/report-wrap", parse(lorameter(f"report {run} --json").out))
    assert lorameter(f"compare {run} {run}").code == 3  # one process has no interval
    assert lorameter(f"history --runs-dir {run.parent}").code == 0
    refused = lorameter(f"run --resume {run}")
    assert (refused.code, "which cannot be resumed. Run it again." in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--require", "base.bits=4", "--", "python", "script.py"), 4),
        (("--no-report", "--", "python", "-c", "raise SystemExit(7)"), 7),
        (("--", "absent-program"), 2),
    ],
)
def test_exit_codes_of_wrap(words, code, tmp_path):
    """The exit code is the command's own, or 4 where that is 0 and a required path is not active."""
    assert doors.start("lorameter", "wrap", "--runs-dir", tmp_path / "runs", *words).code == code


@pytest.fixture(scope="module")
def compared(filled, tmp_path_factory):
    """The outcome and the run of a real A/B of two commands with one replicate."""
    runs = tmp_path_factory.mktemp("compared")
    words = ("--replicates", "1", "--steps", "4", "--allow-disturbed", "--cwd", filled, "--runs-dir", runs, "--json")
    commands = ("--base-command", COMMAND, "--candidate-command", f"{COMMAND} --slow")
    return doors.start("lorameter", "ab", *commands, *words), only_run(runs)


def test_two_commands_are_compared(compared):
    """One replicate has no interval: the verdict is inconclusive and the exit code 3."""
    outcome, run = compared
    document = parse(outcome.out)
    check_shape("json/ab", document)
    assert outcome.code == 3, outcome.err
    assert (document["run"], document["base"], document["candidate"]) == (run.name, COMMAND, f"{COMMAND} --slow")
    (step,) = (row for row in document["comparisons"] if row["metric"] == "step_time_s")
    assert step["verdict"] == "inconclusive"
    assert step["ratio"] > 1
    check_run("ab", run)
    assert {(record["side"], record["role"]) for record in read_records(run)} == {
        ("base", "variant"), ("candidate", "variant"), ("base", "control"),
    }  # fmt: skip


def again(run, folder, name, change):
    """Copy the A/B with its replicate repeated three times and each record changed."""
    shutil.copytree(run, folder / name)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    records = []
    for replicate in range(3):
        for record in read_records(run):
            trial = record["trial"].replace("r0-", f"r{replicate}-")
            records.append(change(record | {"trial": trial, "replicate": replicate, "position": len(records)}))
    manifest |= {"run": name, "order": [record["trial"] for record in records]}
    manifest["study"]["protocol"]["replicates"] = 3
    (folder / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / name / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def timed(factor):
    """Return a change to steps of 10 ms that differ by 0.1 % between replicates; those of the candidate are `factor`
    times as long."""

    def change(record):
        step = 0.01 * (1 + 0.001 * record["replicate"]) * (factor if record["side"] == "candidate" else 1.0)
        for metric in ("step_time_s", "step_cpu_time_s"):
            record["samples"][metric] = [step] * len(record["samples"][metric])
        return record

    return change


def crashed(record):
    if (record["replicate"], record["side"]) != (1, "candidate"):
        return timed(1.0)(record)
    why = {"phase": "timed", "kind": "SIGKILL", "message": "the process ended with signal 9", "traceback": ""}
    return record | {"status": "crashed", "failure": why, "samples": {}, "values": {}, "turn_lengths": []}


@pytest.mark.parametrize(
    ("change", "code"), [(timed(0.5), 0), (timed(1.0), 0), (timed(2.0), 1), (crashed, 4)],
    ids=["faster", "equivalent", "slower", "crashed"],
)  # fmt: skip
def test_exit_codes_of_an_ab(change, code, compared, lorameter, tmp_path):
    """`report`, `gate` and `compare` of an A/B exit as the A/B itself does."""
    _, run = compared
    again(run, tmp_path, "again", change)
    for command in ("report", "gate", "compare"):
        outcome = lorameter(f"{command} again --metric step_time_s --runs-dir {tmp_path}")
        assert outcome.code == code, (command, outcome.out, outcome.err)
    assert lorameter(f"accept again --runs-dir {tmp_path}").code in (2, 4)  # an A/B cannot be a baseline


def test_a_script_with_a_meter(tmp_path):
    """The script leaves a run in the current folder, like that of a wrapped script."""
    lines = LOOP.replace("for _ in range(24):", "meter = Meter(model)\nfor _ in meter.steps(range(24)):")
    (tmp_path / "metered.py").write_text(f"{doors.METER_IMPORT}\n{lines}", encoding="utf-8")
    outcome = doors.start("python", tmp_path / "metered.py", LORAMETER_RUNS=str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    check_run("meter", only_run(tmp_path / "runs"))
