"""The record of a trial, and the fragments from which it is merged.

Failures are data: every outcome of a trial becomes a record with a status, and a sweep continues. Records contain only
facts: samples and single values as measured; estimates are computed from these on demand and never stored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lorameter.errors import UsageError, redact

SCHEMA = 5
"""Version of the files of a run. A reader refuses all other versions."""

Line = Annotated[str, msgspec.Meta(pattern=r"^[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*\Z")]
"""A name on one line. CI runners read output line by line, and would interpret a second line as a command."""


def require_readable(data: Any, source: Path) -> None:
    """Raise `UsageError` for data from a file of a run that does not follow this schema."""
    if not isinstance(data, dict):
        raise UsageError(f"{source}: {reprlib.repr(data)}: a table is expected. Measure again, or restore the file.")
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"{source}: schema {reprlib.repr(data.get('schema'))}, and this version reads {SCHEMA}. Use the version "
            "that wrote it."
        )


Status = Literal["ok", "invalid", "oom", "timeout", "crashed", "interrupted", "not_run"]
FINAL_STATUSES: tuple[Status, ...] = ("ok", "invalid", "oom", "timeout", "crashed")
"""Final statuses of a trial. The others mean that it was ended from outside, or never began."""
Role = Literal["variant", "control"]
Interleaving = Literal["shared-base", "lockstep", "replicates", "separate"]
Side = Literal["", "base", "candidate"]
"""The side of an A/B to which a trial belongs; empty without sides."""
Measure = Literal["steps", "requests", "open_ended", "merged", "peaks", "cold"]
"""Measurements of a trial: timed training steps with their losses · warm requests of a fixed number of tokens ·
requests until EOS, with their answers · warm requests with the adapter merged · memory peaks, load and first calls,
which need an isolated process · the cold start of its saved adapter."""


class Notice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message for readers of the results, with a remedy. Its texts are redacted."""

    code: str
    message: str
    remedy: str

    def __post_init__(self) -> None:
        _redact(self, "message", "remedy")


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a trial is not ok: the phase, the kind, the message, and the traceback in the child. Its texts are redacted,
    because libraries repeat their inputs."""

    phase: str
    kind: str
    message: str
    traceback: str = ""

    def __post_init__(self) -> None:
        _redact(self, "message", "traceback")


def _redact(instance: Notice | Failure, *names: str) -> None:
    for name in names:
        msgspec.structs.force_setattr(instance, name, redact(getattr(instance, name)))


UNDER_WAY = "UnderWay"
"""Kind of the failure in a record that was written before the end of its trial."""
DISTURBED = "Disturbed"
"""Kind of the failure of a trial that was disturbed so much that its numbers do not count."""


class PartialRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The results that one command adds to a trial; the parent merges fragments, so a later death of the process loses
    nothing.

    `samples` are raw values in the order of measurement, `values` are single values (seconds, tokens a second, loss),
    `memory` contains bytes by kind, `checks` the evidence of kernels_check.
    """

    samples: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    values: dict[str, float] = msgspec.field(default_factory=dict)
    memory: dict[str, int] = msgspec.field(default_factory=dict)
    checks: tuple[dict[str, Any], ...] = ()
    notices: tuple[Notice, ...] = ()
    tokens: dict[str, Any] = msgspec.field(default_factory=dict)
    software: dict[str, str] = msgspec.field(default_factory=dict)
    """Versions of packages, and of `python` and `cuda`, as reported by a script's own process; empty for other trials,
    whose versions are in the run's provenance."""
    failure: Failure | None = None
    status: Status = "ok"

    def failed(self, status: Status, failure: Failure) -> PartialRecord:
        """This fragment with a status and failure."""
        return msgspec.structs.replace(self, status=status, failure=failure)

    def with_notice(self, notice: Notice) -> PartialRecord:
        """This fragment with one more notice."""
        return msgspec.structs.replace(self, notices=(*self.notices, notice))


class TrialRecord(PartialRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trial as measured: one line of trials.jsonl."""

    schema: int = SCHEMA
    trial: str
    status: Status
    name: str
    variant: str
    """Content id of the variant."""
    role: Role
    replicate: int
    position: int
    """Index in the order of the run, from 0."""
    attempt: int = 0
    """Number of earlier measurements of the trial that a disturbance made invalid."""
    interleaving: Interleaving
    """Interleaving with the trials that it is compared with; "replicates" if it was alone in its turn."""
    side: Side = ""
    site: str = ""
    """The site on which it was measured, together with all trials paired with it; empty if there is only one site."""
    machine: str = ""
    """Kind of the site's machine, in a run whose sites may be different machines, which are never combined."""
    seed: int
    started_unix_s: float
    wall_time_s: float
    turn_lengths: tuple[int, ...] = ()
    """Number of timed steps in each turn, in order; they sum to the length of the step samples."""
    log: str = ""
    """Path of the log, relative to the run's directory."""

    @property
    def settled(self) -> bool:
        """Whether the trial ended by itself, with or without success."""
        return self.status in FINAL_STATUSES

    @property
    def under_way(self) -> bool:
        """Whether it was written before the end of its trial."""
        return self.failure is not None and self.failure.kind == UNDER_WAY

    @property
    def disturbed(self) -> bool:
        """Whether the trial is invalid because of a disturbance, not because of itself."""
        return self.failure is not None and self.failure.kind == DISTURBED

    def replaced(self, **changes: Any) -> TrialRecord:
        """This record with some fields replaced."""
        return msgspec.structs.replace(self, **changes)

    def merged(self, fragment: PartialRecord) -> TrialRecord:
        """This record merged with a fragment: samples are appended, other fields are united, and a bad status stays."""
        samples = dict(self.samples)
        for name, values in fragment.samples.items():
            samples[name] = samples.get(name, ()) + values
        return msgspec.structs.replace(
            self,
            status=self.status if self.status != "ok" else fragment.status,
            samples=samples,
            values=self.values | fragment.values,
            memory=self.memory | fragment.memory,
            checks=self.checks + fragment.checks,
            notices=self.notices + fragment.notices,
            tokens=self.tokens | fragment.tokens,
            software=self.software | fragment.software,
            failure=self.failure or fragment.failure,
        )


def find_unmet(checks: Iterable[Mapping[str, Any]], required: Mapping[str, Any]) -> Failure | None:
    """The failure of a step without a required path; a path that was not watched does not pass. None if it has all
    paths.

    Args:
        checks: checks of the judged paths, as plain data.
        required: values by path.
    """
    seen = {str(check["path"]): check for check in checks}
    failed = {
        path: value for path, value in required.items() if path not in seen or seen[path].get("status") != "active"
    }
    if not failed:
        return None
    unseen = "no row of the watched step is about it" if seen else "no step was watched"
    message = "; ".join(
        f"{path}: required {value!r}, {seen[path].get('reason') if path in seen else unseen}"
        for path, value in failed.items()
    )
    kind = "RequiredPathNotSeen" if seen.keys().isdisjoint(failed) else "RequiredPathNotActive"
    return Failure(phase="verify", kind=kind, message=message)


def judge_required(
    fragment: PartialRecord, required: Mapping[str, Any], *, name: str, allow_fallback: bool
) -> PartialRecord:
    """The fragment of a verified trial: invalid if a required path is missing, or with a notice if that is allowed."""
    failure = find_unmet(fragment.checks, required)
    if failure is None:
        return fragment
    if not allow_fallback:
        return fragment.failed("invalid", failure)
    return fragment.with_notice(
        Notice(
            code="fallback-allowed",
            message=f"{name}: measured although not what is required: {failure.message}",
            remedy="Rank it under what really ran, or set allow_fallback = false in the study.",
        )
    )
