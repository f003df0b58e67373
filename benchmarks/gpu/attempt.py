"""One attempt at a step: its process, its output, and its time limit.

At its limit a process gets SIGINT, upon which a run saves its trials and pytest writes its results; a process that
ignores it is killed with its children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 25.0
"""The time to save the results and exit."""
MAX_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of a process."""

    code: int | None
    """The exit code; None where the limit ended the process."""
    took_s: float
    last_line: str
    """The last line of its standard error, or of its output if standard error is empty."""


def attempt(
    words: Sequence[str], *, limit_s: float, outputs: Path, name: str, folder: Path, variables: Mapping[str, str]
) -> Ended:
    """Run a command to its end or to its limit; its output goes to NAME.out and NAME.err in `outputs`."""
    outputs.mkdir(parents=True, exist_ok=True)
    written = {stream: outputs / f"{name}.{stream}" for stream in ("out", "err")}
    begun = time.monotonic()
    with written["out"].open("wb") as out, written["err"].open("wb") as err:
        process = subprocess.Popen(
            words, cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    last_line = next((line for stream in ("err", "out") if (line := _last_line(written[stream]))), "")
    return Ended(code=code, took_s=time.monotonic() - begun, last_line=last_line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process if it still runs, then kill its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:MAX_CHARACTERS] if lines else ""
