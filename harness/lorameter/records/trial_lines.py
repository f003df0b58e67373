"""The lines of trials.jsonl: a record, whose checks are names of evidence in checks.jsonl.

From schema 5 on `checks` is a list of hashes; before it was the list of the checks themselves. Whoever reads a run gets
the checks, whichever schema wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lorameter.errors import UsageError
from lorameter.records import codec, journal
from lorameter.records.evidence import EvidenceFile
from lorameter.records.fast_decode import Reader
from lorameter.records.forward_compat import Left, read_known
from lorameter.records.record import SCHEMA, TrialRecord, require_readable
from lorameter.records.validation import check_evidence, check_finding, check_record, check_tokens

Record = TypeVar("Record", bound=TrialRecord)
FIRST_WITH_HASHES = 5
"""The schema from which on a record names its evidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRecord(TrialRecord):
    """A `TrialRecord` as it is written: one line of trials.jsonl."""

    checks: tuple[str, ...] = ()  # type: ignore[assignment]  # the evidence itself stands in checks.jsonl


class _Head(msgspec.Struct):
    """What tells which of the two forms a line has."""

    schema: int


class UnreadError(Exception):
    """A line of a newer schema does not fit what this version knows."""


class TrialLines:
    """Reads the lines of one run.

    Args:
        evidence: of the run.
        source: its manifest.
        where: names its records in errors.
        newer: whether lines of a newer schema are read as far as they are known.
    """

    def __init__(self, evidence: EvidenceFile, source: Path, where: str, *, newer: bool = False) -> None:
        self._evidence, self._source, self._where, self._newer = evidence, source, where, newer
        self.newest = 0
        """The newest schema that was met."""
        self.left: Left = {}
        """What lines of a newer one say that is not known."""
        self._damaged = 0
        self._head = msgspec.json.Decoder(_Head)
        parts = {"tokens": check_tokens, "checks": check_finding}
        self._plain, self._written = (
            Reader(TrialRecord, _check_plain, parts),
            Reader(WrittenRecord, check_record, parts),
        )

    def read(self, line: str) -> TrialRecord:
        """The record of a line, with its evidence.

        Raises:
            codec.NotJsonError: the line was cut short, or is no record but what is left of one.
            LostEvidenceError: what its checks name is not in checks.jsonl.
            UnreadError: it is of a newer schema and does not fit this one.
            UsageError: a record of a schema that is not read, or one that does not keep to its schema; or too many
                lines were damaged.
        """
        try:
            return self._read(line)
        except (codec.NotJsonError, UnreadError):
            self._damaged += 1
            journal.refuse_damaged(self._source.with_name("trials.jsonl"), self._damaged)
            raise

    def _read(self, line: str) -> TrialRecord:
        schema = self._schema_of(line)
        self.newest = max(self.newest, schema)
        if schema < FIRST_WITH_HASHES:
            return self._plain.read(line, self._where)
        written = self._written.read(line, self._where) if schema <= SCHEMA else self._read_newer(line)
        return _record(TrialRecord, written, self._evidence.find(written.checks))

    def _read_newer(self, line: str) -> WrittenRecord:
        try:
            record = read_known(WrittenRecord, codec.parse(line), "trials.jsonl", self.left)
            check_record(record, "trials.jsonl")
        except UsageError as error:
            raise UnreadError(str(error)) from None
        return record

    def _schema_of(self, line: str) -> int:
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            schema = self._head.decode(line).schema
            return require_readable({"schema": schema}, self._source, newer=self._newer)
        if not isinstance(data := codec.parse(line), dict):  # "5}" has lost its beginning, and so may "5" have
            raise codec.NotJsonError("it is no table")
        return require_readable(data, self._source, newer=self._newer)


def _check_plain(record: TrialRecord, where: str, held: bool) -> None:
    """A record with its evidence in it."""
    if not held:
        check_evidence(record.checks, where)
    check_record(record, where, held)


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
