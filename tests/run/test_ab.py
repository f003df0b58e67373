"""Tests of the A/B: its plan, and the command from its sides to its exit code.

The sides are real (worktrees, interpreters); a fake executor replaces the measuring processes.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import venv
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

import lorameter.run.build_plan as planning
import lorameter.run.workers.local as local_executor
from lorameter.cli import main
from lorameter.records import store
from lorameter.records.record import PartialRecord
from lorameter.run.workers import hold_devices
from lorameter.run.workers.local import LocalExecutor
from lorameter.run.workers.sides import present_sides
from tests.run import fakes

GIB = 2**30


@pytest.fixture
def plan(small_study, machine, monkeypatch):
    """A function that plans the small study for processes of 1 GiB each and `free` bytes of memory."""

    def make(*, free=8 * GIB, study=small_study, replicates=5, **options):
        monkeypatch.setattr(planning, "live_group_bytes", lambda members, *_, **_options: len(members) * GIB)
        protocol = dataclasses.replace(study.protocol, replicates=replicates)
        study = dataclasses.replace(study, protocol=protocol)
        return planning.build_plan(
            study, machine, free_bytes=free, options=planning.PlanOptions(sides=present_sides(0), **options)
        )[0]

    return make


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_every_replicate_holds_both_sides_and_the_base_once_more(plan):
    """Both sides of each variant are live together; the base of the first variant also runs on a third executor as the
    control."""
    made = plan()
    assert made.interleaving == "lockstep"
    for replicate in range(5):
        groups = [group for group in made.groups if group.replicate == replicate and group.turns]
        arms = {
            group.slots[0].variant.name: sorted((slot.arm.side, slot.arm.role, slot.executor) for slot in group.slots)
            for group in groups
        }
        sides = [("base", "variant", "base"), ("candidate", "variant", "candidate")]
        assert arms == {"plain": [("base", "control", "control"), *sides], "nf4": sides}
        assert all(len(launch) == 1 for group in groups for launch in group.launches)
    assert max(Counter(slot.trial for slot in made.slots).values()) == 1


def test_processes_that_do_not_fit_run_one_at_a_time(plan):
    """If three processes do not fit, they run one at a time and each measures everything."""
    made = plan(free=3 * GIB)
    assert made.interleaving == "replicates"
    assert all(len(group.slots) == 1 for group in made.groups)
    assert Counter((slot.arm.side, slot.arm.role) for slot in made.slots if slot.replicate == 0) == {
        ("base", "variant"): 2, ("candidate", "variant"): 2, ("base", "control"): 1,
    }  # fmt: skip
    assert all({"steps", "peaks"} <= set(slot.measures) for slot in made.slots)
    assert "3 GiB of 3 GiB" in made.why


def test_paths_of_the_workload_are_absolute(plan, small_study, tmp_path, monkeypatch):
    """Relative paths become absolute, since a revision runs in its own worktree; names are unchanged."""
    monkeypatch.chdir(tmp_path)
    Path("records.jsonl").write_text("\n".join([json.dumps({"instruction": "a", "context": "", "response": "b"})] * 9))
    workload = dataclasses.replace(small_study.workload, data="records.jsonl")
    made = plan(study=dataclasses.replace(small_study, workload=workload))
    assert made.study.workload.data == str(tmp_path / "records.jsonl")
    assert made.study.workload.model == "tiny-llama"


# --- the command ------------------------------------------------------------------------------------------------------

STUDY = """
title = "small"
[workload]
sequence_length = 32
batch_size = 1
train_sequences = 8
held_out_records = 4
held_out_sequences = 1
prompt_tokens = 8
new_tokens = 2
[protocol]
replicates = 6
warmup_steps_min = 1
warmup_steps_max = 1
turns = 2
steps_per_turn = 1
generate_warmup = 0
generate_requests = 1
[[variant]]
name = "plain"
r = 4
dtype = "float32"
"""


class FakeExecutor(fakes.FakeExecutor):
    """An executor whose step time is that of the host's checkout plus a share for each extra row; it records its
    commands.

    `noise` makes all sides but the base slower and faster between replicates; `control` makes only the control slower.
    """

    made: ClassVar[list[FakeExecutor]] = []
    commands: ClassVar[set[str]] = set()
    control = 1.0
    noise = 0.001
    rows = 0

    def start(self, folder, threads):
        self.made.append(self)
        checkout = Path(self.host.cwd or ".") / "gadget" / "__init__.py"
        self.step_s = float(checkout.read_text().partition("=")[2]) if self.host.cwd else 0.1
        self.step_s *= FakeExecutor.control if self.label == "control" else 1.0

    def ask(self, command, trial, timeout_s, **arguments):
        self.commands.add(command)
        if command == "prepare":
            self.rows = arguments["request"]["slowdown_rows"]
        if command == "turn":
            even = int(trial[1 : trial.index("-")]) % 2 == 0
            deviation = 0.0 if self.label == "base" else FakeExecutor.noise if even else -FakeExecutor.noise
            step = self.step_s * (1 + self.rows / 1000) * (1 + deviation)
            counts = {"turn_tokens": (32.0,), "turn_padded_tokens": (0.0,), "turn_sequences": (1.0,)}
            return PartialRecord(
                samples={"step_time_s": (step,), "step_cpu_time_s": (step,), "timed_loss": (2.0,)} | counts
            )
        if command == "finish_training" and trial.endswith("-isolated"):
            return PartialRecord(memory={"host_peak_train_bytes": 2**20})
        return PartialRecord()


def git(folder, *arguments):
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Make the current folder a repository whose package sets the step time: `fast` is 0.1 s, `slow` is 5 % longer."""
    folder = tmp_path / "repository"
    (folder / "gadget").mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for tag, seconds in (("fast", 0.1), ("same", 0.1), ("slow", 0.105)):
        (folder / "gadget" / "__init__.py").write_text(f"STEP_S = {seconds}")
        (folder / "README").write_text(tag)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", tag)
        git(folder, "tag", tag)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def study_file(tmp_path):
    """The smallest study that still is an A/B."""
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    return str(path)


@pytest.fixture
def lorameter(tmp_path, capsys):
    """A function that runs the command line and returns its exit code with its document or error message."""

    def run(*arguments):
        code = main([*arguments, "--runs-dir", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        return code, json.loads(
            captured.out
        ) if "--json" in arguments and captured.out else captured.out or captured.err

    return run


@pytest.fixture
def fake(monkeypatch):
    """Replace the executor by the fake."""
    monkeypatch.setattr(FakeExecutor, "made", [])
    monkeypatch.setattr(FakeExecutor, "commands", set())
    monkeypatch.setattr(FakeExecutor, "control", 1.0)
    monkeypatch.setattr(FakeExecutor, "noise", 0.001)
    monkeypatch.setattr(local_executor, "LocalExecutor", FakeExecutor)
    return FakeExecutor


@pytest.mark.parametrize(("noise", "replicates"), [(0.001, 3), (0.02, 4), (0.2, 12)])
def test_an_ab_takes_the_replicates_that_decide_it(fake, repository, study_file, lorameter, noise, replicates):
    """The more scatter, the later the look that decides; the last one ends it anyway."""
    fake.noise = noise
    options = ("--base", "fast", "--candidate", "fast", "--phase", "train", "--json")
    ended, document = lorameter("ab", study_file, *options)
    (row,) = (row for row in document["comparisons"] if row["metric"] == "step_time_s")
    assert row["replicates"] == replicates
    assert row["verdict"] == ("inconclusive" if replicates == 12 else "equivalent")
    assert document["control"]["train"]["verdict"] == row["verdict"]
    assert ended == (3 if replicates == 12 else 0)


def test_two_revisions_are_measured_and_judged(fake, repository, study_file, lorameter):
    """Each side runs in its own worktree, the base has two executors, and all of them are removed afterwards."""
    options = ("--base", "fast", "--candidate", "slow", "--phase", "train", "--json")
    ended, document = lorameter("ab", study_file, *options)
    assert ended == document["exit"] == 1
    times = [row for row in document["comparisons"] if row["metric"] == "step_time_s"]
    assert [row["verdict"] for row in times] == ["regressed"]
    assert times[0]["replicates"] == 3, "the first look of an A/B, whatever the study says"
    assert document["control"]["train"]["verdict"] == "equivalent"
    assert [executor.label for executor in fake.made] == ["base", "candidate", "control"]
    folders = [executor.host.cwd for executor in fake.made]
    assert folders[0] == folders[2] != folders[1]
    assert not any(Path(folder).exists() for folder in folders)
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert document["base"].startswith("fast")
    assert document["candidate"].startswith("slow")
    sides = store.read_run(document["run"], Path(document["path"]).parent).manifest.sides
    assert sides["candidate"]["facts"]["git"]["commit"] == git(repository, "rev-parse", "slow")


def test_a_base_that_differs_from_itself_is_exit_4(fake, repository, study_file, lorameter):
    """`report` of that run exits with the same code, also as text."""
    fake.control = 1.2
    code, document = lorameter("ab", study_file, "--base", "fast", "--candidate", "slow", "--phase", "train", "--json")
    assert code == 4
    assert document["control"]["train"]["verdict"] == "regressed"
    assert {row["verdict"] for row in document["comparisons"]} == {"invalid"}
    again, text = lorameter("report", document["run"])
    assert again == 4
    assert "invalid" in text


def test_too_few_replicates_are_inconclusive(fake, repository, study_file, lorameter):
    """Identical code with noise and two replicates exits with 3, unless a policy accepts it."""
    fake.noise = 0.2
    options = ("--base", "fast", "--candidate", "same", "--phase", "train", "--replicates", "2", "--json")
    code, document = lorameter("ab", study_file, *options)
    assert code == 3
    Path("policy.toml").write_text("inconclusive = 'pass'")
    assert lorameter("report", document["run"], "--policy", "policy.toml")[0] == 0


@pytest.mark.parametrize(("options", "message"), [
    (["--inject-rows", "-1"], "--inject-rows = -1"),
    (["--json", "--format", "markdown"], "both choose the format"),
    (["--effort", "quick", "--replicates", "2"], "both set the replicates"),
    (["--policy", "no-such.toml"], "no-such.toml"),
    (["--variant", "nf5"], "nf5"),
])  # fmt: skip
def test_invalid_options_are_refused_before_anything_is_measured(
    fake, repository, study_file, lorameter, options, message
):
    """The command exits with 2, names the wrong word and makes no executor."""
    code, text = lorameter("ab", study_file, "--base", "fast", "--candidate", "same", *options)
    assert code == 2
    assert message in str(text)
    assert fake.made == []
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("candidate", ["no-such-branch", "./bare/bin/python"])
def test_sides_are_checked_before_the_device_is_waited_for(fake, repository, study_file, lorameter, candidate):
    """An unknown revision and a Python without torch are refused while another measurement holds the device."""
    venv.create("bare", symlinks=True)
    with hold_devices([LocalExecutor()], "wait"):
        code, text = lorameter("ab", study_file, "--base", "fast", "--candidate", candidate, "--if-busy", "refuse")
        assert code == 2
        assert f"ab: side = {candidate!r}" in text
        assert lorameter("ab", study_file, "--base", "fast", "--candidate", "same", "--if-busy", "refuse")[0] == 4
    assert fake.made == []


def test_calibrate_sizes_its_slow_down_by_two_pilots(fake, repository, study_file, lorameter):
    """With a row that costs 0.1 % of a step, a slow-down of 5 % takes 50 rows; one document has the false alarms, power
    and prices."""
    code, document = lorameter("calibrate", study_file, "--replicates", "9", "--json")
    assert code == 0
    assert document["inject_rows"] == pytest.approx(50, abs=2)
    assert document["calibration"]["injected"]["ratio"] == pytest.approx(1.05, rel=0.005)
    assert [rate["replicates"] for rate in document["calibration"]["rates"]] == [5, 8]
    assert [executor.label for executor in fake.made] == ["base", "candidate", "control"] * 3
    assert fake.commands.isdisjoint({"begin_generate", "request"})


# --- interrupted runs -------------------------------------------------------------------------------------------------


def test_an_ab_that_broke_off_is_resumed(fake, repository, study_file, lorameter):
    """A resumed A/B uses the commits of its start, and its verdict is that of the whole run. A side with another
    version of a package is refused with both versions, and nothing is measured."""
    words = ("--base", "fast", "--candidate", "main", "--phase", "train", "--replicates", "3", "--json")
    _, before = lorameter("ab", study_file, *words)
    path = Path(before["path"])
    lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(lines[:9]))
    text = json.dumps(json.loads((path / "manifest.json").read_text()) | {"status": "interrupted"})
    changed = json.loads(text)
    changed["sides"]["candidate"]["facts"]["packages"]["peft"] = "0.1"
    (path / "manifest.json").write_text(json.dumps(changed))
    fake.made.clear()
    code, message = lorameter("ab", "--resume", before["run"])
    assert code == 2
    assert "its candidate would change during the run: packages.peft: '0.1' then" in message
    assert fake.made == []

    (path / "manifest.json").write_text(text)
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "main has moved")
    code, document = lorameter("run", "--resume", before["run"], "--json")
    assert (code, document["exit"]) == (before["exit"], before["exit"])
    assert [row["ratio"] for row in document["comparisons"]] == [row["ratio"] for row in before["comparisons"]]
    assert [executor.label for executor in fake.made] == ["base", "candidate", "control"]
    run = store.read_run(document["run"], Path(document["path"]).parent)
    assert tuple(record.trial for record in run.records) == run.manifest.order
    assert (run.state, len(run.manifest.resumed)) == ("complete", 1)
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.fixture
def calibration(fake, repository, study_file, lorameter, tmp_path):
    """An interrupted calibration after its first replicates, and the document of the uninterrupted one."""
    _, document = lorameter("calibrate", study_file, "--replicates", "9", "--inject-rows", "50", "--json")
    (path,) = store.list_runs(tmp_path / "runs")
    lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(lines[:9]))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    fake.made.clear()
    return path.name, document


def test_an_interrupted_calibration_is_resumed(calibration, fake, lorameter):
    """A resumed calibration keeps its measurements and its injected work; rates and prices are those of the whole
    calibration."""
    name, before = calibration
    code, document = lorameter("calibrate", "--resume", name, "--json")
    assert code == 0
    assert [executor.label for executor in fake.made] == ["base", "candidate", "control"]
    assert document["inject_rows"] == 50
    fake.made.clear()
    assert lorameter("calibrate", "--resume", name, "--json") == (0, document), "nothing is left, and it says the same"
    assert fake.made == []
    for found in (before, document):
        del found["calibration"]["seconds_per_replicate"], found["calibration"]["prices"]
    assert document == before


@pytest.mark.parametrize(("rows", "message"), [
    (["--inject-rows", "50"], "resume: lorameter calibrate --resume"),
    ([], "it determines the slow-down of a calibration. Start a new calibration"),
])  # fmt: skip
def test_a_stopped_calibration_names_the_kept_run(fake, repository, study_file, lorameter, monkeypatch, rows, message):
    """The message names the kept run or the kept run of a pilot; nothing else starts."""
    ask = FakeExecutor.ask

    def stopped(self, command, trial, *arguments, **others):
        if trial.startswith("r1") and command == "turn":
            signal.raise_signal(signal.SIGTERM)
        return ask(self, command, trial, *arguments, **others)

    monkeypatch.setattr(FakeExecutor, "ask", stopped)
    code, text = lorameter("calibrate", study_file, "--replicates", "9", *rows)
    assert code == 4
    assert "was stopped, and what it had measured is kept" in text
    assert message in text
    assert len(fake.made) == 3
