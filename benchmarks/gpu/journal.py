"""The journal of a campaign, written after each step: the next call resumes where this one ends.

A line is added when a step has ended, however it ended, and none is ever changed; of several of one step the last one
counts. Calls on machines that are lent and taken back share nothing but this folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["done", "failed", "stopped", "rehearsed"]
"""Answered · ended without an answer · ended by the clock · run as far as a machine without a GPU can."""
SOURCES = ("harness", "kernels_check", "benchmarks/gpu", "tests")
MOST_ATTEMPTS = 2
"""Of a step that cannot be resumed and was stopped by its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How one attempt at a step ended."""

    step: str
    outcome: Outcome
    code: int | None
    """Exit code of its process; None where the clock ended it."""
    took_s: float
    begun_unix_s: float
    device: str
    """Name of the GPU, or of the CPU."""
    unit: str
    """Which one of its name: the UUID of a GPU."""
    sources: str
    """Hash of what was run (`hash_of_sources`)."""
    last_line: str = ""
    """The last line that the process wrote to its standard error, where it has no answer."""


class OtherMachineError(Exception):
    """The state is of another kind of GPU or of another machine than this one."""


class Journal:
    """The entries of one folder. Raises `OtherMachineError` if they are of another device than the one given."""

    def __init__(self, folder: Path, device: str) -> None:
        self._file = folder / "journal.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[Entry] = list(_read(self._file))
        other = next((entry.device for entry in self.entries if entry.device != device), None)
        if other is not None:
            raise OtherMachineError(f"{folder} is of {other}, and this is {device}: give another folder with --state")

    def add(self, entry: Entry) -> None:
        """Keep how an attempt ended, at once."""
        self.entries.append(entry)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")

    def last(self, step: str) -> Entry | None:
        """How the last attempt at a step ended; None where there was none."""
        return next((entry for entry in reversed(self.entries) if entry.step == step), None)

    def attempts(self, step: str) -> list[Entry]:
        """All attempts at a step."""
        return [entry for entry in self.entries if entry.step == step]

    def forget(self, steps: Iterable[str]) -> None:
        """Have steps taken again; the files of their output stay until then."""
        names = set(steps)
        self.entries = [entry for entry in self.entries if entry.step not in names]
        self._file.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries), encoding="utf-8")


def _read(file: Path) -> Iterable[Entry]:
    if not file.exists():
        return
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    file.write_text(whole + "\n" if whole else "", encoding="utf-8")  # without a line that an end by force left half
    for line in whole.splitlines():
        yield Entry(**json.loads(line))


def hash_of_sources(root: Path) -> str:
    """Of the code that a campaign runs: on the machine that it is copied to there may be no repository."""
    hashed = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                hashed.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return hashed.hexdigest()[:16]
