"""Tests of the store: it appends, syncs and reads back, and it reports damage."""

import subprocess

import msgspec
import pytest

from lorameter.errors import UsageError
from lorameter.machine.repository import git_state
from lorameter.records import store
from lorameter.records.record import DISTURBED, Failure, TrialRecord
from lorameter.records.store import Manifest, RunWriter


def manifest(run="20260101-000000-s-0000"):
    return Manifest(
        run=run, study={}, phases=("train",), interleaving="replicates", order=("r0-a",), seed=0, created_unix_s=1.0,
        provenance={}, fingerprint="f",
    )  # fmt: skip


def record(trial="r0-a"):
    return TrialRecord(
        trial=trial, status="ok", name="a", variant="i", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples={"step_time_s": (0.1, 0.2)},
    )  # fmt: skip


def test_a_run_is_read_back_as_written(tmp_path):
    """Records and manifest are read back by id and by directory."""
    writer = RunWriter(tmp_path, manifest())
    writer.append(record("r0-a"))
    writer.append(record("r1-a"))
    writer.finish("complete")
    for name in ("20260101-000000-s-0000", str(writer.path)):
        run = store.read_run(name, tmp_path)
        assert run.records == (record("r0-a"), record("r1-a"))
        assert run.manifest.status == "complete"
        assert run.damaged_lines == 0


def test_run_folders_do_not_change_their_repository(tmp_path, monkeypatch):
    """The default folder ignores itself in git; a .gitignore of the user is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(store.ENV_RUNS, raising=False)
    git = ("git", "-c", "user.name=T", "-c", "user.email=t@example.org")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    RunWriter(store.runs_dir(None, make=True), manifest())
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / ".lorameter" / ".gitignore").write_text("mine\n")
    store.runs_dir(None, make=True)
    assert (tmp_path / ".lorameter" / ".gitignore").read_text() == "mine\n"
    assert not (tmp_path / ".gitignore").exists()


def test_the_last_record_of_a_trial_counts(tmp_path):
    """A trial that was reported, interrupted and measured again has one record, in the order of the plan."""
    writer = RunWriter(tmp_path, manifest())
    under_way = record("r0-b").replaced(position=1, started_unix_s=5.0, status="interrupted")
    writer.append(under_way)
    writer.append(under_way.replaced(status="ok"))
    writer.append(record("r0-c").replaced(position=2, started_unix_s=6.0, status="interrupted"))
    writer.append(record("r0-a").replaced(started_unix_s=4.0))
    writer.append(record("r0-c").replaced(position=2, started_unix_s=9.0))
    run = store.read_run(str(writer.path), tmp_path)
    assert [(one.trial, one.status, one.started_unix_s) for one in run.records] == [
        ("r0-a", "ok", 4.0), ("r0-b", "ok", 5.0), ("r0-c", "ok", 9.0),
    ]  # fmt: skip
    assert run.measured_again == 1  # r0-c; the trial without an interruption was measured once


def test_writing_continues_after_a_truncated_line(tmp_path):
    """The record after a truncated line is whole; the damage is reported until all planned trials are measured."""
    begun = msgspec.structs.replace(manifest(), order=("r0-a", "r0-b"))
    writer = RunWriter(tmp_path, begun)
    writer.append(record())
    with (writer.path / "trials.jsonl").open("a") as file:
        file.write('{"schema": 3, "tri')
    again = store.Resumption(unix_s=2.0, harness="0.1", commit=None)
    writer = RunWriter(tmp_path, msgspec.structs.replace(begun, resumed=(again,)))
    assert store.read_run(str(writer.path), tmp_path).damaged_lines == 1
    writer.append(record("r0-b"))
    run = store.read_run(str(writer.path), tmp_path)
    assert [one.trial for one in run.records] == ["r0-a", "r0-b"]
    assert run.damaged_lines == 0
    assert run.manifest.resumed == (again,)


def test_one_process_writes_a_run(tmp_path):
    """A second writer is refused, and a reader can distinguish a run that is being measured from one whose process was
    killed."""
    path = RunWriter(tmp_path, manifest()).path
    assert not store.read_run(path.name, tmp_path).live
    with store.writing(path):
        assert store.read_run(path.name, tmp_path).live
        with pytest.raises(UsageError, match=f"{path.name}: another process is measuring it"), store.writing(path):
            pass
    assert not store.read_run(path.name, tmp_path).live
    with store.writing(path):
        RunWriter(tmp_path, manifest()).finish("complete")
        assert not store.read_run(path.name, tmp_path).live


def test_the_last_end_of_a_trial_counts_and_disturbed_attempts_are_kept(tmp_path):
    """A completed second attempt replaces a disturbed first one, which is kept separately; an interrupted attempt does
    not replace it."""
    disturbed = record().replaced(
        status="invalid", failure=Failure(phase="train", kind=DISTURBED, message="it was hot"), started_unix_s=1.0
    )
    again = record().replaced(attempt=1, started_unix_s=2.0)
    broken = again.replaced(status="interrupted")
    for written, counts, kept in (
        ([disturbed, again], again, (disturbed,)),
        ([disturbed, broken], disturbed, ()),
        ([disturbed, broken, again], again, (disturbed,)),
    ):
        writer = RunWriter(tmp_path, manifest(run=f"run-{len(written)}-{counts.attempt}"))
        for one in written:
            writer.append(one)
        run = store.read_run(str(writer.path), tmp_path)
        assert run.records == (counts,)
        assert run.disturbed == kept
        assert run.measured_again == 0
