"""Tests of resuming an interrupted run: kept trials, trials that are measured again, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lorameter.run.measure
import lorameter.run.workers.local
from lorameter.cli import main
from lorameter.records import store
from tests.run.fakes import FakeExecutor as Executor

STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
[protocol]
replicates = 3
turns = 2
[[variant]]
name = "a"
r = 4
[[variant]]
name = "b"
r = 8
[[variant]]
name = "c"
r = 16
[[claim]]
id = "1"
says = "the step takes as long at every rank"
parts = [{ rule = "equal", axis = "r", metric = "step_time_s" }]
"""


@pytest.fixture
def runs(tmp_path, machine, monkeypatch):
    """The folder of runs, with a fake executor and a constant machine."""
    monkeypatch.setattr(lorameter.run.workers.local, "LocalExecutor", Executor)
    monkeypatch.setattr("lorameter.machine.provenance.probe_machine", lambda environment=None: machine)
    for name in ("commanded_trials", "harness", "tokens"):
        monkeypatch.setattr(Executor, name, getattr(Executor, name))
    (tmp_path / "small.toml").write_text(STUDY)
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def complete_runs():
    """Folders of complete runs, by their options; each is measured once and copied for every test."""
    return {}


@pytest.fixture
def interrupted_run(runs, complete_runs, tmp_path, tmp_path_factory, capsys):
    """A function that restores the state of a run after some of its records."""

    def make(records=4, *options):
        if options not in complete_runs:
            study, folder = str(tmp_path / "small.toml"), str(tmp_path_factory.mktemp("whole"))
            main(["run", study, "--phase", "train", *options, "--runs-dir", folder, "--json"])
            complete_runs[options] = Path(json.loads(capsys.readouterr().out)["path"])
        path = shutil.copytree(complete_runs[options], runs / complete_runs[options].name)
        lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
        (path / "trials.jsonl").write_text("".join(lines[:records]))
        change(path, status="running")
        Executor.commanded_trials = ()
        return path

    return make


def change(path, **fields):
    """Change values in the manifest of a run."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def resume(path, *options):
    return main(["run", "--resume", path.name, "--runs-dir", str(path.parent), *options])


def test_resuming_measures_only_the_missing_trials(interrupted_run, capsys):
    """Records are appended, complete groups are not measured again, and the run is complete and valid."""
    path = interrupted_run(6)  # the four trials of the first turns, and two isolated ones
    before = (path / "trials.jsonl").read_bytes()
    assert resume(path, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["trials"] == {"ok": 21}
    assert "6 of 21 trials are kept, 15 are left to be measured" in captured.err
    assert "15 trials, 3 replicates" in captured.err
    run = store.read_run(path.name, path.parent)
    assert run.manifest.status == "complete"
    assert (path / "trials.jsonl").read_bytes().startswith(before)
    assert tuple(record.trial for record in run.records) == run.manifest.order
    assert len({(record.name, record.variant) for record in run.records}) == 3, "a variant has one id before and after"
    assert {record.trial for record in run.records[:6]}.isdisjoint(Executor.commanded_trials)
    (resumption,) = run.manifest.resumed
    assert resumption.unix_s > run.manifest.created_unix_s
    assert (resumption.harness, resumption.max_minutes) == ("0.1 sha256:one", None)
    assert run.measured_again == 0


def test_an_interrupted_group_is_measured_again_as_a_whole(interrupted_run, capsys):
    """Trials of a group are paired; records of the interrupted group stay in the file and are counted, but enter no
    estimate."""
    path = interrupted_run(2)
    assert resume(path) == 0
    run = store.read_run(path.name, path.parent)
    assert run.measured_again == 2
    assert len(run.records) == 21
    assert len((path / "trials.jsonl").read_text().splitlines()) == 23
    assert "2 trials measured again after an interruption" in " ".join(capsys.readouterr().out.split())


def test_selection_level_and_phases_are_those_of_the_run(interrupted_run):
    """The plan comes from the manifest, not from the defaults."""
    path = interrupted_run(3, "--variant", "b", "--interleave", "lockstep", "--replicates", "2")
    order = store.read_run(path.name, path.parent).manifest.order
    assert not any("-c" in trial.replace("-control", "") for trial in order)
    assert resume(path) == 0
    run = store.read_run(path.name, path.parent)
    assert tuple(record.trial for record in run.records) == run.manifest.order == order
    assert run.manifest.interleaving == "lockstep"


def test_the_trial_of_a_truncated_line_is_measured_again(interrupted_run):
    """The truncated line is replaced, so that the resumed run has no damaged line."""
    path = interrupted_run(7)
    with (path / "trials.jsonl").open("a") as file:
        file.write('{"schema": 3, "trial": "r1-')
    assert resume(path) == 0
    run = store.read_run(path.name, path.parent)
    assert (len(run.records), run.damaged_lines) == (21, 0)


def test_a_run_that_is_complete_is_shown(interrupted_run, capsys):
    """A complete run is not measured; a message says so, and the exit code is that of its report."""
    path = interrupted_run()
    resume(path)
    written = (path / "trials.jsonl").read_bytes()
    Executor.commanded_trials = ()
    capsys.readouterr()
    assert resume(path) == 0
    assert "is complete: nothing is left to be measured" in capsys.readouterr().err
    assert not Executor.commanded_trials
    assert (path / "trials.jsonl").read_bytes() == written


def test_a_resumed_run_may_have_a_new_limit(interrupted_run):
    """A new limit applies from the resumption on; the manifest stores it, and the study's own limit is unchanged."""
    path = interrupted_run(7)
    assert resume(path, "--max-minutes", "30") == 0
    manifest = store.read_manifest(path)
    assert manifest.resumed[0].max_minutes == 30.0
    assert manifest.study["protocol"]["max_minutes"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--effort", "quick"], "--effort cannot be given"),
        (["--allow-disturbed"], "--allow-disturbed cannot be given"),
        (["--model", "m", "--variant", "a", "--phase", "train"], "--model, --variant, --phase cannot be given"),
        (["--interleave", "lockstep", "--dry-run"], "--interleave, --dry-run cannot be given"),
        (["lora-or-qlora"], "is of study 'small', not 'lora-or-qlora'"),
    ],
)
def test_options_that_would_change_the_plan_are_refused(interrupted_run, capsys, options, message):
    """The error names the option, and nothing is measured."""
    assert resume(interrupted_run(), *options) == 2
    assert message in capsys.readouterr().err
    assert not Executor.commanded_trials


def test_another_machine_or_other_libraries_are_refused(interrupted_run, capsys):
    """The error gives both values of each difference."""
    path = interrupted_run()
    provenance = store.read_manifest(path).provenance
    libraries = provenance["libraries"] | {"torch": "1.13"}
    change(path, provenance=provenance | {"libraries": libraries}, fingerprint="another")
    assert resume(path) == 2
    assert "libraries.torch: '1.13' then, " in capsys.readouterr().err
    assert not Executor.commanded_trials


def test_other_tokens_are_refused(interrupted_run, capsys):
    """If the data of this name has changed, nothing is measured and the run stays unchanged."""
    path = interrupted_run()
    Executor.tokens = "b" * 64
    assert resume(path) == 2
    assert "the tokens have the hash bbbbbbbbbbbb now and had aaaaaaaaaaaa" in capsys.readouterr().err
    assert not Executor.commanded_trials
    assert store.read_manifest(path).resumed == ()


def test_another_harness_is_reported(interrupted_run, capsys):
    """Another version of the harness is accepted, since it may fix what interrupted the run, and a notice reports
    it."""
    path = interrupted_run()
    Executor.harness = "0.2 sha256:two"
    assert resume(path) == 0
    assert "harness-version-changed" in {notice.code for notice in store.read_manifest(path).notices}
    assert "0.2 sha256:two; before it was 0.1 sha256:one" in " ".join(capsys.readouterr().out.split())


def test_a_plan_with_other_trials_is_refused(interrupted_run, capsys):
    """A plan with trials that the run does not have is refused."""
    path = interrupted_run()
    change(path, order=["r0-x"])
    assert resume(path) == 2
    assert "plans other trials" in capsys.readouterr().err


def test_a_run_that_is_being_measured_is_refused(interrupted_run, capsys):
    """Two measuring processes would disturb each other."""
    path = interrupted_run()
    with store.lock_run(path):
        assert resume(path) == 2
    assert "another process is measuring it" in capsys.readouterr().err
    assert not Executor.commanded_trials


def test_a_complete_run_that_stopped_early_is_not_made_longer(interrupted_run):
    """Replicates after the early stop are not measured, and the run keeps the reason for the stop."""
    path = interrupted_run(14)
    manifest = store.read_manifest(path)
    change(path, status="complete", order=manifest.order[:14], stopped="precise enough")
    lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(lines[:-1]))
    assert resume(path) == 0
    run = store.read_run(path.name, path.parent)
    assert (run.state, run.manifest.stopped, len(run.records)) == ("complete", "precise enough", 14)
    assert set(Executor.commanded_trials) == {manifest.order[13]}


def test_a_complete_run_with_disturbed_trials_is_resumed(interrupted_run):
    """Disturbed trials are measured again, whatever the number of their earlier attempts."""
    path = interrupted_run(21)
    lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    failure = {"phase": "train", "kind": "Disturbed", "message": "the GPU throttled", "traceback": ""}
    lines[-1] |= {"status": "invalid", "failure": failure, "attempt": 2}
    (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(path, status="complete")
    assert resume(path) == 0
    run = store.read_run(path.name, path.parent)
    assert set(Executor.commanded_trials) == {lines[-1]["trial"]}
    assert (run.state, run.records[-1].status, run.records[-1].attempt) == ("complete", "ok", 3)
