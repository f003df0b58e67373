"""The journal of a campaign, written after each step, from which the next call resumes.

Each ended step adds a line, which is never changed; the last line of a step counts. Calls on borrowed machines share
only this folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["done", "failed", "stopped", "rehearsed"]
"""The step has a result · ended without a result · reached its limit · was rehearsed on a machine without a GPU."""
SOURCES = ("harness", "kernels_check", "benchmarks/gpu", "tests")
MAX_ATTEMPTS = 2
"""For a step that cannot be resumed and reached its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The result of one attempt at a step."""

    step: str
    outcome: Outcome
    code: int | None
    """Exit code of the process; None where its limit ended it."""
    took_s: float
    begun_unix_s: float
    device: str
    """Name of the GPU, or of the CPU."""
    unit: str
    """The UUID of a GPU, to distinguish GPUs of one name."""
    sources: str
    """Hash of the executed code (`hash_of_sources`)."""
    last_line: str = ""
    """The last line of the process on standard error, where it has no result."""


class OtherMachineError(Exception):
    """The state belongs to another kind of GPU or to another machine."""


class Journal:
    """The entries of one folder. Raises `OtherMachineError` if they belong to another device than the given one."""

    def __init__(self, folder: Path, device: str) -> None:
        self._file = folder / "journal.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[Entry] = list(_read(self._file))
        other = next((entry.device for entry in self.entries if entry.device != device), None)
        if other is not None:
            raise OtherMachineError(f"{folder} is of {other}, and this is {device}: give another folder with --state")

    def add(self, entry: Entry) -> None:
        """Append an attempt and write it at once."""
        self.entries.append(entry)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")

    def last(self, step: str) -> Entry | None:
        """Return the last attempt at a step, or None."""
        return next((entry for entry in reversed(self.entries) if entry.step == step), None)

    def attempts(self, step: str) -> list[Entry]:
        """Return all attempts at a step."""
        return [entry for entry in self.entries if entry.step == step]

    def forget(self, steps: Iterable[str]) -> None:
        """Remove the entries of steps, so that they are taken again; their output files stay until then."""
        names = set(steps)
        self.entries = [entry for entry in self.entries if entry.step not in names]
        self._file.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries), encoding="utf-8")


def _read(file: Path) -> Iterable[Entry]:
    if not file.exists():
        return
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    file.write_text(whole + "\n" if whole else "", encoding="utf-8")  # without an incomplete last line
    for line in whole.splitlines():
        yield Entry(**json.loads(line))


def hash_of_sources(root: Path) -> str:
    """Return a hash of the code of a campaign; the machine that it is copied to may have no repository."""
    hashed = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                hashed.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return hashed.hexdigest()[:16]
