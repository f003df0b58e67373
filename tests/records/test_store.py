"""Tests of the store: it appends, syncs and reads back, and it reports damage.

Tests of journals, which only grow: reading of their lines, and the refusal of other files.

Tests of a run on a read-only disk, such as an archive or the artifact of a job.

Tests of packed runs that were damaged or made by another program: they are refused with an error.

Tests that evidence is stored once, before the record that refers to it, and that no record is read without its
checks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import msgspec
import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.machine.provenance import git_state
from lorameter.records import fileio, store
from lorameter.records.record import DISTURBED, Failure, TrialRecord
from lorameter.records.store import TRIALS, Manifest, Resumption, RunWriter, unpacked, write_packed
from lorameter.records.trials import CHECKS
from tests.constructed import RUNS


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
    with store.lock_run(path):
        assert store.read_run(path.name, tmp_path).live
        with pytest.raises(UsageError, match=f"{path.name}: another process is measuring it"), store.lock_run(path):
            pass
    assert not store.read_run(path.name, tmp_path).live
    with store.lock_run(path):
        RunWriter(tmp_path, manifest()).finish("complete")
        assert not store.read_run(path.name, tmp_path).live


def test_the_last_end_of_a_trial_counts_and_disturbed_attempts_are_kept(tmp_path):
    """A completed second attempt replaces a disturbed first one, which is kept separately; an interrupted attempt does
    not replace it."""
    disturbed = record().replaced(
        status="invalid",
        failure=Failure(phase="train", kind=DISTURBED, message="the GPU throttled"),
        started_unix_s=1.0,
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


@pytest.fixture
def runs(tmp_path):
    """A folder with one run."""
    shutil.copytree(RUNS / "sound", tmp_path / "it")
    return tmp_path


def test_a_journal_that_is_not_a_plain_file_is_refused_by_its_name(runs, capsys):
    """Commands that read the run refuse it; a list shows it as damaged and still has the other runs."""
    (runs / "it" / store.TRIALS).unlink()
    (runs / "it" / store.TRIALS).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"trials\.jsonl: cannot be read: .*Restore it, or remove it"):
        store.read_run("it", runs)
    assert main(["list", "runs", "--json", "--runs-dir", str(runs)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["status"] == "damaged"
    assert "trials.jsonl: cannot be read" in row["title"]


def test_lines_are_read_as_they_were_appended(tmp_path):
    """Lines keep their line ends, blank lines are skipped, and bytes that are not UTF-8 are escaped."""
    fileio.append(tmp_path / "x", "one\n")
    fileio.append(tmp_path / "x", "two")
    with (tmp_path / "x").open("ab") as file:
        file.write(b"\n\n \r\nthr\xffee\n")
    assert list(fileio.journal_lines(tmp_path / "x")) == ["one\n", "two\n", "thr\\xffee\n"]
    assert list(fileio.journal_lines(tmp_path / "none")) == []
    assert list(fileio.journal_lines(tmp_path / ("x" * 300))) == []


@pytest.fixture
def disk(tmp_path):
    """A small disk and a function that remounts it read-only; the test is skipped where no disk can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_read_only_disk_is_read(disk, write_run, capsys, monkeypatch):
    """A run is read by path and from its own folder, also when its process was killed and the reader tries the lock."""
    folder, make_read_only = disk
    path = folder / "mine"
    shutil.copytree(write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5}, status="running"), path)
    (path / "trials.jsonl.lock").touch()
    make_read_only()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    assert main(["report", str(path)]) == 4
    assert "nf4" in capsys.readouterr().out
    assert main(["list", "runs", "--runs-dir", str(folder)]) == 0
    assert "killed" in capsys.readouterr().out


RUN = RUNS / "sound"


def test_damaged_bytes_are_refused(tmp_path):
    """The damage may be in the archive's names, its sizes or the compressed data."""
    path = tmp_path / "run.lorameter.zip"
    write_packed(path, RUN)
    archive, rng, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(20):
        damaged = bytearray(archive)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            with unpacked(path) as folder:
                assert (folder / "manifest.json").is_file()
        except UsageError:
            refused += 1
    assert refused > 14


@pytest.mark.parametrize(
    ("member", "text", "message"),
    [
        ("manifest.json", '{"schema": null}', "manifest.json: schema None"),
        ("trials.jsonl", "{}\n", "trials.jsonl: schema None"),
    ],
    ids=["manifest", "record"],
)
def test_a_fault_inside_is_reported_with_the_file(tmp_path, member, text, message):
    """The message names the file and not the folder of its unpacked content; a run's directory gives the same error."""
    folder = shutil.copytree(RUN, tmp_path / "plain")
    (folder / member).write_text(text)
    write_packed(tmp_path / "run.lorameter.zip", folder)
    with pytest.raises(UsageError) as refused:
        store.read_run(str(tmp_path / "run.lorameter.zip"), tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/run.lorameter.zip: {message}")
    with pytest.raises(UsageError, match=message):
        store.read_run("plain", tmp_path)


BITS = {"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "60 of 60 layers: 4 – all"}
MASK = {"path": "attention.mask", "required": None, "observed": "explicit", "status": "active", "reason": "seen"}
SHARE = {"path": "padding.share", "required": None, "observed": 0.25, "status": "active", "reason": "a quarter"}


def manifest_evidence(**changes):
    fields = {
        "run": "run", "study": {}, "phases": ("train",), "interleaving": "replicates", "order": ("t0", "t1", "t2"),
        "seed": 0, "created_unix_s": 1.0, "provenance": {}, "fingerprint": "f",
    }  # fmt: skip
    return Manifest(**(fields | changes))


def record_evidence(number, *checks, **changes):
    fields = {
        "trial": f"t{number}", "status": "ok", "name": "a", "variant": "i", "role": "variant", "replicate": number,
        "position": number, "interleaving": "replicates", "seed": 0, "started_unix_s": 0.0, "wall_time_s": 1.0,
        "checks": checks,
    }  # fmt: skip
    return TrialRecord(**(fields | changes))


RECORDS = (record_evidence(0, BITS, MASK), record_evidence(1, BITS, MASK), record_evidence(2, SHARE, BITS))


@pytest.fixture
def written(tmp_path):
    """A run of three records whose checks are nearly the same."""
    writer = RunWriter(tmp_path, manifest_evidence())
    for one in RECORDS:
        writer.append(one)
    writer.finish("complete")
    return writer.path


def read(path):
    return store.read_run(str(path), path.parent)


def test_evidence_is_stored_once_and_records_refer_to_it(written):
    """Three stored checks serve six references; a reader gets the full checks."""
    evidence = [json.loads(line) for line in (written / CHECKS).read_text().splitlines()]
    assert [line["check"] for line in evidence] == [BITS, MASK, SHARE]
    first, second, third = (line["hash"] for line in evidence)
    named = [json.loads(line)["checks"] for line in (written / TRIALS).read_text().splitlines()]
    assert named == [[first, second], [first, second], [third, first]]
    assert read(written).records == RECORDS


def test_a_crash_at_any_byte_leaves_records_with_their_checks(written, tmp_path, monkeypatch):
    """For any written prefix, a record is complete or missing."""
    evidence = (written / CHECKS).read_bytes().splitlines(keepends=True)
    records = (written / TRIALS).read_bytes().splitlines(keepends=True)
    steps = [(CHECKS, evidence[0] + evidence[1]), (TRIALS, records[0]), (TRIALS, records[1])]
    steps += [(CHECKS, evidence[2]), (TRIALS, records[2])]
    monkeypatch.setattr(os, "fsync", lambda number: None)  # the crash is simulated, and a disk is slow
    for whole, (name, text) in enumerate(steps):
        for cut in range(0, len(text), 53):
            path = tmp_path / f"cut-{whole}-{cut}"
            path.mkdir()
            shutil.copy(written / "manifest.json", path)
            for file, part in [*steps[:whole], (name, text[:cut])]:
                with (path / file).open("ab") as target:
                    target.write(part)
            found = read(path)
            done = sum(file == TRIALS for file, _ in steps[:whole])
            assert found.records == RECORDS[:done]
            assert found.damaged_lines == (name == TRIALS and cut > 0)
            writer = RunWriter(tmp_path, manifest_evidence(run=path.name, resumed=(Resumption(
                unix_s=2.0, harness=None, commit=None),)))  # fmt: skip
            for one in RECORDS[done:]:
                writer.append(one)
            assert read(path).records == RECORDS
            assert read(path).damaged_lines == 0


def test_a_record_whose_evidence_is_lost_is_a_damaged_line(written):
    """It is counted and left out; the other records are read."""
    lines = (written / CHECKS).read_text().splitlines(keepends=True)
    (written / CHECKS).write_text(lines[0] + lines[1])
    run = read(written)
    assert run.records == RECORDS[:2]
    assert run.damaged_lines == 1
    (written / CHECKS).unlink()
    assert (read(written).records, read(written).damaged_lines) == ((), 3)


def test_a_credential_in_a_reason_is_not_written(tmp_path):
    """A reason may quote the error of a library."""
    reason = "OSError: 401 for https://me:hunter2@host/x, password=hunter2"
    writer = RunWriter(tmp_path, manifest_evidence())
    for number in range(2):
        writer.append(record_evidence(number, BITS | {"reason": reason}))
    assert "hunter2" not in "".join(path.read_text() for path in writer.path.glob("*.json*"))
    assert len((writer.path / CHECKS).read_text().splitlines()) == 1
    (found, _) = read(writer.path).records
    assert found.checks[0]["reason"] == "OSError: 401 for https://***@host/x, password=***"
