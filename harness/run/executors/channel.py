"""JSON lines over a socket, which the parent blocks on."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from harness.errors import shorten
from harness.records import codec


class GarbledError(Exception):
    """What came is no message: something else than the other end's loop has written into its socket."""


class Channel:
    """JSON lines over a socket; receiving blocks in the kernel until a line, the end, or a timeout."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
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
        while b"\n" not in self._buffer:
            if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            try:
                data = self._connection.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                self.closed_by_peer = True
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            message = codec.parse(line)
        except codec.NotJsonError as error:
            raise GarbledError(f"{shorten(repr(line), 60)} is no message: {error}") from None
        if not isinstance(message, dict):
            raise GarbledError(f"{shorten(repr(line), 60)} is no message")
        self.asked = False
        return message

    def close(self) -> None:
        """No more of this conversation."""
        self._connection.close()
