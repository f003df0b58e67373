"""Tests of errors of the system: a disk that becomes full at each write, too little memory, a disk that becomes
read-only, temporary files without space, and documents other than runs. Results are kept, the message names the
error, the exit code is 4, and the run can be resumed."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.records.os_errors import REFUSED
from tests.constructed import RUNS


def resource_limits(**limits):
    """Return a function that sets resource limits between fork and exec: `resource_limits(FSIZE=4096)`."""

    def limit():
        for name, maximum in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (maximum, maximum))

    return limit


def check_saved(run, code, err):
    """Assert that a run that ended by an error of the system has complete lines, and that the error is not reported as
    an internal one or as a verdict."""
    assert code == 4, err
    assert "Traceback" not in err
    assert "defect" not in err
    assert run is None or run.damaged_lines == 0


@pytest.fixture
def read_started_run(runs):
    """A function that reads the run if it exists; a fault at the first write leaves none."""

    def read():
        found = store.list_runs(runs)
        return store.read_run(found[0].name, runs) if found else None

    return read


def complete_replicates(run):
    """Return the records of the complete replicates; a replicate with a missing trial is measured again."""
    missing = set(run.manifest.order) - {record.trial for record in run.records if record.settled}
    incomplete = {trial.partition("-")[0] for trial in missing}
    return [record for record in run.records if f"r{record.replicate}" not in incomplete]


@pytest.mark.parametrize("free_kib", [4, 24])
def test_a_disk_that_becomes_full_loses_no_record(free_kib, command, runs, tiny_disk, read_started_run, resume):
    """Records that were written before are complete, and with free space the rest is measured."""
    ballast = tiny_disk(runs, free_kib)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    run = read_started_run()
    check_saved(run, done.returncode, done.stderr)
    assert "No space left on device. Free space there" in done.stderr
    ballast.unlink()
    if run is not None:
        before = complete_replicates(run)
        resumed = resume()
        assert resumed.state == "complete"
        assert [record for record in resumed.records if record in before] == before


def test_a_disk_that_becomes_read_only_ends_the_run(command, runs, tiny_disk, start_until_stop, read_run, resume):
    """The error names the remedy, the records before it are kept, and the run can be resumed."""
    tiny_disk(runs, 200).unlink()
    with start_until_stop(command(stop="r1-a:turn")) as process:
        subprocess.run(["mount", "--bind", str(runs), str(runs)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(runs)], check=True)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate()
    check_saved(read_run(), process.returncode, err)
    assert "Read-only file system. Choose a folder that can be written, then resume: lorameter run --resume" in err
    assert {record.replicate for record in read_run().records if record.settled} == {0}
    subprocess.run(["umount", str(runs)], check=True)
    assert resume().state == "complete"


def test_a_line_that_does_not_fit_is_removed_entirely(tmp_path):
    """The system writes a part and then fails; the file ends with the previous line."""
    code = (
        "import sys; from pathlib import Path; from lorameter.records import fileio\n"
        "path = Path(sys.argv[1])\nfileio.append(path, 'x' * 99 + '\\n')\n"
        "try: fileio.append(path, 'y' * 99 + '\\n')\nexcept OSError as error: print(error.errno)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "trials.jsonl")]
    done = subprocess.run(words, preexec_fn=resource_limits(FSIZE=150), capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert (tmp_path / "trials.jsonl").read_text() == "x" * 99 + "\n"


def test_a_disk_that_cannot_be_written_from_the_start_is_a_refusal(command, runs, tiny_disk):
    """The error offers no way to resume, since nothing was measured."""
    tiny_disk(runs, 200)
    subprocess.run(["mount", "-o", "remount,ro", str(runs)], check=True)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "could not be started" in done.stderr
    assert done.stderr.endswith("Read-only file system. Choose a folder that can be written.\n")


# --- in a measuring process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command_word", ["save_adapter", pytest.param("turn", marks=pytest.mark.faults)])
def test_a_full_disk_during_a_trial_ends_the_run(command_word, tmp_path, command, read_run, resume):
    """The next trial would fail as well: the run ends with the trial and the remedy named, no trial is crashed, and
    with free space the run can be completed."""
    words = ["run", str(tmp_path / "small.toml"), "--phase", "train", "--phase", "cold", "--interleave", "lockstep"]
    trial = "r1-a"
    done = subprocess.run(
        command(*words, stop=f"{trial}:{command_word}:full"), capture_output=True, text=True, check=False
    )
    run = read_run()
    check_saved(run, done.returncode, done.stderr)
    message = f"{trial} in {command_word}: No space left on device. Free space there, then resume: lorameter run --res"
    assert message in done.stderr
    record = next(one for one in run.records if one.trial == trial)
    assert (record.status, record.failure.kind) == ("interrupted", REFUSED)
    assert "Traceback" in record.failure.traceback
    assert {record.status for record in run.records} <= {"ok", "interrupted", "not_run"}
    assert {record.status for record in resume().records} == {"ok"}


# --- other documents --------------------------------------------------------------------------------------------------


def test_a_baseline_that_cannot_be_written_keeps_the_previous_one(runs):
    """If `accept` cannot write its document, the accepted run stays the previous one."""
    shutil.copytree(RUNS / "sound", runs / "sound")
    words = ["accept", "sound", "--runs-dir", str(runs)]
    assert main(words) == 0
    before = (runs / "baselines.json").read_bytes()
    command = [sys.executable, "-m", "lorameter.cli", *words]
    done = subprocess.run(command, preexec_fn=resource_limits(FSIZE=10), capture_output=True, text=True, check=False)
    assert (done.returncode, "File too large. Raise" in done.stderr) == (4, True), done.stderr
    assert "Traceback" not in done.stderr
    assert (runs / "baselines.json").read_bytes() == before
    assert not list(runs.glob("*.tmp"))


@pytest.mark.faults
def test_a_run_is_complete_if_pytest_cannot_save_its_file(session, read_run, tmp_path):
    """If pytest-benchmark's file does not fit, the session does not pass, and the measured run is complete."""
    (tmp_path / "full.json").symlink_to("/dev/full")
    done = subprocess.run(
        session(f"--benchmark-json={tmp_path / 'full.json'}"), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode not in (0, 5), done.stdout
    assert read_run().state == "complete"
