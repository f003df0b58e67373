"""A real disk for temporary files that becomes full under real training processes, and one that a profile does not fit
on. Marked: each starts what it breaks. What a trial is refused that only pretends is in `test_refusals.py`."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from harness.records.refusals import REFUSED

STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
prompt_tokens = 8
new_tokens = 4
[protocol]
replicates = 1
warmup_steps_min = 1
warmup_steps_max = 2
turns = 2
generate_requests = 1
allow_disturbed = true
[[variant]]
name = "a"
r = 4
[[variant]]
name = "b"
r = 8
"""


@pytest.fixture
def study(tmp_path):
    """As little work as still is a trial; the adapter of `a` takes 306 KiB, that of `b` 598."""
    (tmp_path / "real.toml").write_text(STUDY)
    return tmp_path / "real.toml"


@pytest.fixture
def ended(runs):
    """A function that runs a real command line to its end; nothing of it is left."""

    def run(*words):
        command = [sys.executable, "-m", "harness.cli", *map(str, words), "--runs-dir", str(runs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not psutil.Process().children(recursive=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def left_in(folder):
    """What lies there beside the folder for compiled code, which torch makes when it is imported and keeps."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")}


@pytest.mark.faults
@pytest.mark.parametrize(("free_kib", "broken"), [(200, "r0-a"), (400, "r0-b")])
def test_a_full_disk_of_temporary_files_under_a_training_process(
    free_kib, broken, study, ended, tiny_disk, temporary, only_run
):
    """Whether the first adapter finds no room or a later one: exit 4 with what and where, what was measured before is
    kept, nothing is called crashed, and with room the rest is measured."""
    ballast = tiny_disk(temporary, free_kib, of_kib=1024)
    words = ("run", study, "--phase", "train", "--phase", "cold", "--interleave", "replicates")
    done = ended(*words)
    assert done.returncode == 4, done.stderr
    assert "No space left on device. Free space there" in " ".join(done.stderr.split())
    assert left_in(temporary) == {"ballast"}
    ballast.unlink()
    run = only_run()
    assert (run.state, run.damaged_lines) == ("failed", 0)
    record = next(one for one in run.records if one.trial == broken)
    assert (record.status, record.failure.kind, record.failure.phase) == ("interrupted", REFUSED, "save_adapter")
    assert {one.status for one in run.records} <= {"ok", "interrupted", "not_run"}
    kept = [one for one in run.records if one.status == "ok"]
    assert ended("run", "--resume", run.manifest.run).returncode in (0, 3)
    whole = only_run()
    assert {one.status for one in whole.records} == {"ok"}
    assert [one for one in whole.records if one in kept] == kept


@pytest.mark.faults
@pytest.mark.parametrize(("where", "free_kib"), [("runs", 0), ("runs", 16), ("temporary", 16), ("temporary", 300)])
def test_a_profile_that_does_not_fit(where, free_kib, study, ended, tiny_disk, temporary, runs):
    """Wherever it has no room, in its own folder or for temporary files: exit 4 with the remedy, of the profile nothing
    but its logs is left, and with room there is one."""
    ballast = tiny_disk(runs if where == "runs" else temporary, free_kib, of_kib=64 * 1024)
    done = ended("profile", f"{study}:a")
    assert done.returncode == 4, done.stderr
    assert "No space left on device. Free space there" in " ".join(done.stderr.split())
    assert left_in(temporary) <= {"ballast"}
    assert {path.suffix for path in runs.glob("*-profile-*/**/*") if path.is_file()} <= {".log"}
    ballast.unlink()
    assert ended("profile", f"{study}:a").returncode == 0
    (found,) = runs.glob("*-profile-*/profile.json")
    assert (found.parent / "trace.json.gz").is_file()
