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
from typing import IO

from harness.machine.processes import kill_group

PIECE_BYTES = 1 << 16
MOST_BYTES = 256 << 20
"""What is beyond is read and thrown away: no answer is so long."""


def ask_once(process: subprocess.Popen[bytes], question: bytes, answer: IO[bytes] | int, timeout_s: float) -> bytes:
    """Write a question on a process's stdin, and read what it answers until it has ended.

    At the end, whatever that is, the process and its group are gone.

    Args:
        process: leader of its group; `returncode` is set afterwards.
        question: the stream is closed behind it.
        answer: the end of a pipe, made non-blocking here.
        timeout_s: for all of it.

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
        said, deadline = bytearray(), time.monotonic() + timeout_s
        while True:
            ready = {key.fd for key, _ in waiting.select(max(0.0, deadline - time.monotonic()))}
            if not ready:
                raise TimeoutError
            if writing in ready:
                question = _write(writing, question)
                if not question:
                    waiting.unregister(writing)
                    process.stdin.close()
            if ended in ready:
                while _read(reading, said):
                    pass
                return bytes(said)
            if reading in ready and not _read(reading, said):
                waiting.unregister(reading)


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
    if len(into) < MOST_BYTES:
        into += piece
    return bool(piece)
