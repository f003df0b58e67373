"""The JSON documents of the commands, as types: what `--json` prints, which `docs/json.md` lists.

Numbers are in base units, which their names end in: `_s` seconds, `_bytes`, `_j` joules, `_per_s`; a name without one
of these is a ratio, a count or a share. None of them is NaN. Schema 2 has numbers (`values`, `metric`) beside the cells
that schema 1 held as text alone; nothing of schema 1 is missing in it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lorameter.commands import documents_of_estimates, documents_of_many, documents_of_parity
from lorameter.commands.output import SCHEMA
from lorameter.records.record import Notice
from lorameter.stats import Comparison, ShareEstimate
from lorameter.verdicts.claims import ClaimResult, ClaimsReport, PartResult
from lorameter.verdicts.claims.answers import Answers
from lorameter.verdicts.claims.engines import EngineShown
from lorameter.verdicts.claims.proof import Shown
from lorameter.verdicts.comparison_input import Difference


class Value(msgspec.Struct, forbid_unknown_fields=True):
    """A number with its 95 % interval over replicates; of a peak the least and the largest trial."""

    value: float
    low: float | None
    high: float | None


class VariantOf(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a table: one variant."""

    name: str
    reference: bool
    cells: list[str]
    """As text, one a head."""
    ratio: Comparison | None
    values: dict[str, Value]
    """The cells that are numbers, by metric; `peak_memory_bytes`, and `…_p95_s` of a percentile."""


class TableOf(msgspec.Struct, forbid_unknown_fields=True):
    """A phase, or a metric that was asked for."""

    phase: str
    title: str
    metric: str
    """What `ratio` is of."""
    heads: list[str]
    rows: list[VariantOf]
    control: Comparison | None
    """The reference against itself; null where it was not measured."""
    note: str
    alone: bool = False
    """Whether there is nothing to compare with."""
    site: str = ""
    """Of which site alone, where sites are unlike."""


class TimeOf(msgspec.Struct, forbid_unknown_fields=True):
    """What the time of a run went to: of its last invocation, where it was resumed."""

    limit_s: float | None
    """null where minutes were not limited."""
    wall_s: float
    measured_s: dict[str, float]
    """In which something timed was at work, and nothing else: steps, requests, open_ended, merged, cold."""
    measured_share: float
    turns: list[int]
    """That each trial took, by replicate, where minutes were limited."""


class ReportOfRun(msgspec.Struct, forbid_unknown_fields=True):
    """`report RUN --json`, of a run that compares variants."""

    schema: int
    run: str
    path: str
    title: str
    facts: list[str]
    deviations: list[str]
    notes: list[str]
    tables: list[TableOf]
    failures: list[str]
    notices: list[Notice]
    counts: dict[str, int]
    """Trials by status."""
    state: str
    """complete, running, killed, interrupted or failed."""
    valid: bool
    time: TimeOf | None = None
    """Where the run says it: one that was measured here, on one site."""


class ComparedOf(msgspec.Struct, forbid_unknown_fields=True):
    """One metric of one variant on both sides."""

    variant: str
    metric: str
    verdict: str
    ratio: float | None
    low: float | None
    high: float | None
    tolerance: float
    margin: float
    reason: str
    interleaving: str
    """shared-base, lockstep, replicates, or separate: two runs of different times."""
    replicates: int
    replicates_needed: int | None
    mde80: float | None
    site: str = ""
    """On which site, where sites are unlike."""


class ComparisonOf(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`compare BASE CANDIDATE --json`."""

    schema: int
    base: str
    candidate: str
    comparisons: list[ComparedOf]
    control: dict[str, Comparison | None]
    """By phase."""
    differing: list[Difference]
    notices: list[Notice]
    losses: dict[str, dict[str, str]] = {}
    """By variant, whether the losses of both sides agree; where anybody has looked."""


class GateOf(ComparisonOf, forbid_unknown_fields=True, kw_only=True):
    """`gate BASE CANDIDATE --json`, beside what a comparison has."""

    exit: int
    passed: bool
    unmet: list[str]
    policy: dict[str, Any]
    """As it was read, with its defaults (docs/reference.md)."""


class AttributionOf(msgspec.Struct, forbid_unknown_fields=True):
    """What differs between two sides, and the ratio of every metric that both have."""

    packages: dict[str, list[str | None]]
    """Versions in the base and in the candidate."""
    differing: list[Difference]
    parts: list[dict[str, Any]]
    """variant and metric, and the keys of a ratio."""


class ReportOfAB(GateOf, forbid_unknown_fields=True, kw_only=True):
    """`ab --json`, and `report`, `compare` and `gate` of an A/B run, beside what a gate has."""

    run: str
    path: str
    interleaving: str
    attribution: AttributionOf


class RunOf(msgspec.Struct, forbid_unknown_fields=True):
    """`run STUDY --json`."""

    schema: int
    run: str
    path: str
    status: str
    """ok or invalid."""
    control: dict[str, Comparison | None]
    """By phase; by phase and site, as `train on n1`, where sites are unlike."""
    trials: dict[str, int]
    """By status."""
    time: TimeOf | None = None
    """As in `report`."""


class PlanOf(msgspec.Struct, forbid_unknown_fields=True):
    """`run` or `ab` with `--dry-run --json`."""

    schema: int
    order: list[str]
    interleaving: str
    why: str
    seed: int
    time_s: float | None
    time_basis: str
    replicates: int | None
    """That the run is expected to have."""
    skipped: list[str]
    """What the time limit is expected to leave out."""
    half_width: float | None
    """Expected, of the interval of a training ratio; a fraction."""
    noise_basis: str
    time_for_3_percent_s: float | None
    """Until a half-width of 3 % is expected."""
    memory_bytes: int | None
    disk_bytes: int | None
    unknown: str = ""
    data: str = ""


class ClaimsOf(ClaimsReport, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`claims RUN --json`."""

    schema: int


DOCUMENTS: tuple[type[msgspec.Struct], ...] = (
    ReportOfRun, ComparisonOf, GateOf, ReportOfAB, RunOf, PlanOf, ClaimsOf, *documents_of_estimates.DOCUMENTS,
    *documents_of_many.DOCUMENTS, *documents_of_parity.DOCUMENTS,
)  # fmt: skip
"""What commands print as a whole."""
PARTS: tuple[type, ...] = (
    Value, Comparison, Notice, VariantOf, TableOf, TimeOf, ComparedOf, Difference, AttributionOf, PartResult,
    ClaimResult, Answers, ShareEstimate, EngineShown, Shown, *documents_of_estimates.PARTS, *documents_of_many.PARTS,
    *documents_of_parity.PARTS,
)  # fmt: skip
"""What they are made of."""


def json_schema() -> dict[str, Any]:
    """The documents as JSON Schema (draft 2020-12), by name."""
    _, components = msgspec.json.schema_components((*DOCUMENTS, *PARTS), ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"schema {SCHEMA}", "$defs": components}
