"""Tests of messages between processes: invalid messages, and those of another version, are refused without waiting."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from lorameter import wire
from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.record import SCHEMA, Failure, PartialRecord


@pytest.fixture
def ends():
    """Both ends of a connection."""
    ours, theirs = wire.pair()
    with ours, theirs:
        yield ours, theirs


def test_a_record_arrives_as_it_was_sent(ends):
    """The record has numbers that JSON cannot represent."""
    record = PartialRecord(
        samples={"step_time_s": (0.1, math.inf)},
        values={"loss": np.float64(2.0)},
        checks=({"path": "loss", "observed": None},),
        failure=Failure(phase="turn", kind="LossNotFinite", message="the loss is nan"),
        status="invalid",
    )
    wire.send(ends[1], wire.answer_with(record))
    assert wire.receive_answer(ends[0], PartialRecord) == record
    wire.send(ends[1], wire.answer_with(msgspec.structs.replace(record, values={"loss": math.nan})))
    assert math.isnan(wire.receive_answer(ends[0], PartialRecord).values["loss"])


@pytest.mark.parametrize("data", [b'{"pid": 7, "schema": 5}\n', b"\0\0\0\4junk", b"\0\0\0\1\xc0"])
def test_an_invalid_message_is_refused_at_once(ends, data):
    """The test covers a line of an older protocol, a text, and another value in MessagePack."""
    os.write(ends[1].fileno(), data)
    with pytest.raises(wire.GarbledError):
        wire.receive(ends[0], wire.Hello, 5.0)


def test_an_older_version_is_refused_with_one_sentence():
    """The error names both versions and the remedy."""
    with pytest.raises(InvalidRunError, match=rf"the worker speaks schema 1, this program {SCHEMA} .*\. Choose a rev"):
        wire.check_schema(wire.Hello(schema=1), "the worker")


def test_an_answer_of_another_type_is_garbled_and_a_refusal_is_an_error(ends):
    """The error has the message and the exit code of the other end."""
    wire.send(ends[1], wire.answer_with({"status": "fine"}))
    with pytest.raises(wire.GarbledError, match="not the answer that is expected"):
        wire.receive_answer(ends[0], PartialRecord)
    wire.send(ends[1], wire.Refused("no such file. Mend the path.", UsageError.exit_code))
    with pytest.raises(UsageError, match="no such file"):
        wire.receive_answer(ends[0], PartialRecord)


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(3)", 3), ("import os, time; os.fork() and os._exit(9); time.sleep(60)", 9)]
)
def test_a_process_that_ends_without_an_answer_is_not_waited_for(ends, program, code):
    """The call returns although a child of the process keeps the connection open."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[ends[1].fileno()], start_new_session=True, stderr=subprocess.DEVNULL
    )
    assert wire.ask_process(process, ends[0], wire.Command("look"), int, 60.0) is None
    assert process.returncode == code
