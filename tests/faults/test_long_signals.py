"""Each signal at each phase of each door. Marked: `make proof-long` runs it; `make test` has some of it."""

from __future__ import annotations

import signal
import subprocess

import pytest

from harness.records import store

pytestmark = pytest.mark.faults

ASKED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
DEADLY = [signal.SIGKILL, signal.SIGSEGV]
TRAINING = ["prepare", "build", "verify", "warm_up", "turn", "finish_training"]
SERVING = ["begin_generate", "request", "merge"]
ALONE = ["end_generate", "save_adapter", "cold"]
"""What is asked of a trial that has a process of its own."""
PROFILED = ["prepare", "build", "verify", "warm_up", "finish_training", "account", "profile", "request", "peak"]


def check_ending(process, number, err):
    """4 and no traceback where it was told to stop; killed as it was where it could not be told."""
    assert process.returncode == (4 if number in ASKED else -number), err
    assert "Traceback" not in err


def check_resumed(before, whole):
    """What had come to its end is what it was, and all else has come to its own."""
    kept = {record.trial: record for record in before.records if record.settled}
    assert (whole.state, whole.damaged_lines) == ("complete", 0)
    assert [record.trial for record in whole.records] == list(before.manifest.order)
    assert {record.status for record in whole.records} == {"ok"}
    earlier = [record for record in whole.records if record.replicate == 0]
    assert [record for record in earlier if kept.get(record.trial) == record] == earlier


@pytest.mark.parametrize("number", [*ASKED, *DEADLY])
@pytest.mark.parametrize("phase", [*TRAINING, *SERVING, *ALONE])
def test_a_run(number, phase, tmp_path, command, stopped, only_run, resumed, temporary):
    """In its second replicate: the first is kept whatever comes, the rest is measured by `--resume`."""
    trial = "r1-a-solo" if phase in ALONE else "r1-a"
    phases = ("--phase", "train", "--phase", "generate", "--phase", "cold")
    words = ["run", str(tmp_path / "small.toml"), *phases, "--interleave", "lockstep"]
    with stopped(command(*words, stop=f"{trial}:{phase}")) as process:
        process.send_signal(number)
        _, err = process.communicate()
    check_ending(process, number, err)
    before = only_run()
    assert {record.status for record in before.records if record.replicate == 0} == {"ok"}
    assert number in DEADLY or before.state == "interrupted"
    check_resumed(before, resumed())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("number", [*ASKED, *DEADLY])
@pytest.mark.parametrize("phase", TRAINING)
def test_a_session_of_pytest(number, phase, tmp_path, session, stopped, only_run, resumed, temporary):
    """The other front door: the run is there, the session does not pass, and it is gone on with by either door."""
    with stopped(session(stop=f"r1-a:{phase}"), cwd=tmp_path) as process:
        process.send_signal(number)
        process.communicate()
    assert process.returncode == (1 if number in ASKED else -number)
    check_resumed(only_run(), resumed())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("number", [*ASKED, *DEADLY])
@pytest.mark.parametrize("phase", TRAINING)
def test_an_ab(number, phase, ab, repository, git, stopped, temporary, only_run, resumed):
    """Its sides are taken down by itself or by the next one, and it is gone on with."""
    with stopped(ab(stop=f"r1-a-base:{phase}")) as process:
        process.send_signal(number)
        _, err = process.communicate()
    check_ending(process, number, err)
    assert number in DEADLY or len(git(repository, "worktree", "list")) == 1
    check_resumed(only_run(), resumed(1, 3))
    assert len(git(repository, "worktree", "list")) == 1
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("number", [*ASKED, *DEADLY])
@pytest.mark.parametrize("phase", PROFILED)
def test_a_profile(number, phase, tmp_path, command, stopped, runs, temporary):
    """There is no half of one; what a killed one has left stops no run, and its temporary files go with the next."""
    with stopped(command("profile", f"{tmp_path / 'small.toml'}:a", stop=f"r0-a:{phase}")) as process:
        process.send_signal(number)
        _, err = process.communicate()
    check_ending(process, number, err)
    assert not list(runs.glob("*/profile.json"))
    assert number in DEADLY or not list(runs.iterdir())
    subprocess.run(command(), check=True, capture_output=True)
    assert len(store.list_runs(runs)) == 1
    assert not list(temporary.iterdir())
