"""How a process that hosts trials speaks: one command a line, one answer a line, over a socket."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from lorameter.records import codec
from lorameter.records.record import PartialRecord


def answer_lines(connection: socket.socket, answer: Callable[[dict[str, Any]], PartialRecord]) -> None:
    """Greet, then one answer for each command, until the other side closes the connection."""
    send(connection, {"pid": os.getpid(), "started_monotonic_s": time.monotonic()})
    with connection.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            send(connection, codec.to_json(answer(json.loads(line))))


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One message, as one line."""
    connection.sendall((json.dumps(message, allow_nan=False) + "\n").encode())
