"""What the system refuses wherever it may: each write on a disk that becomes full, little memory, a disk that is made
read-only under way, temporary files without room, other documents than a run's. Nothing that was measured is lost, the
message names what was refused, the exit code is 4, and with room the run is resumed."""

from __future__ import annotations

import compileall
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kernels_check
import lorameter
from lorameter.errors import InvalidRunError
from lorameter.records import store
from lorameter.records.os_errors import REFUSED
from lorameter.run.workers import Executor
from lorameter.run.workers.local import LocalExecutor


def limited(most):
    """To be run in the process between fork and exec: no file may become larger than so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def check_kept(run, code, err):
    """A run that was refused something: whole lines, no defect, no verdict."""
    assert code == 4, err
    assert "Traceback" not in err
    assert "defect" not in err
    assert run is None or run.damaged_lines == 0


@pytest.fixture
def begun(runs):
    """A function that reads the run if there is one: a fault at its first write leaves none."""

    def read():
        found = store.list_runs(runs)
        return store.read_run(found[0].name, runs) if found else None

    return read


def whole_replicates(run):
    """Records of replicates that came to their end; what took turns with a trial that did not is measured again."""
    lacking = set(run.manifest.order) - {record.trial for record in run.records if record.settled}
    broken = {trial.partition("-")[0] for trial in lacking}
    return [record for record in run.records if f"r{record.replicate}" not in broken]


SPACES = [0, 4, 8, 12, 16, 20, 24]
QUICK_SPACES = [4, 24]
VERDICTS = (1, 3)
"""Codes of an A/B that was measured; of so few replicates none is decided."""


def half(long, quick):
    """All values, those that are not quick marked for the long half."""
    return [pytest.param(one, marks=() if one in quick else pytest.mark.faults) for one in long]


@pytest.mark.parametrize("free_kib", half(SPACES, QUICK_SPACES))
def test_a_disk_that_becomes_full_at_each_write(free_kib, command, runs, tiny_disk, begun, resumed):
    """Wherever it does: what fitted is whole, and with room the rest is measured."""
    ballast = tiny_disk(runs, free_kib)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    run = begun()
    check_kept(run, done.returncode, done.stderr)
    assert "No space left on device. Free space there" in done.stderr
    ballast.unlink()
    if run is not None:
        kept = whole_replicates(run)
        whole = resumed()
        assert whole.state == "complete"
        assert [record for record in whole.records if record in kept] == kept


def test_a_disk_that_is_made_read_only_under_way(command, runs, tiny_disk, stopped, only_run, resumed):
    """By another user, or by a kernel that has seen it fail."""
    tiny_disk(runs, 200).unlink()
    with stopped(command(stop="r1-a:turn")) as process:
        subprocess.run(["mount", "--bind", str(runs), str(runs)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(runs)], check=True)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate()
    check_kept(only_run(), process.returncode, err)
    assert "Read-only file system. Choose a folder that can be written, then resume: lorameter run --resume" in err
    assert {record.replicate for record in only_run().records if record.settled} == {0}
    subprocess.run(["umount", str(runs)], check=True)
    assert resumed().state == "complete"


@pytest.mark.parametrize("place", half(["r1-a:prepare", "r1-a:turn", "r1-b:cold"], ["r1-a:turn"]))
def test_no_more_memory_in_the_parent(place, tmp_path, command, only_run, resumed):
    """From there on it can have none, and what it has is taken up: it says so, and keeps what it had saved."""
    words = ["run", str(tmp_path / "small.toml"), "--phase", "train", "--phase", "cold", "--interleave", "lockstep"]
    done = subprocess.run(command(*words, stop=f"{place}:memory"), capture_output=True, text=True, check=False)
    check_kept(only_run(), done.returncode, done.stderr)
    assert "memory" in done.stderr
    assert {record.replicate for record in only_run().records if record.settled} >= {0}
    assert resumed().state == "complete"


# --- in a measuring process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command_word", half(["build", "turn", "save_adapter"], ["save_adapter"]))
def test_what_is_refused_to_a_trial_is_no_trials_fault(command_word, tmp_path, command, only_run, resumed):
    """The next trial would meet it as well: the run ends there, with the trial and the remedy named, nothing is called
    crashed, and with room it is whole."""
    words = ["run", str(tmp_path / "small.toml"), "--phase", "train", "--phase", "cold", "--interleave", "lockstep"]
    trial = "r1-a"
    done = subprocess.run(
        command(*words, stop=f"{trial}:{command_word}:full"), capture_output=True, text=True, check=False
    )
    run = only_run()
    check_kept(run, done.returncode, done.stderr)
    said = f"{trial} in {command_word}: No space left on device. Free space there, then resume: lorameter run --res"
    assert said in done.stderr
    record = next(one for one in run.records if one.trial == trial)
    assert (record.status, record.failure.kind) == ("interrupted", REFUSED)
    assert "Traceback" in record.failure.traceback
    assert {record.status for record in run.records} <= {"ok", "interrupted", "not_run"}
    assert {record.status for record in resumed().records} == {"ok"}


def test_tokens_that_do_not_fit_are_no_bad_input(tmp_path, small_study, tiny_disk):
    """The tokenising process is real and its disk full: a machine that cannot measure (4), with what was refused."""
    local = LocalExecutor()
    Executor.start(local, tmp_path, 1)
    try:
        tiny_disk(local.scratch, 0)
        with pytest.raises(
            InvalidRunError, match=r"prepared: \S+/tokens-\w+\.safetensors: No space left on device\. Free"
        ):
            local.prepare_tokens(small_study.workload, keep=False)
    finally:
        local.close()


# --- other documents --------------------------------------------------------------------------------------------------


def test_a_baseline_that_cannot_be_written_leaves_the_one_before(command, runs, only_run, tmp_path):
    """`accept` under a limit that its document does not fit into: the accepted run is the one that it was."""
    assert subprocess.run(command(), capture_output=True, check=False).returncode == 0
    words = [sys.executable, "-m", "lorameter.cli", "accept", only_run().manifest.run, "--runs-dir", str(runs)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    before = (runs / "baselines.json").read_bytes()
    done = subprocess.run(words, preexec_fn=limited(10), capture_output=True, text=True, check=False)
    assert (done.returncode, "File too large. Raise" in done.stderr) == (4, True), done.stderr
    assert "Traceback" not in done.stderr
    assert (runs / "baselines.json").read_bytes() == before
    assert not list(runs.glob("*.tmp"))


@pytest.mark.parametrize("most", half([5_000, 12_000, 20_000, 30_000], [30_000]))
def test_an_ab_keeps_what_fitted(most, command, tmp_path, begun, resumed, temporary):
    """As a run: exit 4 and whole lines, both of its sides are taken down, and it is resumed."""
    for package in (lorameter, kernels_check):  # an A/B compiles them, and bytecode would be cut short by the limit
        compileall.compile_dir(Path(package.__file__).parent, quiet=2)
    sides = ("--base", sys.executable, "--candidate", sys.executable, "--phase", "train", "--replicates", "12")
    words = command("ab", str(tmp_path / "small.toml"), *sides, "--variant", "a")
    done = subprocess.run(words, preexec_fn=limited(most), capture_output=True, text=True, check=False)
    check_kept(begun(), done.returncode, done.stderr)
    assert not list(temporary.iterdir())
    if begun() is not None:
        assert "resume: lorameter run --resume" in done.stderr
        assert resumed(*VERDICTS).state == "complete"


def test_what_pytest_cannot_save_is_in_the_run(session, only_run, tmp_path):
    """pytest-benchmark's own file does not fit: the session does not pass, and the run that it measured is whole."""
    (tmp_path / "full.json").symlink_to("/dev/full")
    done = subprocess.run(
        session(f"--benchmark-json={tmp_path / 'full.json'}"), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode not in (0, 5), done.stdout
    assert only_run().state == "complete"
