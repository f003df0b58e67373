"""The records of a run on disk, one line of trials.jsonl each; their checks are hashes of lines of checks.jsonl.

The evidence of checks makes up two thirds of a record and is the same in nearly all records, so it is stored once per
run. It is written before the first record that refers to it, so that no crash leaves a hash without evidence. A line
that is damaged later no longer matches its hash: its evidence is lost, and is written again when it recurs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kernels_check.check import Check
from lorameter.errors import UsageError, redact, refused_value, shorten
from lorameter.records import codec, fileio
from lorameter.records.record import SCHEMA, Line, TrialRecord, UnixTime, require_readable

TRIALS, CHECKS = "trials.jsonl", "checks.jsonl"
HASH_DIGITS = 16


Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class StoredRecord(TrialRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record as a line of trials.jsonl."""

    trial: Line
    name: Line
    site: Line = ""
    started_unix_s: UnixTime
    wall_time_s: UnixTime
    checks: tuple[str, ...] = ()  # type: ignore[assignment]  # hashes of the evidence
    tokens: dict[str, bool | int | float | str | list[Token] | None] = msgspec.field(default_factory=dict)


class StoredCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of checks.jsonl."""

    hash: str
    check: dict[str, Any]

    def __post_init__(self) -> None:
        msgspec.convert(self.check, Check)  # its readers use every field


_LISTS = re.compile(r"(base_)?answer_\d+|(cold_)?completion")
"""Keys of a record's tokens that hold a list; all others hold one value."""
_RECORD = msgspec.json.Decoder(StoredRecord, strict=False)
_CHECK = msgspec.json.Decoder(StoredCheck)
_FIELDS = tuple(field.name for field in msgspec.structs.fields(TrialRecord) if field.name != "checks")


class EvidenceFile:
    """The checks of one run by hash."""

    def __init__(self, folder: Path) -> None:
        """Read the checks of a run's folder. Raises `UsageError` if its file exists but cannot be read."""
        self._path = folder / CHECKS
        self._checks: dict[str, dict[str, Any]] = {}
        for line in fileio.journal_lines(self._path):
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
                stored = _CHECK.decode(line)
                if stored.hash == _hash_of(stored.check):
                    self._checks[stored.hash] = stored.check

    def add(self, checks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """The hashes of these checks; new checks are on disk afterwards. Checks are redacted, because they may repeat
        an error's text. Raises OSError if writing failed."""
        hashed = [(_hash_of(check), check) for check in map(_redact_texts, checks)]
        new = {name: check for name, check in hashed if name not in self._checks}
        if new:
            lines = [f'{{"hash": "{name}", "check": {codec.dumps(check)}}}\n' for name, check in new.items()]
            fileio.append(self._path, "".join(lines))
            self._checks |= new
        return tuple(name for name, _ in hashed)

    def find(self, hashes: Sequence[str]) -> tuple[dict[str, Any], ...] | None:
        """The checks with these hashes; None if one of them does not exist."""
        found = tuple(self._checks[name] for name in hashes if name in self._checks)
        return found if len(found) == len(hashes) else None


_redact = functools.lru_cache(maxsize=4096)(redact)
"""Checks are nearly the same in all trials, so redaction is cached."""


def _redact_texts(value: Any) -> Any:
    if isinstance(value, str):
        return _redact(value)
    if isinstance(value, Mapping):
        return {key: _redact_texts(item) for key, item in value.items()}
    return [_redact_texts(item) for item in value] if isinstance(value, (list, tuple)) else value


def _hash_of(check: Mapping[str, Any]) -> str:
    return hashlib.sha256(codec.dumps(check).encode("utf-8", errors="replace")).hexdigest()[:HASH_DIGITS]


def encode_record(record: TrialRecord, hashes: Sequence[str]) -> str:
    """A record as a line of trials.jsonl, with its checks given by these hashes."""
    return codec.dumps({**msgspec.structs.asdict(record), "schema": SCHEMA, "checks": hashes}) + "\n"


def find_fault(record: TrialRecord) -> str | None:
    """Why a record could not be read again after writing; None if it can."""
    try:
        _read_line(encode_record(record, ()), "record", Path())
    except UsageError as error:
        return str(error)
    return None


def read_trials(folder: Path, name: str) -> list[TrialRecord | None]:
    """Read every line of a run's trials.jsonl as a record with its evidence; None for a damaged line, which a crash
    truncated or whose evidence is lost.

    Raises:
        UsageError: a line is not a record of this schema.
    """
    stored: list[StoredRecord | None] = []
    for line in fileio.journal_lines(folder / TRIALS):
        try:
            stored.append(_read_line(line, f"{name}, {TRIALS}", folder / TRIALS))
        except codec.NotReadableError:
            stored.append(None)
    evidence = EvidenceFile(folder)  # read after the records, because it is written before them
    return [None if record is None else _add_checks(record, evidence) for record in stored]


def _add_checks(stored: StoredRecord, evidence: EvidenceFile) -> TrialRecord | None:
    checks = evidence.find(stored.checks)
    fields = {field: getattr(stored, field) for field in _FIELDS}
    return None if checks is None else TrialRecord(checks=checks, **fields)


def _read_line(line: str, where: str, source: Path) -> StoredRecord:
    try:
        record = _RECORD.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        data = codec.parse(line)
        if not isinstance(data, dict):  # a truncated line such as "5" can still be valid JSON
            raise codec.NotReadableError("it is not a JSON object") from None
        require_readable(data, source)
        record = codec.from_json(StoredRecord, data, where)
    if record.schema != SCHEMA:
        require_readable({"schema": record.schema}, source)
    named = f"{where}, trial {shorten(record.trial, 60)}"
    for key, value in record.tokens.items():
        counts = key not in ("real_tokens", "padded_tokens") or (isinstance(value, int) and value >= 0)
        if not counts or isinstance(value, list) != bool(_LISTS.fullmatch(key)):
            raise refused_value(f"{named}, tokens", key, value, "another type is expected", "Restore the file.")
    measured = [record.values.values(), *record.samples.values()] if record.status == "ok" else []
    # A spread is computed from squares.
    if not all(math.isfinite(one * one) for one in (sum(map(abs, numbers)) for numbers in measured)):
        raise UsageError(
            f"{named}: a number in samples or values is not finite, or too large, and the trial is "
            f"{record.status}. Restore the file, or measure again."
        )
    return record


STEPS = "steps.jsonl"


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The addition of a step to the record of its trial."""

    samples: dict[str, float | None] = msgspec.field(default_factory=dict)
    """One value for each sample; None if it was not observed."""
    values: dict[str, float] = msgspec.field(default_factory=dict)
    """Current values of the record."""
    memory: dict[str, int] = msgspec.field(default_factory=dict)
    """Current peaks."""


def encode_step(step: Step) -> bytes:
    """The line of a step. It is written while a training waits, and `codec` would take five times as long. A loss may
    be NaN, which only Python reads; the file is removed when the run has ended."""
    return f"{json.dumps({'samples': step.samples, 'values': step.values, 'memory': step.memory})}\n".encode()


def add_steps(record: TrialRecord, folder: Path) -> TrialRecord:
    """The record with the steps in the folder of its run, each as its own turn. A sample that one step lacks is left
    out for all steps, and so is a truncated line."""
    samples: dict[str, list[float | None]] = {}
    values, memory = dict(record.values), dict(record.memory)
    for line in fileio.journal_lines(folder / STEPS):
        try:
            step = codec.from_json(Step, codec.parse(line), STEPS)
        except (UsageError, codec.NotReadableError):
            break
        for name, value in step.samples.items():
            samples.setdefault(name, []).append(value)
        values |= step.values
        memory |= step.memory
    known = {name: tuple(value for value in column if value is not None) for name, column in samples.items()}
    complete = {name: column for name, column in known.items() if len(column) == len(samples[name])}
    turns = (1,) * len(complete.get("step_time_s", ()))
    return record.replaced(samples=record.samples | complete, turn_lengths=turns, values=values, memory=memory)
