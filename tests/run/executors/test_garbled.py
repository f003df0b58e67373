"""What comes from a measuring process and is no answer: a row, and never the end of the run."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from harness.run.executors import Place, WorkerLostError, channel
from harness.run.executors.channel import Channel, GarbledError
from harness.run.executors.forked import ForkedWorker
from harness.run.executors.local import LocalExecutor
from harness.run.executors.zygote import Zygote, ZygoteLostError
from harness.run.plan import make_plan
from harness.run.site import Site, request_of

SITE = Site(device="cpu", threads=1, tokens_path="t", tokens={})

GARBLED = {
    "words": b"all is well",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "digits": b'{"values": ' + b"9" * 5000 + b"}",
    "bytes": b'{"\xff": 1}',
}


@pytest.fixture
def talker():
    """A channel to somebody who never comes to the end of a line."""
    ours, theirs = socket.socketpair()
    enough = threading.Event()

    def talk():
        with contextlib.suppress(OSError):
            while not enough.is_set():
                theirs.sendall(b"x" * 65536)

    thread = threading.Thread(target=talk)
    thread.start()
    yield Channel(ours)
    enough.set()
    ours.close()
    thread.join()


def test_who_talks_without_end_is_silent(talker):
    """What comes after the time is not waited for, however much of it comes."""
    assert talker.receive(0.0) is None
    assert not talker.closed_by_peer


def test_a_message_without_end_is_refused(talker, monkeypatch):
    """It is not held in memory either."""
    monkeypatch.setattr(channel, "LINE_BYTES", 1 << 20)
    with pytest.raises(GarbledError, match="goes on for more than 1 MiB"):
        talker.receive(60.0)


def test_messages_that_come_at_once_are_heard_one_by_one():
    """And one that comes in parts is one."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
        heard = Channel(ours)
        assert [heard.receive(1.0), heard.receive(1.0), heard.receive(0.0)] == [{"a": 1}, {"b": 2}, None]
        theirs.sendall(b": 3}\n")
        assert heard.receive(1.0) == {"c": 3}
    assert (heard.receive(1.0), heard.closed_by_peer) == (None, True)


def worker_that_is_sent(line):
    """A worker with a line that waits to be read from its process, which is gone."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(line + b"\n")
    return ForkedWorker(0, Channel(ours), SimpleNamespace(lives=False, last_words=str, reap=lambda pid: None))


@pytest.mark.parametrize("line", GARBLED.values(), ids=GARBLED)
def test_what_is_no_message_is_refused(line):
    """Whatever it is, one error says so."""
    with pytest.raises(GarbledError, match="is no message"):
        worker_that_is_sent(line).channel.receive(1.0)


@pytest.mark.parametrize("line", [*GARBLED.values(), b'{"values": {"x": "y"}}', b'{"unknown": 1}'])
def test_an_answer_that_is_none_is_a_crashed_trial(line):
    """The trial is lost by name; the parent goes on."""
    with pytest.raises(WorkerLostError, match="no answer that can be read") as lost:
        worker_that_is_sent(line).ask("train", "x", 1.0)
    assert (lost.value.status, lost.value.failure.phase, lost.value.failure.kind) == ("crashed", "train", "Garbled")


@pytest.mark.parametrize("line", [b"noise", b"{}", b'{"started_monotonic_s": "now"}'])
def test_a_first_word_that_says_nothing_is_a_crashed_trial(line):
    """It is not known then when the process began."""
    with pytest.raises(WorkerLostError, match="no answer that can be read"):
        worker_that_is_sent(line).greet(0.0)


def test_a_zygote_that_says_something_else_is_lost():
    """Nothing that it says afterwards is believed; another one is started in its place."""
    program = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.sendall(b'noise\\n'); s.recv(1 << 16)"

    def spawn(number):
        return subprocess.Popen([sys.executable, "-c", program, str(number)], pass_fds=(number,))

    zygote = Zygote(spawn)
    try:
        with pytest.raises(ZygoteLostError):
            zygote.fork()
        assert not zygote.lives
    finally:
        zygote.close()


@pytest.mark.parametrize("answer", ["noise", "[]", '{"values": {"x": "y"}}', "[" * 5000])
def test_a_cold_start_that_says_something_else_is_a_crashed_trial(answer, tmp_path, monkeypatch, small_study):
    """Its process ended well, and what it wrote is no fragment."""
    program = f"import os, sys; sys.stdin.read(); os.write(int(sys.argv[1]), {answer.encode()!r})"
    local = LocalExecutor()
    monkeypatch.setattr(
        local,
        "_spawn",
        lambda word, number, log, **ends: subprocess.Popen(
            [sys.executable, "-c", program, str(number)], pass_fds=(number,), **ends
        ),
    )
    plan = make_plan(small_study)
    place = Place(scratch=str(tmp_path), log_path=str(tmp_path / "log"))
    request = request_of(plan, plan.slots[0], SITE, place)
    with pytest.raises(WorkerLostError, match="no answer that can be read") as lost:
        local.cold_start(request)
    assert (lost.value.status, lost.value.failure.kind) == ("crashed", "Garbled")
