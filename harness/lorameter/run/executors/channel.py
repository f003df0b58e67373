"""JSON lines over a socket, which the parent blocks on.

What is at the other end may run a model's or a user's program, so neither its silence nor its endless talk is waited
for: a message has a size, and its end has a time.
"""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from lorameter.errors import shorten
from lorameter.records import codec

LINE_BYTES = 256 << 20
"""Of one message; the largest that a trial sends, an account of its memory, has a few MiB."""
PIECE_BYTES = 1 << 20


class GarbledError(Exception):
    """What came is no message: something else than the other end's loop has written into its socket."""


class Channel:
    """JSON lines over a socket; receiving blocks in the kernel until a line, the end, or a timeout, whatever comes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self.closed_by_peer = False
        self.asked = False
        """Whether something was said that has not been answered yet: the other end is at work, or silent."""

    def send(self, message: dict[str, Any], attached: socket.socket | None = None) -> None:
        """One line to the other end, with a socket for it to keep; raises nothing if that end is gone."""
        data = (json.dumps(message, allow_nan=False) + "\n").encode()
        self.asked = True
        try:
            if attached is None:
                self._connection.sendall(data)
            else:
                socket.send_fds(self._connection, [data], [attached.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            self.closed_by_peer = True

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None when the peer is gone (`closed_by_peer`) or silent.

        Raises:
            GarbledError: it is none, and nothing more that comes can be trusted.
        """
        deadline = time.monotonic() + timeout_s
        waiting = select.poll()  # select() knows no descriptor above 1023
        waiting.register(self._connection, select.POLLIN)
        end = self._buffer.find(b"\n")
        late = False
        while end < 0:
            left_s = deadline - time.monotonic()
            if late or not waiting.poll(1000 * max(0.0, left_s)):
                return None
            late = left_s <= 0  # what has come by then is taken, once
            try:
                data = self._connection.recv(PIECE_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                self.closed_by_peer = True
                return None
            end = data.find(b"\n")
            end += len(self._buffer) if end >= 0 else 0
            self._buffer += data
            if len(self._buffer) > LINE_BYTES + PIECE_BYTES:
                said = shorten(repr(bytes(self._buffer[:60])), 60)
                raise GarbledError(f"{said} goes on for more than {LINE_BYTES >> 20} MiB, and no message does")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = codec.parse(line)
        except codec.NotJsonError as error:
            raise GarbledError(f"{shorten(repr(line), 60)} is no message: {error}") from None
        if not isinstance(message, dict):
            raise GarbledError(f"{shorten(repr(line), 60)} is no message")
        self.asked = False
        return message

    def fileno(self) -> int:
        """Of the socket, to wait for several at once."""
        return self._connection.fileno()

    def close(self) -> None:
        """No more of this conversation."""
        self._connection.close()
