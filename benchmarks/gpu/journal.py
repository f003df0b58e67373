"""The journal of a campaign, written after each step, from which the next call resumes.

Each attempt at a step adds a line; the last line of a step counts. Calls on different machines share only this folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lorameter.records import fileio

Outcome = Literal["done", "failed", "stopped", "rehearsed"]
"""The step has a result · ended without a result · reached its limit · was rehearsed on a machine without a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The result of one attempt at a step."""

    step: str
    outcome: Outcome
    code: int | None
    """Exit code of the process; None if it reached its limit."""
    took_s: float
    begun_unix_s: float
    device: str
    """Name of the GPU or CPU."""
    gpu_uuid: str
    """Distinguishes GPUs with the same name."""
    harness: str
    """Version and hash of the harness that ran."""
    last_line: str = ""
    """The last line of the process on standard error, if it has no result."""


class Journal:
    """The entries of one folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "journal.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.entries = [Entry(**json.loads(line)) for line in fileio.journal_lines(self._file)]

    def add(self, entry: Entry) -> None:
        """Append an attempt and write it at once."""
        self._write([*self.entries, entry])

    def attempts(self, step: str) -> list[Entry]:
        """Return all attempts at a step."""
        return [entry for entry in self.entries if entry.step == step]

    def last(self, step: str) -> Entry | None:
        """Return the last attempt at a step, or None."""
        return next(reversed(self.attempts(step)), None)

    def forget(self, steps: Iterable[str]) -> None:
        """Remove the entries of steps, so that they run again; their output files stay until then."""
        names = set(steps)
        self._write([entry for entry in self.entries if entry.step not in names])

    def _write(self, entries: list[Entry]) -> None:
        self.entries = entries
        fileio.write_whole(self._file, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
