"""A signal to a measuring process under each door but a plain run (`test_long_processes.py`): pytest, A/B, profile. All
processes are real. Marked: `make proof-long` takes its minutes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.records import store

pytestmark = pytest.mark.faults

BREAKING = Path(__file__).with_name("breaking.py")
DEADLY = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSEGV]
STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 2
prompt_tokens = 8
new_tokens = 4
[protocol]
replicates = 1
warmup_steps_min = 1
warmup_steps_max = 2
turns = 2
generate_warmup = 0
generate_requests = 2
allow_disturbed = true
[[variant]]
name = "a"
r = 4
[[variant]]
name = "b"
r = 8
"""
CONFTEST = """
import importlib.util, os
from harness.pytest_plugin import attach

spec = importlib.util.spec_from_file_location("breaking", os.environ["BREAKING"])
breaking = importlib.util.module_from_spec(spec)
spec.loader.exec_module(breaking)

def pytest_configure(config):
    breaking.arm()
    attach(config)
"""
BENCHMARK = """
import pytest

@pytest.mark.lorameter("train")
def test_train(variant_name, replay):
    replay()

@pytest.mark.lorameter("cold")
def test_cold(variant_name, replay):
    replay()
"""
TRIALS = {"ab": "r0-a-candidate", "pytest": "r0-a", "profile": "r0-a"}
"""The trial under way, by door."""


@pytest.fixture
def broken(tmp_path, runs):
    """A function that goes through a door and breaks a process behind it: exit code, what was said, and the records by
    trial. No process may be left."""
    study = tmp_path / "small.toml"
    study.write_text(STUDY)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_small.py").write_text(BENCHMARK)
    ours = ["--runs-dir", str(runs)]
    lines = {
        "ab": [str(BREAKING), "ab", str(study), "--base", sys.executable, "--candidate", sys.executable, *ours],
        "pytest": ["-m", "pytest", str(tmp_path), f"--lorameter-study={study}", f"--lorameter-runs-dir={runs}",
                   "--lorameter-interleave=lockstep", "-p", "no:cacheprovider"],
        "profile": [str(BREAKING), "profile", f"{study}:a", *ours],
    }  # fmt: skip

    def go(door, target, number, phase, *options):
        environment = os.environ | {
            "BREAK": f"{target}:{int(number)}:{TRIALS[door]}:{phase}", "BREAKING": str(BREAKING), "NO_COLOR": "1",
            "HERE": (here := str(tmp_path)),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *lines[door], *options], env=environment, cwd=tmp_path, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        ours_left = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("HERE") == here]
        assert not [one for one in ours_left if one.pid != os.getpid()]
        found = store.list_runs(runs) if runs.exists() else []
        records = {one.trial: one for path in found for one in store.read_run(path.name, runs).records}
        return done.returncode, done.stdout + done.stderr, records

    return go


def check(door, code, said, number, *, measured=True):
    """The end is a documented one, no verdict, and names the signal."""
    assert code == (pytest.ExitCode.TESTS_FAILED if door == "pytest" and measured else 4), said
    assert "Traceback" not in said, said
    assert number.name in said, said


@pytest.mark.parametrize("number", DEADLY)
@pytest.mark.parametrize("target", ["child", "zygote"])
@pytest.mark.parametrize("door", ["ab", "pytest"])
def test_a_process_that_is_ended_in_its_turn(door, target, number, broken):
    """A row for the trial under way, and for whatever its zygote had forked; the others are measured."""
    code, said, records = broken(door, target, number, "turn", *PHASE[door])
    check(door, code, said, number)
    lost = records.pop(TRIALS[door])
    assert (lost.status, lost.failure.phase) == ("crashed", "turn")
    assert number.name in lost.failure.message
    theirs = {record.status for record in records.values()}
    assert "ok" in theirs or (target, door) == ("zygote", "pytest")  # whose one zygote has forked all of them
    assert theirs <= {"ok", "crashed"}


PHASE = {"ab": ("--phase", "train", "--variant", "a"), "pytest": ("-k", "train")}


@pytest.mark.parametrize("target", ["child", "zygote"])
@pytest.mark.parametrize("phase", ["build", "warm_up", "finish_training"])
@pytest.mark.parametrize("door", ["ab", "pytest"])
def test_a_process_that_is_killed_in_another_phase(door, phase, target, broken):
    """The same, with that phase in its row."""
    code, said, records = broken(door, target, signal.SIGKILL, phase, *PHASE[door])
    check(door, code, said, signal.SIGKILL)
    lost = records[TRIALS[door]]
    assert (lost.status, lost.failure.phase) == ("crashed", phase)


@pytest.mark.parametrize("number", DEADLY)
@pytest.mark.parametrize("target", ["child", "zygote"])
@pytest.mark.parametrize("phase", ["build", "profile"])
def test_a_process_that_is_ended_under_a_profile(phase, target, number, broken, runs):
    """There is no half of one."""
    code, said, _ = broken("profile", target, number, phase)
    check("profile", code, said, number)
    assert not list(runs.glob("*/profile.json"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("door", ["ab", "pytest", "profile"])
def test_a_token_process_that_is_killed(door, number, broken, runs):
    """Nothing is measured, and the log is named."""
    code, said, records = broken(door, "tokens", number, "-")
    check(door, code, said, number, measured=False)
    assert not records
    assert "/logs/tokens" in "".join(said.split())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("door", ["ab", "pytest"])
def test_a_cold_interpreter_that_is_killed(door, number, broken):
    """A row for the one whose it was; the others are measured."""
    options = ("--phase", "train", "--phase", "cold", "--variant", "a") if door == "ab" else ()
    code, said, records = broken(door, "cold", number, "-", *options)
    check(door, code, said, number)
    crashed = [record for record in records.values() if record.status == "crashed"]
    assert [record.failure.phase for record in crashed] == ["cold"]
    assert {record.status for record in records.values()} == {"ok", "crashed"}
