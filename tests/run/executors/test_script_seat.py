"""Where a script's process computes while it is timed, by a real process."""

import dataclasses
import os
import subprocess

import pytest

from harness.run.executors.script_words import Begun
from harness.run.executors.script_worker import ScriptWorker

OURS = tuple(sorted(os.sched_getaffinity(0)))


def begun_of(pid, **changes):
    """What a script says that computes in one thread."""
    return dataclasses.replace(Begun(pid=pid, source="trainer", threads=1), **changes)


@pytest.fixture
def worker():
    """Of a process that has begun to train."""
    with subprocess.Popen(["sleep", "60"]) as process:
        found = ScriptWorker(lambda request: pytest.fail("nothing is started"))
        found._begun = begun_of(process.pid)
        yield found
        process.kill()


@pytest.mark.skipif(len(OURS) < 2, reason="this machine has one CPU for us")
def test_it_sits_and_stands(worker):
    """On one of its CPUs, and on all of them."""
    assert worker.cpus() == OURS
    worker.sit(OURS[1])
    assert os.sched_getaffinity(worker._begun.pid) == {OURS[1]}
    assert worker.cpus() == OURS
    worker.stand()
    assert tuple(sorted(os.sched_getaffinity(worker._begun.pid))) == OURS


@pytest.mark.parametrize("changes", [{"threads": 2}, {"threads": None}, {"ranks": 2}, {"cuda": True}, {"pid": 0}])
def test_what_several_compute_for_has_no_seat(worker, changes):
    """Threads, ranks, a card; and a process of which nothing can be known."""
    worker._begun = dataclasses.replace(worker._begun, **changes)
    assert worker.cpus() == ()


def test_what_has_not_begun_has_no_seat():
    """Nor one that has children, such as loaders of data."""
    worker = ScriptWorker(lambda request: pytest.fail("nothing is started"))
    assert worker.cpus() == ()
    with subprocess.Popen(["sleep", "60"]) as child:
        worker._begun = begun_of(os.getpid())
        assert worker.cpus() == ()
        child.kill()
