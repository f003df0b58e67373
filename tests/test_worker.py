"""Tests of the entry point of measuring processes, each of which ends with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from lorameter import wire
from lorameter.machine.processes import CPUS
from lorameter.run.workers.local import worker_environment

STARTER = """
import os, subprocess, sys
from lorameter.run.workers.local import worker_environment
what, descriptor = sys.argv[1], int(sys.argv[2])
child = subprocess.Popen(
    [sys.executable, "-m", "lorameter.worker", what, str(descriptor)],
    pass_fds=[descriptor], stdin=descriptor, env=worker_environment(1), start_new_session=True,
)
print(child.pid, flush=True)
child.wait()
"""
"""Starts a measuring process as an executor does, and is then killed by the test."""


@pytest.mark.parametrize("what", ["zygote", "tokens"])
def test_a_measuring_process_ends_with_its_parent(what):
    """The parent is killed while the child imports or waits; this process keeps the connection open, so that the child
    cannot notice its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            command = [sys.executable, "-c", STARTER, what, str(theirs.fileno())]
            starter = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
        with starter:
            child = psutil.Process(int(starter.stdout.readline()))
            starter.kill()
        _, alive = psutil.wait_procs([child], timeout=60)
        assert not alive


def test_a_process_whose_parent_died_before_its_start_exits():
    """The parent died between the fork and the child's first instruction."""
    environment = worker_environment(1) | {"LORAMETER_PARENT": str(os.getppid())}
    words = [sys.executable, "-m", "lorameter.worker", "tokens", "0"]
    done = subprocess.run(words, env=environment, input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_an_interrupt_ends_a_process_as_any_signal_does():
    """SIGINT raises no exception that a library could catch."""
    ours, theirs = wire.pair()
    words = [sys.executable, "-m", "lorameter.worker", "tokens", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            words, env=worker_environment(1), pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as process,
    ):
        wire.receive(ours, wire.Hello, 60.0)  # it now waits for its command
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGINT, b"")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one CPU every process stays there")
def test_a_measuring_process_stays_on_the_cpus_of_its_site():
    """It is pinned from its first instruction on; without the variable it may use all CPUs of its parent."""
    lines = "import os\nfrom lorameter import worker\ntry: worker.main(['none'])\n"
    lines += "except IndexError: print(*sorted(os.sched_getaffinity(0)))"
    every = sorted(os.sched_getaffinity(0))
    for cpus, expected in (({CPUS: str(every[-1])}, every[-1:]), ({}, every)):
        environment = worker_environment(1) | cpus
        done = subprocess.run(
            [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True
        )
        assert [int(cpu) for cpu in done.stdout.split()] == expected
