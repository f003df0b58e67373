"""What a door is: it takes one input, and does with it all that the commands do but measure.

A door answers with the text that it would show, which must not act on a terminal. What it may raise is a refusal.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from hostile import Mutator

from harness.errors import LorameterError
from harness.machine.provenance import Machine
from harness.report.table import Document
from harness.report.terminal import text_of
from kernels_check.trace.file import TraceError
from kernels_check.visible import make_visible


class RefusedError(Exception):
    """A refusal that a door gives as an exit code or as None; its message is what was shown."""


REFUSALS = (LorameterError, TraceError, RefusedError)
MACHINE = Machine(
    device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
    cpus=2, memory_bytes=64 * 2**30, avx512_bf16=False, kernel="6.0", python="3.11.0",
)  # fmt: skip
FREE_BYTES = 48 * 2**30
Enter = Callable[[Path, bytes], str]


@dataclass(frozen=True, kw_only=True)
class Door:
    """One kind of input."""

    name: str
    seeds: Callable[[], list[bytes]]
    spoil: Mutator
    enter: Enter
    """Puts the content into an empty folder and reads it; answers with what would be shown."""
    share: int
    """Of a hundred inputs, or a little more."""


def show(report: Document) -> str:
    """A report as a terminal would be sent it."""
    return text_of(report, width=100, coloured=False)


def printed(action: Callable[[], object]) -> str:
    """What an action prints, on either stream."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        action()
    return out.getvalue() + errors.getvalue()


def try_each(actions: Iterable[Callable[[], str]]) -> str:
    """What several readers of one thing show: each may refuse it for itself, and the message is shown then."""
    shown = []
    for action in actions:
        try:
            shown.append(action())
        except REFUSALS as error:
            shown.append(make_visible(str(error)))
    return "\n".join(shown)
