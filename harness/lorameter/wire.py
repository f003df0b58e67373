"""Messages between processes: tagged structs in MessagePack, over a connection of `multiprocessing`.

All measuring processes use this protocol: the zygote, the processes that it forks, the ranks of a trial, processes that
answer once, and scripts. A process first sends a `Hello`; then it answers each `Command` with one `Answer` or one
`Refused`, until the other end closes the connection.

The received bytes may come from another version of lorameter, or from a library that writes to the wrong descriptor. So
a message has a maximum size, and its content is validated against the expected type.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import msgspec

from lorameter.errors import EXIT_INVALID, InvalidRunError, LorameterError, UsageError, shorten
from lorameter.machine.processes import kill_group
from lorameter.records import codec
from lorameter.records.record import SCHEMA, WorkerInfo

T = TypeVar("T")
MAX_MESSAGE_BYTES = 256 << 20
"""The largest message of a trial, a memory breakdown, has a few MiB."""


class Hello(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The first message of a process."""

    schema: int = SCHEMA
    """Schema version of the messages and of their records."""
    harness: str = "unknown"
    """Its version of lorameter."""
    pid: int = 0
    """PID of the training process, which a launcher may have started; only for a script."""
    device: str = ""
    """"cuda" or "cpu"; only for a script."""
    started_monotonic_s: float = 0.0
    """When it executed its first instruction; only for a process that hosts trials."""
    worker: WorkerInfo | None = None
    """Libraries and device; only for the zygote."""


class Command(msgspec.Struct, tag=True, frozen=True):
    """A command to a process; `arguments` are plain data, with the names of the parameters of the function that
    executes it."""

    name: str
    trial: str = ""
    arguments: dict[str, Any] = {}


class Answer(msgspec.Struct, tag=True, frozen=True):
    """The result of a command."""

    value: msgspec.Raw


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The refusal of a command, with a reason for the user."""

    message: str
    exit_code: int = EXIT_INVALID


class GarbledError(Exception):
    """The received bytes are not a message of this protocol; later messages cannot be trusted either."""


class ClosedError(Exception):
    """The process at the other end has ended."""


def answer_with(value: object) -> Answer:
    """Wrap a value in an answer."""
    return Answer(msgspec.Raw(_encode(value)))


def _encode(value: object) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=codec.to_plain)


def send(connection: Connection, message: Hello | Command | Answer | Refused) -> None:
    """Send one message. Raises `ClosedError`."""
    try:
        connection.send_bytes(_encode(message))
    except OSError:
        raise ClosedError from None


def receive(connection: Connection, kind: type[T], timeout_s: float | None = None) -> T:
    """Receive the next message, which must be of this kind (a struct, or a union of structs).

    Raises:
        TimeoutError: no message arrived within `timeout_s`.
        ClosedError: the other end has ended.
        GarbledError: the received bytes are not a message, or it is of another kind.
    """
    if timeout_s is not None and not connection.poll(max(0.0, timeout_s)):
        raise TimeoutError
    try:
        data = connection.recv_bytes(MAX_MESSAGE_BYTES)
    except (EOFError, ConnectionError):
        raise ClosedError from None
    except OSError as error:
        raise GarbledError(f"no message: {error}") from None
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, LorameterError) as error:
        raise GarbledError(f"{shorten(repr(data), 60)} is not a message: {error}") from None


def check_schema(hello: Hello, whose: str) -> None:
    """Raise `InvalidRunError` for a process with another schema version."""
    if hello.schema != SCHEMA:
        raise InvalidRunError(
            f"{whose} speaks schema {hello.schema}, this program {SCHEMA} (its harness: {hello.harness}). Choose a "
            f"revision or an environment whose harness speaks schema {SCHEMA}, or run the A/B with the lorameter of "
            "that revision."
        )


_REPLY: Any = Answer | Refused


def receive_answer(connection: Connection, kind: type[T], timeout_s: float | None = None) -> T:
    """The result of the last command.

    Raises:
        TimeoutError: no result arrived within `timeout_s`.
        ClosedError: the other end has ended.
        GarbledError: the received message is not an answer of this type.
        LorameterError: the other end refused the command; the message is its reason.
    """
    reply: Answer | Refused = receive(connection, _REPLY, timeout_s)
    if isinstance(reply, Refused):
        raise InvalidRunError(reply.message) if reply.exit_code == EXIT_INVALID else UsageError(reply.message)
    try:
        return msgspec.msgpack.decode(reply.value, type=kind)
    except (msgspec.MsgspecError, LorameterError) as error:
        raise GarbledError(f"not the answer that is expected: {error}") from None


def serve(connection: Connection, carry_out: Callable[[Command], object], hello: Hello | None = None) -> None:
    """Send a `Hello`, then execute each command until the other end closes the connection; a `LorameterError` becomes a
    refusal."""
    with contextlib.suppress(ClosedError):
        send(connection, hello or Hello(started_monotonic_s=time.monotonic()))
        while True:
            command = receive(connection, Command)
            try:
                reply: Answer | Refused = answer_with(carry_out(command))
            except LorameterError as error:
                reply = Refused(str(error), error.exit_code)
            send(connection, reply)


def ask_process(
    process: subprocess.Popen[bytes], connection: Connection, command: Command, kind: type[T], timeout_s: float
) -> T | None:
    """Send a command to a process that was started for it. The process and its group have ended on return.

    Returns:
        The result; None if the process ended without one (see `process.returncode`).

    Raises:
        TimeoutError: it did not answer in time.
        GarbledError: its answer cannot be read.
        LorameterError: it refused the command, with this message.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(kill_group, process.pid)
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)

        def arrives() -> bool:
            # Processes started by this one may keep the connection open after its end.
            ready = wait([connection, ended], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            return connection in ready

        with contextlib.suppress(ClosedError):
            send(connection, command)
            if arrives():
                check_schema(receive(connection, Hello), f"the process for {command.name!r}")
            if arrives():
                return receive_answer(connection, kind)
    return None
