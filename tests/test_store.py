"""The store appends, syncs and reads back; damage is seen, never guessed around."""

import pytest

from harness import store
from harness.errors import UsageError
from harness.record import TrialRecord
from harness.store import Manifest, RunWriter


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
    """Records and manifest survive, by id and by directory."""
    writer = RunWriter(tmp_path, manifest())
    writer.append(record("r0-a"))
    writer.append(record("r1-a"))
    writer.finish("complete")
    for name in ("20260101-000000-s-0000", str(writer.path)):
        run = store.read_run(name, tmp_path)
        assert run.records == (record("r0-a"), record("r1-a"))
        assert run.manifest.status == "complete"
        assert run.damaged_lines == 0


def test_a_record_cut_short_is_counted(tmp_path):
    """After a crash in the middle of a line the others are there and the damage is known."""
    writer = RunWriter(tmp_path, manifest())
    writer.append(record())
    with (writer.path / "trials.jsonl").open("a") as file:
        file.write('{"schema": 1, "tri')
    run = store.read_run(str(writer.path), tmp_path)
    assert len(run.records) == 1
    assert run.damaged_lines == 1
    assert run.manifest.status == "running"


def test_another_schema_is_refused(tmp_path):
    """A record of another version is not read as if it were ours."""
    writer = RunWriter(tmp_path, manifest())
    text = (writer.path / "manifest.json").read_text().replace('"schema": 2', '"schema": 99')
    (writer.path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="schema 99"):
        store.read_run(str(writer.path), tmp_path)


def test_a_damaged_manifest_is_a_clear_error(tmp_path):
    """And does not take a listing of the other runs with it."""
    writer = RunWriter(tmp_path, manifest())
    (writer.path / "manifest.json").write_text('{"schema": 1, "ru')
    with pytest.raises(UsageError, match="cannot be read"):
        store.read_run(str(writer.path), tmp_path)


def test_an_unknown_run_names_the_latest(tmp_path):
    """A wrong id gets the ids that exist."""
    RunWriter(tmp_path, manifest())
    with pytest.raises(UsageError, match="20260101-000000-s-0000"):
        store.read_run("nope", tmp_path)


def test_where_runs_live(tmp_path, monkeypatch):
    """The option wins over the environment, which wins over the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    assert store.runs_dir(None).resolve() == (tmp_path / ".lorameter" / "runs").resolve()
    monkeypatch.setenv(store.ENV_RUNS, str(tmp_path / "env"))
    assert store.runs_dir(None) == tmp_path / "env"
    assert store.runs_dir(str(tmp_path / "given")) == tmp_path / "given"
