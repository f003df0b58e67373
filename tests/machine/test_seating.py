"""On which CPU a process computes, by a real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.machine.seating import cpus_of, has_children, seat, times_of

OURS = tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture
def process():
    """One with a second thread, which waits to be told to end."""
    code = "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print('there', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as found:
        assert found.stdout.readline() == b"there\n"
        yield found
        found.stdin.close()


def threads_of(process):
    """On which CPUs each of its threads may run."""
    return {tuple(sorted(os.sched_getaffinity(int(one.name)))) for one in Path(f"/proc/{process.pid}/task").iterdir()}


@pytest.mark.skipif(len(OURS) < 2, reason="this machine has one CPU for us")
def test_all_threads_of_a_process_sit_and_stand(process):
    """On one CPU, and on all that it had."""
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 2
    assert cpus_of(process.pid) == OURS
    seat(process.pid, {OURS[1]})
    assert threads_of(process) == {(OURS[1],)}
    seat(process.pid, OURS)
    assert threads_of(process) == {OURS}


def test_of_a_process_that_is_gone_nothing_happens():
    """It has no CPUs, and is not moved."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
        assert cpus_of(gone.pid) == ()
        seat(gone.pid, OURS)


def test_a_cpu_says_how_fast_it_is_now():
    """In the calling thread, which is then where it was; of a CPU that is not there nothing is said."""
    took = times_of((OURS[0], 10_000))
    assert list(took) == [OURS[0]]
    assert 0 < took[OURS[0]] < 10
    assert tuple(sorted(os.sched_getaffinity(0))) == OURS


@pytest.mark.skipif(
    not list(Path("/proc/self/task").glob("*/children")),
    reason="this kernel does not list children (CONFIG_PROC_CHILDREN)",
)
def test_children_of_a_process_are_seen():
    """While they live; of one that is gone nobody can tell."""
    with subprocess.Popen(["sleep", "60"]) as child:
        assert has_children(os.getpid())
        assert not has_children(child.pid)
        child.kill()
    assert has_children(child.pid)
