"""Tests of measuring processes that die: each death is recorded or reported with its reason, and all other results are
kept.

tests/run/workers/test_local.py has the trials whose own process or zygote dies.

Tests of every signal at every point of a measurement: each trial has a record, finished results are kept, nothing is
left over, the exit code is 4, and the run can be resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.processes import find_marked
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext, make_request
from lorameter.run.workers import Executor, WorkerLostError
from lorameter.run.workers.local import LocalExecutor


@pytest.fixture
def executor(tmp_path):
    """An executor that never starts its zygote."""
    local = LocalExecutor()
    Executor.start(local, tmp_path, 1)
    yield local
    local.close()


@pytest.fixture
def kill_at_start(executor, monkeypatch):
    """A function that kills the next process of a kind as soon as it has started."""

    def kill(kind, number):
        spawn, killed = LocalExecutor._spawn, []

        def spawn_and_kill(self, what, *arguments, **options):
            process = spawn(self, what, *arguments, **options)
            if what == kind:
                os.kill(process.pid, number)
                killed.append(process.pid)
            return process

        monkeypatch.setattr(LocalExecutor, "_spawn", spawn_and_kill)
        return killed

    return kill


@pytest.fixture
def request_cold(executor, small_study):
    """The request for a cold start of a trained trial."""
    plan = make_plan(small_study)
    slot = plan.slots[0]
    site = RunContext(device="cpu")
    return make_request(plan, slot, site, executor.make_place(slot.trial, slot.trial))


def test_a_killed_cold_start_is_recorded_as_crashed(executor, kill_at_start, request_cold):
    """The trial is crashed, with the name of the signal."""
    kill_at_start("cold", signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="SIGKILL") as lost:
        executor.start_interpreter(request_cold.log_path, 600.0, request_cold)
    assert (lost.value.status, lost.value.failure.kind) == ("crashed", "ColdStartFailed")


def test_a_stopped_cold_start_is_recorded_as_a_timeout(executor, kill_at_start, request_cold):
    """The trial is a timeout, and its process group is killed."""
    stopped = kill_at_start("cold", signal.SIGSTOP)
    with pytest.raises(WorkerLostError) as lost:
        executor.start_interpreter(request_cold.log_path, 1.0, request_cold)
    assert (lost.value.status, lost.value.failure.kind) == ("timeout", "Silent")
    assert not psutil.pid_exists(*stopped)


def test_a_token_process_that_is_killed_ends_the_run_before_it_begins(executor, kill_at_start, small_study):
    """The run is invalid, and the message names the log."""
    kill_at_start("tokens", signal.SIGKILL)
    with pytest.raises(InvalidRunError, match=r"tokens could not be prepared.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


def test_a_crash_while_reading_tokens_is_reported_as_bad_input(executor, kill_at_start, small_study):
    """A segmentation fault, as on a damaged file, is reported as bad input with the log."""
    kill_at_start("tokens", signal.SIGSEGV)
    with pytest.raises(UsageError, match=r"SIGSEGV.*may be damaged.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


def test_a_zygote_that_is_killed_while_it_imports_ends_the_run_before_it_begins(kill_at_start, tmp_path):
    """The run is invalid, and the message names the signal and the log."""
    kill_at_start("zygote", signal.SIGKILL)
    local = LocalExecutor()
    local.start(tmp_path, 1)
    try:
        with pytest.raises(InvalidRunError, match=r"did not start: .*SIGKILL.*zygote\.log"):
            local.hello()
    finally:
        local.close()


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ONE_SIGNAL = [
    signal.SIGTERM,
    *(pytest.param(number, marks=pytest.mark.faults) for number in STOP_SIGNALS if number != 15),
]
"""One signal at points where all signals act alike; the others are in the long half."""


PLACES = ["r0-a:prepare", "r1-a:turn", "r1-b:cold", "r2-b:save_adapter"]
PLACES_AND_SIGNALS = [
    pytest.param(
        place, number, marks=() if PLACES.index(place) % 3 == STOP_SIGNALS.index(number) else pytest.mark.faults
    )
    for place in PLACES
    for number in STOP_SIGNALS
]
"""Each point and each signal once; all combinations are in the long half."""


@pytest.mark.parametrize(("place", "number"), PLACES_AND_SIGNALS)
def test_a_run_that_is_stopped_can_be_resumed(
    number, place, tmp_path, command, start_until_stop, read_run, resume, temporary_folder
):
    """The signal comes before, during or after the turns, or in a cold start; each trial has a record, and no result is
    lost."""
    words = ["run", str(tmp_path / "small.toml"), "--phase", "train", "--phase", "cold", "--interleave", "lockstep"]
    with start_until_stop(command(*words, stop=place)) as process:
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 4
    assert "This run is not complete (interrupted)" in out
    assert "Traceback" not in err
    run = read_run()
    statuses = {record.trial: record.status for record in run.records}
    assert list(statuses) == list(run.manifest.order)
    assert statuses[place.partition(":")[0]] == "interrupted"
    assert {record.status for record in run.records} <= {"ok", "interrupted", "not_run"}
    earlier = [record for record in run.records if record.replicate < int(place[1])]
    assert {record.status for record in earlier} <= {"ok"}
    assert not list(temporary_folder.iterdir())
    whole = resume()
    assert {record.status for record in whole.records} == {"ok"}
    assert whole.records[: len(earlier)] == tuple(earlier)


@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_run_stopped_while_workers_start_leaves_nothing(number, command, start_until_stop, runs, temporary_folder):
    """A signal while the workers start leaves no run folder and no error message."""
    with start_until_stop(command(stop=":start")) as process:
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 4
    assert err.endswith("lorameter: stopped\n")
    assert not list(runs.iterdir())
    assert not list(temporary_folder.iterdir())


def test_an_ignored_sighup_does_not_end_the_run(command, start_until_stop, read_run):
    """With SIGHUP ignored, as under nohup, the run continues until another signal ends it."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with start_until_stop(command(stop="r1-a:turn"), preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        assert "r1-a" not in {record.trial for record in read_run().records}
        process.terminate()
        process.communicate()
    assert process.returncode == 4


def test_a_killed_run_is_resumed(command, start_until_stop, read_run, resume, temporary_folder, tmp_path):
    """Trials before SIGKILL are kept, the group under way is measured again, and the rest is measured. SIGKILL prevents
    the cleanup: the next run removes the folder, but none of a live process and no foreign one."""
    foreign = temporary_folder / "lorameter-foreign"
    foreign.mkdir()
    with start_until_stop(command(stop="r1-a:turn")) as process:
        (left,) = set(temporary_folder.iterdir()) - {foreign}
        elsewhere = ["--if-busy", "share", "--runs-dir", str(tmp_path / "elsewhere")]
        subprocess.run([*command(), *elsewhere], check=True, capture_output=True)
        assert left.is_dir(), "its process lives"
        process.kill()
        process.communicate()
    killed = read_run()
    assert (killed.state, {record.replicate for record in killed.records}) == ("killed", {0})
    assert left.is_dir()
    whole = resume()
    assert (whole.state, len(whole.records)) == ("complete", len(whole.manifest.order))
    assert whole.records[: len(killed.records)] == killed.records
    assert list(temporary_folder.iterdir()) == [foreign]


@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_pytest_session_that_is_stopped_keeps_its_run(
    number, tmp_path, session, start_until_stop, read_run, temporary_folder
):
    """The run is saved and marked as interrupted, and the session does not pass."""
    with start_until_stop(session(stop="r1-a:turn"), cwd=tmp_path) as process:
        process.send_signal(number)
        out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "This run is not complete (interrupted)" in out
    statuses = {record.trial: record.status for record in read_run().records}
    assert (statuses["r0-a"], statuses["r1-a"], statuses["r2-a"]) == ("ok", "interrupted", "not_run")
    assert not list(temporary_folder.iterdir())


# --- an A/B -----------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stopped_ab_removes_its_worktrees(number, ab, repository, git, start_until_stop, temporary_folder, read_run):
    """The two worktrees and all folders are removed, and the earlier results are saved."""
    with start_until_stop(ab(stop="r1-a-base:turn")) as process:
        assert len(git(repository, "worktree", "list")) == 3
        process.send_signal(number)
        process.send_signal(signal.SIGINT)  # a second signal changes nothing
        process.communicate()
    assert process.returncode == 4
    assert len(git(repository, "worktree", "list")) == 1
    assert not list(temporary_folder.iterdir())
    records = read_run().records
    assert {record.status for record in records if record.replicate == 0} == {"ok"}
    assert next(record.status for record in records if record.trial == "r1-a-base") == "interrupted"


def test_the_next_ab_removes_worktrees_of_a_killed_one(ab, repository, git, start_until_stop, temporary_folder):
    """The next A/B removes its worktrees but not a user's worktree or those of a running A/B; a stopped A/B removes its
    own."""
    git(repository, "worktree", "add", "--quiet", "--detach", str(temporary_folder.parent / "mine"))
    with start_until_stop(ab(stop="r1-a-base:turn")) as process:
        process.kill()
        process.communicate()
    assert len(git(repository, "worktree", "list")) == 4
    with start_until_stop(ab(stop="r1-a-base:turn")) as process:
        assert len(git(repository, "worktree", "list")) == 4
        done = subprocess.run([*ab(), "--if-busy", "share"], check=False, capture_output=True)
        assert done.returncode in (0, 3)
        assert len(git(repository, "worktree", "list")) == 4
        process.terminate()
        process.communicate()
    assert process.returncode == 4
    assert len(git(repository, "worktree", "list")) == 2
    assert not list(temporary_folder.iterdir())


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_run(number, tmp_path, command, temporary_folder, runs):
    """The signal comes as soon as the real processes exist, while the zygote imports and the tokens are made."""
    words = [sys.executable, "-m", "lorameter.cli", *command()[4:]]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while len(children := parent.children(recursive=True)) < 2:
            assert process.poll() is None
        process.send_signal(number)
    assert process.returncode == (-9 if number == signal.SIGKILL else 4)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert (number == signal.SIGKILL) is bool(list(temporary_folder.iterdir()))


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_run_on_the_device_is_refused_or_waits(command, start_until_stop, tmp_path):
    """The second run exits with 4, or waits for the first as requested; a signal ends the waiting as well."""
    with start_until_stop(command(stop="r1-a:turn")) as first:
        words = ["run", str(tmp_path / "small.toml"), "--phase", "train"]
        refused = subprocess.run(command(*words, "--if-busy", "refuse"), capture_output=True, text=True, check=False)
        assert refused.returncode == 4
        assert f"process {first.pid} measures on this device (cpu)" in refused.stderr
        for stopping in (True, False):
            with subprocess.Popen(
                command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as second:
                while "waiting for its end" not in (line := second.stderr.readline()):
                    assert line, "it has not waited"
                (second if stopping else first).terminate()
                second.communicate()
            assert second.returncode == (4 if stopping else 0)


SCRIPT = """
import os, subprocess, sys
started = "import os, time; open(os.environ['STARTED'], 'w').write('up'); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", started], start_new_session=True).wait()
"""
"""A script that starts another process in its own session, as a launcher does, and waits for it."""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A script that reports when its second process runs, and a function that finds both processes."""
    (tmp_path / "launch.py").write_text(SCRIPT)
    started = tmp_path / "started"
    os.mkfifo(started)
    monkeypatch.setenv("STARTED", str(started))
    return started, lambda: [psutil.Process(pid) for pid in find_marked(f"STARTED={started}".encode())]


@pytest.mark.parametrize("number", [*ONE_SIGNAL, signal.SIGKILL])
def test_a_run_of_commands_that_is_stopped_leaves_no_process(number, tmp_path, launcher, temporary_folder):
    """Processes that a launcher started are ended too; without results there is no verdict."""
    (tmp_path / "study.toml").write_text(
        f"[[variant]]\nname = 'a'\ncommand = '{sys.executable} launch.py'\ncwd = '{tmp_path}'\n"
        f"[[variant]]\nname = 'b'\ncommand = '{sys.executable} launch.py 2'\ncwd = '{tmp_path}'\n"
    )
    words = ["run", str(tmp_path / "study.toml"), "--runs-dir", str(tmp_path / "runs"), "--interleave", "replicates"]
    with subprocess.Popen(
        [sys.executable, "-m", "lorameter.cli", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert launcher[0].read_text() == "up"
        launched = launcher[1]()
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode == (4 if number in STOP_SIGNALS else -number), err
    _, alive = psutil.wait_procs(launched, timeout=60)
    assert not alive
    assert number == signal.SIGKILL or not list(temporary_folder.iterdir())
