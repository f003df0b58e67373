"""The JSON documents of the commands, as types: what `--json` prints, which `docs/json.md` lists.

Numbers are in base units, which their names end in: `_s` seconds, `_bytes`, `_j` joules, `_per_s`; a name without one
of these is a ratio, a count or a share. None of them is NaN. Schema 2 has numbers (`values`, `metric`) beside the cells
that schema 1 held as text alone; nothing of schema 1 is missing in it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lorameter.commands.output import SCHEMA
from lorameter.parity.judgement import Mean
from lorameter.records.record import Notice
from lorameter.results.history import Break, History, HistorySeries, Moment, Plateau, Suspicion, Track
from lorameter.results.prune import PruneDecision
from lorameter.run.bisect import Bisection, Candidate, Look
from lorameter.run.memory_fit import Largest, MemoryOption, Needs, SkippedOption
from lorameter.stats import Comparison, Proportion, ShareEstimate
from lorameter.verdicts.ab import Attribution, PhaseEffect
from lorameter.verdicts.claims import Answers, ClaimResult, ClaimsReport, PartResult
from lorameter.verdicts.claims.engines import EngineShown, Shown
from lorameter.verdicts.compare import ComparisonReport, ComparisonRow
from lorameter.verdicts.comparison_input import Difference
from lorameter.verdicts.gate import LimitRule, Policy
from lorameter.verdicts.same_training import LossAgreement
from lorameter.verdicts.validity import Fault, InvalidReason


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
    valid: bool
    invalid: str | None
    """The first few of `faults`; null where the run is valid."""
    faults: list[Fault]
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
    time: TimeOf | None = None
    """Where the run says it: one that was measured here, on one site."""


class ComparisonOf(ComparisonReport, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`compare BASE CANDIDATE --json`."""

    schema: int
    invalid: str | None
    """The first few reasons why verdicts do not count; null where all of them do."""


class GateOf(ComparisonOf, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`gate BASE CANDIDATE --json`, with what a comparison has."""

    exit: int
    passed: bool
    unmet: tuple[str, ...]
    policy: Policy
    """As it was read, with its defaults (docs/reference.md)."""


class ReportOfAB(GateOf, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ab --json`, and `report`, `compare` and `gate` of an A/B run, with what a gate has."""

    run: str
    path: str
    interleaving: str
    attribution: Attribution


class RunOf(msgspec.Struct, forbid_unknown_fields=True):
    """`run STUDY --json`."""

    schema: int
    run: str
    path: str
    status: str
    """ok or invalid."""
    invalid: str | None
    """The first few reasons; null where the run is valid."""
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


class PhaseOf(msgspec.Struct, forbid_unknown_fields=True):
    """One phase: training or generation."""

    kinds: dict[str, int]
    """Bytes by kind; empty where the model's layers are not known."""
    beside: dict[str, int]
    """Bytes that no allocator counts: CUDA's context, and paged optimizer state, which may lie on the host."""
    total_bytes: int | None
    """The peak: of torch's allocator on a GPU, else of the process."""
    measured_bytes: int | None
    """The largest peak of an earlier run of this variant and workload."""
    error: float | None
    """The total over what was measured, less 1."""


class DeviceOf(msgspec.Struct, forbid_unknown_fields=True):
    """Where it is to fit."""

    name: str
    total_bytes: int
    usable_bytes: int
    """What counts: of this machine what is free now, of another GPU what its driver leaves, which is assumed."""
    source: str
    """Where the total is from."""
    assumed: list[str]
    """What was measured on no GPU."""


class ErrorOf(msgspec.Struct, forbid_unknown_fields=True):
    """How far a peak may be from its estimate: peak over estimate, less 1."""

    low: float
    high: float
    basis: str
    """The comparison of peaks and estimates that supports it."""


class FitOf(msgspec.Struct, forbid_unknown_fields=True):
    """Whether it fits."""

    device: DeviceOf
    status: str
    """fits, may-not-fit or does-not-fit: all of the range is within what is usable, a part of it, or nothing."""
    needs: Needs
    """Of the phase that needs most."""
    phases: dict[str, Needs]
    spare_bytes: int
    """Usable less the upper end of what is needed; below zero it is what would lack."""
    error: ErrorOf
    options: list[MemoryOption]
    """What frees most first."""
    skipped: list[SkippedOption]
    turn: list[str] | None
    """The fewest changes with which it fits: empty where it does as it is, null where all are not enough."""
    largest: list[Largest]
    """With `--max-batch`."""


class EstimateOf(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`estimate VARIANT --json`; `profile` and `fit` with `--gpu` or `--max-batch` alone."""

    schema: int
    variant: str
    id: str
    model: str
    device: str
    """cpu or cuda."""
    train: PhaseOf
    generate: PhaseOf
    notices: list[str]
    profile: str | None = None
    """Of the study, that the device takes."""
    fit: FitOf | None = None
    """Null where the model's layers are not known."""


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


class WayOf(msgspec.Struct, forbid_unknown_fields=True):
    """One way of serving the adapter, compared with the reference."""

    way: str
    quantization: str
    """Of its base."""
    dtype: str
    """Of the base weights that are not quantised."""
    adapter: bool
    """false: the base without the adapter, a control."""
    merged: bool
    dequantised: bool
    """Whether the base's quantised weights were turned back into `dtype` first."""
    verdict: str
    """same: no answer differs; noise: some do, no more than the reference's from its own; differ; or failed."""
    answers: Proportion | None
    """Answers that differ in a token; this and what follows is null of a way that failed."""
    first_difference: float | None
    """Place of the first token that differs, from 1, the median; null where none differs."""
    tokens: Proportion | None
    """Positions of the reference's answers at which the likeliest token differs."""
    kl_mean_nats: Mean | None
    kl_max_nats: float | None
    difference_mean: Mean | None
    """Of the logits, absolute."""
    difference_max: float | None
    cosine_mean: Mean | None
    cosine_min: float | None
    held_out_loss: Mean | None
    loss_difference: Mean | None
    """From the reference's, in nats; above 0 is worse."""
    within_floor: bool
    """Whether it is no further from the reference than the reference from itself."""
    failure: str
    """Empty of a way that answered."""


class ParityOf(msgspec.Struct, forbid_unknown_fields=True):
    """`parity VARIANT --json`."""

    schema: int
    path: str
    study: str
    variant: str
    model: str
    device: str
    adapter: str
    """Folder of the adapter that was given; empty where it was trained."""
    training_steps: int | None
    """null of an adapter that was given."""
    reference: str
    """The way that all others are compared with."""
    reference_loss: float
    distinct_answers: int
    """Different answers of the reference; 1 of many prompts makes these hardly more than one."""
    ways: list[WayOf]
    """Besides the two controls: the reference asked again, and the base without the adapter."""
    trouble: str
    """Why no verdict can be relied on; empty where one can."""
    valid: bool
    """Whether every way answered and the controls allow a verdict."""


DOCUMENTS: tuple[type, ...] = (
    ReportOfRun, ComparisonOf, GateOf, ReportOfAB, RunOf, PlanOf, ClaimsOf, EstimateOf, HistoryOf, BisectionOf, RunsOf,
    PrunedOf, PackedOf, ExportedOf, ParityOf,
)  # fmt: skip
"""What commands print as a whole."""
PARTS: tuple[type, ...] = (
    Value, Comparison, Notice, Fault, InvalidReason, VariantOf, TableOf, TimeOf, ComparisonRow, Difference,
    LossAgreement, Attribution,
    PhaseEffect, PartResult, ClaimResult, Answers, ShareEstimate, EngineShown, Shown, PhaseOf, FitOf, Needs, DeviceOf,
    ErrorOf, MemoryOption, SkippedOption, Largest, Track, HistorySeries, Moment, Plateau, Suspicion, Break, Candidate,
    Look, RunListed, PruneDecision, WayOf, Proportion, Mean, Policy, LimitRule,
)  # fmt: skip
"""What they are made of."""


def json_schema() -> dict[str, Any]:
    """The documents as JSON Schema (draft 2020-12), by name."""
    _, components = msgspec.json.schema_components((*DOCUMENTS, *PARTS), ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"schema {SCHEMA}", "$defs": components}
