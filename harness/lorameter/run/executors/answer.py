"""What a process answers that is asked once and ends: a cold interpreter, the one that prepares tokens.

A pipe holds 64 KiB, so an answer that is longer is read while it is written. What the process has started may hold the
pipe open long after it; the answer is whole when the process has ended, whoever else could still write.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable
from typing import IO

from lorameter.machine.processes import kill_group

PIECE_BYTES = 1 << 16
MOST_BYTES = 256 << 20
"""No answer is so long: what has said so much is ended."""
OVERDUE_S = 5.0
"""After so long whoever waits wants to know what for."""


def run_one_shot(
    process: subprocess.Popen[bytes],
    question: bytes,
    answer: IO[bytes] | int,
    timeout_s: float,
    *,
    most_bytes: int = MOST_BYTES,
    overdue: Callable[[], object] | None = None,
) -> bytes:
    """Write a question on a process's stdin, and read what it answers until it has ended or said too much.

    At the end, whatever that is, the process and its group are gone.

    Args:
        process: leader of its group; `returncode` is set afterwards.
        question: the stream is closed behind it.
        answer: the end of a pipe, made non-blocking here.
        timeout_s: for all of it.
        most_bytes: what is too much.
        overdue: called once, where it takes longer than `OVERDUE_S`.

    Raises:
        TimeoutError: it has not ended in this time.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(kill_group, process.pid)  # before it is waited for: until then nobody else has its number
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)
        waiting = stack.enter_context(selectors.DefaultSelector())
        reading = answer if isinstance(answer, int) else answer.fileno()
        assert process.stdin is not None
        writing = stack.enter_context(process.stdin).fileno()
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)
        waiting.register(ended, selectors.EVENT_READ)
        waiting.register(reading, selectors.EVENT_READ)
        waiting.register(writing, selectors.EVENT_WRITE)
        said, begun_s = bytearray(), time.monotonic()
        while True:
            until_s = begun_s + (timeout_s if overdue is None else min(OVERDUE_S, timeout_s))
            left_s = until_s - time.monotonic()
            ready = {key.fd for key, _ in waiting.select(max(0.0, left_s))}
            if ended not in ready and (not ready or left_s <= 0):  # it may go on talking
                if overdue is None:
                    raise TimeoutError
                overdue()
                overdue = None
            if writing in ready:
                question = _write(writing, question)
                if not question:
                    waiting.unregister(writing)
                    process.stdin.close()
            if ended in ready:
                while len(said) < most_bytes and _read(reading, said):
                    pass
                return bytes(said)
            if reading in ready and not _read(reading, said):
                waiting.unregister(reading)
            if len(said) >= most_bytes:
                return bytes(said)


def _write(descriptor: int, text: bytes) -> bytes:
    """What is left of a text; nothing where nobody will read it."""
    try:
        return text[os.write(descriptor, text) :]
    except BlockingIOError:
        return text
    except BrokenPipeError:
        return b""


def _read(descriptor: int, into: bytearray) -> bool:
    """Whether there was something to be read; False at the end, and where there is nothing now."""
    try:
        piece = os.read(descriptor, PIECE_BYTES)
    except BlockingIOError:
        return False
    into += piece
    return bool(piece)
