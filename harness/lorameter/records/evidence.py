"""The evidence of checks, two thirds of a record and the same in nearly all: stored once a run, in checks.jsonl.

A line is the hash of a check's canonical JSON, by which records name it, and the check. It is on the disk before the
first record that names it, so that no crash leaves a name without evidence. A line that was damaged later no longer has
its hash, and what it said is lost; it is written again when the same is found again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, redact
from lorameter.records import bounded_io, codec, journal
from lorameter.records.validation import check_evidence

CHECKS = "checks.jsonl"
HASH_DIGITS = 16


class LostEvidenceError(Exception):
    """A record names evidence that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """One check: one line of checks.jsonl."""

    hash: str
    check: dict[str, Any]


class EvidenceFile:
    """The checks of one run by their hashes; read as far as needed, so that a run that is being written can be read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CHECKS
        self._checks: dict[str, dict[str, Any]] = {}
        self._seen_bytes = 0
        self._damaged = 0

    def add(self, checks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """The hashes of these checks, redacted, as they may repeat an error's text; those that are new are on the disk
        afterwards.

        Raises:
            OSError: the disk refuses.
            UsageError: what is there is no evidence.
        """
        self._look()
        hashed = [(_hash_of(check), check) for check in map(_redacted, checks)]
        new = {name: check for name, check in hashed if name not in self._checks}
        if new:
            journal.append(self._path, "".join(f"{_line_of(name, check)}\n" for name, check in new.items()))
        return tuple(name for name, _ in hashed)

    def find(self, hashes: Sequence[str]) -> tuple[dict[str, Any], ...]:
        """The checks of these hashes.

        Raises:
            LostEvidenceError: one is not there.
            UsageError: the file is there and cannot be read.
        """
        try:
            return tuple([self._checks[name] for name in hashes])
        except KeyError:
            with journal.say_unreadable(self._path):
                self._look()
        try:
            return tuple([self._checks[name] for name in hashes])
        except KeyError as error:
            raise LostEvidenceError(error.args[0]) from None

    def _look(self) -> None:
        """Read what has been added since; a line that has no end yet is left for the next time. Raises `UsageError`
        for one that never ends, and where too many say nothing."""
        if not bounded_io.is_file(self._path) or self._path.stat().st_size == self._seen_bytes:
            return
        try:
            with bounded_io.open_plain(self._path) as file:
                file.seek(self._seen_bytes)
                for line in bounded_io.lines_of(file):
                    if not line.endswith(b"\n"):
                        return
                    self._seen_bytes += len(line)
                    self._damaged += not self._keep(line)
                    journal.refuse_damaged(self._path, self._damaged)
        except bounded_io.NotReadableError as error:
            raise journal.refusal_of(self._path, error) from None

    def _keep(self, line: bytes) -> bool:
        """Whether the line is evidence."""
        try:
            evidence = codec.from_json(CheckRecord, codec.parse(line.decode("utf-8", errors="replace")), CHECKS)
            check_evidence([evidence.check], CHECKS)
        except (codec.NotJsonError, UsageError):
            return False
        if sound := evidence.hash == _hash_of(evidence.check):
            self._checks[evidence.hash] = evidence.check
        return sound


_redact = functools.lru_cache(maxsize=4096)(redact)
"""Checks are nearly the same in all trials."""


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _redact(value)
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _hash_of(check: Mapping[str, Any]) -> str:
    return hashlib.sha256(codec.dumps(check).encode("utf-8", errors="replace")).hexdigest()[:HASH_DIGITS]


def _line_of(name: str, check: Mapping[str, Any]) -> str:
    return f'{{"hash": "{name}", "check": {codec.dumps(check)}}}'
