"""The JSON documents of the commands that ask of many runs, or hand one out: as types, like those of `documents`."""

from __future__ import annotations

from typing import Any

import msgspec


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """What is known to differ between two runs."""

    field: str
    base: Any
    candidate: Any


class MomentOf(msgspec.Struct, forbid_unknown_fields=True):
    """One run's number, in the unit of its track."""

    run: str
    folder: str
    created_unix_s: float
    value: float
    low: float | None
    high: float | None
    replicates: int
    commit: str | None
    dirty: bool
    versions: dict[str, str | None]
    why_not: str | None
    """Why it does not count; null where it does."""


class PlateauOf(msgspec.Struct, forbid_unknown_fields=True):
    """A level of a line, in the unit of its track."""

    first: MomentOf
    last: MomentOf
    runs: int
    value: float
    low: float | None
    high: float | None


class SuspicionOf(msgspec.Struct, forbid_unknown_fields=True):
    """A change of level, which nobody has confirmed."""

    before: MomentOf
    after: MomentOf
    level_before: float
    level_after: float
    ratio: float
    """The new level over the one before, above 1 is worse, for rates too."""
    low: float
    high: float
    direction: str
    """slower or faster; of what is no time, worse or better."""
    differing: list[Step]
    confirm: str
    """The command that would confirm it; empty where nothing known differs."""


class LineOf(msgspec.Struct, forbid_unknown_fields=True):
    """Runs that may be compared: one fingerprint, one content of the variant."""

    fingerprint: str
    variant_id: str
    moments: list[MomentOf]
    plateaus: list[PlateauOf]
    suspicions: list[SuspicionOf]
    scatter: float | None
    """From run to run, a fraction; null of fewer than 10 that count."""
    detectable: float | None
    """The smallest change that three runs more would show with 80 % power, a fraction."""


class BreakOf(msgspec.Struct, forbid_unknown_fields=True):
    """Where a line begins that may not be compared with what was before."""

    before: MomentOf
    after: MomentOf
    fingerprint_before: str
    fingerprint_after: str
    differing: list[Step]
    confirm: str


class TrackOf(msgspec.Struct, forbid_unknown_fields=True):
    """One metric of one variant of one study."""

    study: str
    variant: str
    metric: str
    unit: str
    """s, byte, 1/s, J or 1."""
    higher_is_better: bool
    lines: list[LineOf]
    breaks: list[BreakOf]


class HistoryOf(msgspec.Struct, forbid_unknown_fields=True):
    """`history --json`."""

    schema: int
    metric: str
    tracks: list[TrackOf]
    unreadable: dict[str, str]


class CandidateOf(msgspec.Struct, forbid_unknown_fields=True):
    """A commit or a release."""

    spec: str
    label: str


class LookOf(msgspec.Struct, forbid_unknown_fields=True):
    """One comparison with the good end."""

    place: int
    """Among the candidates; 0 is the good end."""
    label: str
    side: str
    """slow, fast, open, or not measured."""
    comparison: dict[str, Any]
    """The keys of a ratio."""


class BisectionOf(msgspec.Struct, forbid_unknown_fields=True):
    """`bisect STUDY --json`."""

    schema: int
    looks: list[LookOf]
    before: CandidateOf | None
    culprit: CandidateOf | None
    between: list[CandidateOf]
    """What lies between them and could not be told."""
    ratio: float | None
    """The culprit over the one before it."""
    low: float | None
    high: float | None
    share: float | None
    """Of the whole effect, on the log scale."""
    conclusion: str
    found: bool
    variant: str
    metric: str


class RunListed(msgspec.Struct, forbid_unknown_fields=True):
    """One run of a folder; of one that is damaged the title says why, and more is not known."""

    run: str
    status: str
    """complete, running, killed, interrupted, failed or damaged."""
    size_bytes: int
    title: str
    study: str = ""
    verdict: str = ""
    """valid or invalid; of an A/B its worst verdict."""
    baseline: bool = False
    created_unix_s: float | None = None
    trials: dict[str, int] = {}


class RunsOf(msgspec.Struct, forbid_unknown_fields=True):
    """`list runs --json`."""

    schema: int
    runs: list[RunListed]


class GoneOf(msgspec.Struct, forbid_unknown_fields=True):
    """A run that goes, or stays for a reason."""

    run: str
    path: str
    study: str
    created_unix_s: float
    size_bytes: int
    why: str


class PrunedOf(msgspec.Struct, forbid_unknown_fields=True):
    """`prune --json`."""

    schema: int
    dry_run: bool
    removed: list[GoneOf]
    kept_for_a_reason: list[GoneOf]


class PackedOf(msgspec.Struct, forbid_unknown_fields=True):
    """`pack RUN --json`."""

    schema: int
    file: str
    size_bytes: int
    skipped: list[str]


class ExportedOf(msgspec.Struct, forbid_unknown_fields=True):
    """`export RUN --output PATH --json`; what is exported as json is in docs/results.md."""

    schema: int
    run: str
    files: list[str]


DOCUMENTS: tuple[type[msgspec.Struct], ...] = (HistoryOf, BisectionOf, RunsOf, PrunedOf, PackedOf, ExportedOf)
PARTS: tuple[type[msgspec.Struct], ...] = (
    TrackOf, LineOf, MomentOf, PlateauOf, SuspicionOf, BreakOf, Step, CandidateOf, LookOf, RunListed, GoneOf,
)  # fmt: skip
