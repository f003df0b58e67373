"""Tests of the process and the socket of a script: allowed users, and signals."""

from __future__ import annotations

import os
import secrets
import sys
from multiprocessing.connection import Client

import pytest

from lorameter import wire
from lorameter.attach.script_trial import SOCKET, address
from lorameter.run.workers import WorkerLostError, script
from lorameter.run.workers.script import ScriptProcess
from lorameter.run.workers.script_sandbox import variables_of
from lorameter.studies.variant import ScriptVariant


@pytest.fixture
def start(tmp_path):
    """A function that starts a command that connects to a socket of the given name."""
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
    """Connect as the training of a script does."""
    connection = Client(address(turns), "AF_UNIX")
    wire.send(connection, wire.Hello(harness=harness))
    return connection


@pytest.mark.parametrize(("option", "kind"), [("-I", "NotHooked"), ("-u", "NeverTrained")])
def test_a_python_without_the_hook_differs_from_one_that_never_trains(tmp_path, option, kind):
    """A Python without the hook and a script without a training are reported as different failures."""
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


def test_another_users_connection_is_closed_and_the_next_accepted(start, monkeypatch):
    """A socket in the abstract namespace accepts every user, so that the connection of another user is closed."""
    users = iter([os.geteuid() + 1, os.geteuid()])
    monkeypatch.setattr(script, "_user_of", lambda connection: next(users))
    turns = "@lorameter-test-" + secrets.token_hex(8)
    process = start("sleep", "60", turns=turns)
    with greet(turns, "theirs") as theirs, greet(turns, "ours"), process.connect(30) as ours:
        assert wire.receive(ours, wire.Hello).harness == "ours"
        with pytest.raises(wire.ClosedError):
            wire.receive(theirs, wire.Hello)
