"""A script's process and its socket: which users may connect, and what signals do."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client

import psutil
import pytest

from lorameter import wire
from lorameter.attach.script_trial import SOCKET, address
from lorameter.machine.processes import marked
from lorameter.run.workers import WorkerLostError, script
from lorameter.run.workers.script import ScriptProcess
from lorameter.run.workers.script_sandbox import variables_of
from lorameter.studies.variant import ScriptVariant


@pytest.fixture
def start(tmp_path):
    """A function that starts a command, listened to on a socket of this name."""
    started = []

    def started_with(*words, turns=""):
        turns = turns or f"@lorameter-test-{secrets.token_hex(8)}"
        variables = {**os.environ, SOCKET: turns}
        started.append(ScriptProcess(words, variables, folder=tmp_path, log=tmp_path / "log", turns=turns))
        return started[-1]

    yield started_with
    for one in started:
        one.close()


def greet(turns, harness):
    """Connect as a script's training does."""
    connection = Client(address(turns), "AF_UNIX")
    wire.send(connection, wire.Hello(harness=harness))
    return connection


@pytest.mark.parametrize(("option", "kind"), [("-I", "NotHooked"), ("-u", "NeverTrained")])
def test_a_python_that_reads_no_path_is_told_from_one_that_never_trains(tmp_path, option, kind):
    """Nothing of the one can be heard, whatever it does; the other has nothing to say."""
    turns = f"@lorameter-test-{secrets.token_hex(8)}"
    variables = variables_of(
        ScriptVariant(name="a", command="python t.py"), os.environ, scratch=tmp_path, threads=1, port=5, socket=turns
    )
    words = (sys.executable, option, "-c", "print('alone')")
    process = ScriptProcess(words, variables, folder=tmp_path, log=tmp_path / "log", turns=turns)
    try:
        with pytest.raises(WorkerLostError) as caught:
            process.connect(60.0)
    finally:
        process.close()
    assert (caught.value.status, caught.value.failure.kind) == ("invalid", kind)


def test_another_users_connection_is_refused_and_the_next_is_heard(start, monkeypatch):
    """A name that lies in no folder is open to all who know it."""
    users = iter([os.geteuid() + 1, os.geteuid()])
    monkeypatch.setattr(script, "_user_of", lambda connection: next(users))
    turns = "@lorameter-test-" + secrets.token_hex(8)
    process = start("sleep", "60", turns=turns)
    with greet(turns, "theirs") as theirs, greet(turns, "ours"), process.connect(30) as ours:
        assert wire.receive(ours, wire.Hello).harness == "ours"
        with pytest.raises(wire.ClosedError):
            wire.receive(theirs, wire.Hello)


@pytest.fixture
def another_thread():
    """One that takes signals, which a process of numpy's has."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_a_signal_that_stops_a_run_waits_for_a_start(start, monkeypatch):
    """What its handler raises while Python forks would be lost. What was started has no owner then, and is killed."""
    plain, met = subprocess.Popen, []

    def stopped(*args, **kwargs):
        if "preexec_fn" not in kwargs:  # what watches over it, which is started first
            return plain(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # the other thread may be the one that is interrupted
        met.append(plain(*args, **kwargs))
        return met[0]

    def stop(number, frame):
        met.append("stops")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", stopped)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            start("sleep", "60")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert met[1:] == ["stops"]
    assert met[0].wait(10) == -signal.SIGKILL


LAUNCHER = """
import subprocess, sys
started = "import time; open('started', 'w').write('up'); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", started], start_new_session=True).wait()
"""
PARENT = """
import os, sys, time
from pathlib import Path
from lorameter import wire
from lorameter.attach.script_trial import SOCKET
from lorameter.run.workers.script import ScriptProcess
turns, folder, launcher = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
words = [sys.executable, "-c", launcher]
process = ScriptProcess(words, {**os.environ, SOCKET: turns}, folder=folder, log=folder / "log", turns=turns)
time.sleep(300)
"""


def test_what_a_launcher_started_ends_with_a_parent_that_is_killed(tmp_path):
    """In a session of its own, where neither the kernel nor a signal to the group reaches it."""
    turns = f"@lorameter-test-{secrets.token_hex(8)}"
    os.mkfifo(tmp_path / "started")
    with subprocess.Popen([sys.executable, "-c", PARENT, turns, str(tmp_path), LAUNCHER]) as parent:
        assert (tmp_path / "started").read_text() == "up"
        started = [psutil.Process(pid) for pid in marked(f"{SOCKET}={turns}".encode())]
        assert len(started) == 2
        others = psutil.Process(parent.pid).children()  # the one that watches is among them
        parent.kill()
    _, alive = psutil.wait_procs([*started, *others], timeout=60)
    assert not alive
