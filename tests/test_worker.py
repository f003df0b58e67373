"""The door of every measuring process: what comes through it ends with the process that started it."""

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
"""Starts a measuring process as an executor does, and is there to be killed."""


@pytest.mark.parametrize("what", ["zygote", "tokens"])
def test_a_measuring_process_ends_with_its_parent(what):
    """Killed without a word, while the child imports or waits; the connection stays open in this process, so its end
    is not what the child sees."""
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


def test_a_measuring_process_whose_parent_is_gone_does_not_begin():
    """It died between the fork and the first instruction, when nothing was watched yet."""
    environment = worker_environment(1) | {"LORAMETER_PARENT": str(os.getppid())}
    words = [sys.executable, "-m", "lorameter.worker", "tokens", "0"]
    done = subprocess.run(words, env=environment, input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_an_interrupt_ends_a_process_as_any_signal_does():
    """It raises nothing that a library could take for an error of its own."""
    ours, theirs = wire.pair()
    words = [sys.executable, "-m", "lorameter.worker", "tokens", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            words, env=worker_environment(1), pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as process,
    ):
        wire.receive(ours, wire.Hello, 60.0)  # it waits for its command now
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGINT, b"")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one CPU every process stays there")
def test_a_measuring_process_stays_on_the_cpus_of_its_site():
    """From its first instruction on; without the variable on all CPUs of its parent."""
    lines = "import os\nfrom lorameter import worker\ntry: worker.main(['none'])\n"
    lines += "except IndexError: print(*sorted(os.sched_getaffinity(0)))"
    every = sorted(os.sched_getaffinity(0))
    for cpus, expected in (({CPUS: str(every[-1])}, every[-1:]), ({}, every)):
        environment = worker_environment(1) | cpus
        done = subprocess.run(
            [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True
        )
        assert [int(cpu) for cpu in done.stdout.split()] == expected
