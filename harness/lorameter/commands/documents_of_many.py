"""The JSON documents of the commands that ask of many runs, or hand one out: as types, like those of `documents`."""

from __future__ import annotations

import msgspec

from lorameter.results.history import Break, History, HistorySeries, Moment, Plateau, Suspicion, Track
from lorameter.results.prune import PruneDecision
from lorameter.run.bisect import Bisection, Candidate, Look


class HistoryOf(History, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`history --json`."""

    schema: int


class BisectionOf(Bisection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`bisect STUDY --json`."""

    schema: int
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


class PrunedOf(msgspec.Struct, forbid_unknown_fields=True):
    """`prune --json`."""

    schema: int
    dry_run: bool
    removed: list[PruneDecision]
    kept_for_a_reason: list[PruneDecision]


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
PARTS: tuple[type, ...] = (
    Track, HistorySeries, Moment, Plateau, Suspicion, Break, Candidate, Look, RunListed, PruneDecision,
)  # fmt: skip
