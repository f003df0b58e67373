"""The lines of trials.jsonl: a record, whose checks are the hashes of evidence in checks.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lorameter.records import codec, journal
from lorameter.records.evidence import EvidenceFile
from lorameter.records.fast_decode import Reader
from lorameter.records.record import SCHEMA, TrialRecord, require_readable
from lorameter.records.validation import check_record, check_tokens

Record = TypeVar("Record", bound=TrialRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRecord(TrialRecord):
    """A `TrialRecord` as it is written: one line of trials.jsonl."""

    checks: tuple[str, ...] = ()  # type: ignore[assignment]  # the evidence itself stands in checks.jsonl


class _Head(msgspec.Struct):
    """What tells which of the two forms a line has."""

    schema: int


class TrialLines:
    """Reads the lines of one run.

    Args:
        evidence: of the run.
        source: its manifest.
        where: names its records in errors.
    """

    def __init__(self, evidence: EvidenceFile, source: Path, where: str) -> None:
        self._evidence, self._source, self._where = evidence, source, where
        self._damaged = 0
        self._head = msgspec.json.Decoder(_Head)
        self._reader = Reader(WrittenRecord, check_record, {"tokens": check_tokens})

    def read(self, line: str) -> TrialRecord:
        """The record of a line, with its evidence.

        Raises:
            codec.NotJsonError: the line was cut short, or is no record but what is left of one.
            LostEvidenceError: what its checks name is not in checks.jsonl.
            UsageError: a record of a schema that is not read, or one that does not keep to its schema; or too many
                lines were damaged.
        """
        try:
            self._check_schema(line)
            written = self._reader.read(line, self._where)
        except codec.NotJsonError:
            self._damaged += 1
            journal.refuse_damaged(self._source.with_name("trials.jsonl"), self._damaged)
            raise
        return _record(TrialRecord, written, self._evidence.find(written.checks))

    def _check_schema(self, line: str) -> None:
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            if self._head.decode(line).schema == SCHEMA:
                return
        if not isinstance(data := codec.parse(line), dict):  # "5}" has lost its beginning, and so may "5" have
            raise codec.NotJsonError("it is no table")
        require_readable(data, self._source)


def line_of(record: TrialRecord, hashes: Sequence[str]) -> str:
    """A record as it is written, its checks named by these hashes."""
    return codec.dumps(_record(WrittenRecord, record, tuple(hashes)).replaced(schema=SCHEMA)) + "\n"


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Meanwhile the collector rests: records hold no cycles, and looking through those of a large run again and again
    takes as long as reading them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


_KEPT = tuple(field.name for field in dataclasses.fields(TrialRecord) if field.name != "checks")
"""What a record and its line have in common; a large run asks for it a hundred thousand times."""


def _record(cls: type[Record], record: TrialRecord, checks: tuple[Any, ...]) -> Record:
    return cls(**{name: getattr(record, name) for name in _KEPT}, checks=checks)
