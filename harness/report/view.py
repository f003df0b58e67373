"""The view model of a run: what every renderer shows, decided once.

A table for each phase, the control that says what no difference looks like here, the notices with their remedies. No
number without its interval; a trial that is not ok is named with its status and reason, and is in no estimate.
`encode_run` writes the view as the JSON document that programs read, cells as one line of text each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.machine.provenance import power_limit_w
from harness.records import codec
from harness.records.metrics import BIRTH, METRICS, PEAKS, PHASE_TITLES, Phase, columns_of
from harness.records.record import Notice
from harness.records.store import Run
from harness.records.units import format_bytes
from harness.report.progress import replicates_said, standing
from harness.report.scripts import describe_scripts
from harness.report.table import Cell, write_ratio, write_value
from harness.stats import Comparison
from harness.studies.study import Study
from harness.studies.workload import LOSSES, Workload
from harness.verdicts.notices import notices_of
from harness.verdicts.sameness import sides_of_run
from harness.verdicts.series import Groups, Series, series_of
from harness.verdicts.standing import Standing, followed_alone, ratios_of, standing_of

TAIL = 0.95
"""The high percentile of warm requests that is shown where the samples support it."""
"""What a trial's process holds before it does anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """One variant in one phase."""

    name: str
    reference: bool
    cells: tuple[Cell, ...]
    ratio: Comparison | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTable:
    """One phase: heads of the columns and a row a variant."""

    phase: Phase
    title: str
    heads: tuple[str, ...]
    rows: tuple[VariantRow, ...]
    control: Comparison | None
    """The reference against itself measured twice."""
    note: str = ""
    """What a reader of the peaks must know; empty where there is nothing."""
    alone: bool = field(default=False, metadata=codec.LATER)
    """Whether there is nothing that could be compared: one training, which was followed where it took place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that a report says of a run."""

    run: str
    path: str
    title: str
    facts: tuple[str, ...]
    deviations: tuple[str, ...]
    """What differs from the study as it is written."""
    notes: tuple[str, ...]
    """What the study says of itself."""
    tables: tuple[PhaseTable, ...]
    failures: tuple[str, ...]
    notices: tuple[Notice, ...]
    counts: dict[str, int]
    state: str
    """How the run stands: complete, running, killed, interrupted or failed."""
    valid: bool
    """False when a trial is not ok or a control came out as a difference."""


def view_of(run: Run) -> RunView:
    """The view of a run. Raises nothing for missing trials: what is not there is said."""
    study = codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")
    groups = series_of(run.records)
    stands = standing_of(run, study)
    return RunView(
        run=run.manifest.run,
        path=str(run.path),
        title=study.title,
        facts=_facts(run, study),
        deviations=study.deviations,
        notes=study.notes,
        tables=tuple(_table(phase, run, study, groups, stands) for phase in stands.controls),
        failures=stands.failures,
        notices=notices_of(run, study, stands.controls),
        counts=dict(Counter(record.status for record in run.records)),
        state=run.state,
        valid=stands.valid,
    )


def encode_run(view: RunView) -> dict[str, Any]:
    """The view as JSON data, without its `schema`."""
    data: dict[str, Any] = codec.to_json(view)
    for written, table in zip(data["tables"], view.tables, strict=True):
        for row, shown in zip(written["rows"], table.rows, strict=True):
            row["cells"] = [cell.line for cell in shown.cells]
    return data


def _table(phase: Phase, run: Run, study: Study, groups: Groups, stands: Standing) -> PhaseTable:
    metric, control = stands.primary[phase], stands.controls[phase]
    names = [variant.name for variant in study.variants if (variant.name, "variant") in groups]
    shown = [groups[(name, "variant")] for name in names]
    asked = columns_of(phase, own_workloads=bool(run.manifest.own_workloads))
    if study.of_scripts and any(sides.tokens_differ for sides in sides_of_run(run, study).values()):
        asked += ("time_per_real_token_s",)
    columns = tuple(column for column in asked if any(series.trials(column) for series in shown))
    tails = [_tail(series, metric) for series in shown] if phase == "generate" else []
    tailed = any(tail is not None for tail in tails)
    alone = followed_alone(run, study)
    heads: tuple[str, ...] = ("variant", METRICS[metric].title, *([] if alone else [f"× {study.reference}"]))
    heads += tuple(METRICS[name].title for name in columns)
    heads += (f"p{100 * TAIL:g}",) if tailed else ()
    heads += (*(("peak memory",) if PEAKS[phase] else ()), "checks")
    ratios = ratios_of(groups, study, metric, control)
    rows = []
    for index, (name, series) in enumerate(zip(names, shown, strict=True)):
        ratio, reference = ratios.get(name), name == study.reference
        cells = [Cell(text=name), _estimate(series, metric)]
        cells += [] if alone else [_ratio(ratio, is_reference=reference)]
        cells += [_estimate(series, column) for column in columns]
        cells += [tails[index] or Cell(text="not supported")] if tailed else []
        cells += [_peak(series, phase)] if PEAKS[phase] else []
        cells.append(Cell(text=_checks(series)))
        rows.append(VariantRow(name=name, reference=reference, cells=tuple(cells), ratio=ratio))
    return PhaseTable(
        phase=phase,
        title=PHASE_TITLES[phase],
        heads=heads,
        rows=tuple(rows),
        control=control,
        note=_at_birth(shown, phase),
        alone=alone,
    )


def _tail(series: Series, metric: str) -> Cell | None:
    """A high percentile; None where the samples do not support it."""
    tail = series.percentile(metric, TAIL)
    if tail is None or tail.value is None:
        return None
    return write_value(tail.value, tail.low, tail.high, METRICS[metric].unit)


def _estimate(series: Series, metric: str) -> Cell:
    estimate = series.estimate(metric)
    if estimate is None or estimate.value is None:
        return Cell(text="–")
    return write_value(estimate.value, estimate.low, estimate.high, METRICS[metric].unit)


def _ratio(ratio: Comparison | None, *, is_reference: bool) -> Cell:
    if is_reference:
        return Cell(text="reference")
    if ratio is None:
        return Cell(text="–")
    return write_ratio(ratio, verdict=ratio.verdict)


def _peak(series: Series, phase: Phase) -> Cell:
    """The largest peak, with the smallest and the largest in the place of an interval."""
    kind, peaks = _peaks(series, phase)
    if not peaks:
        return Cell(text="–")
    where = "GPU" if kind.startswith("device") else "host"
    return write_value(max(peaks), min(peaks), max(peaks), "byte", detail=where)


def _peaks(series: Series, phase: Phase) -> tuple[str, list[int]]:
    """The kind of memory whose peaks stand for a phase, and one of each trial that has them."""
    for kind in PEAKS[phase]:
        if peaks := [record.memory[kind] for record in series.ok if kind in record.memory]:
            return kind, peaks
    return "", []


def _at_birth(shown: Iterable[Series], phase: Phase) -> str:
    """How much of the host's peaks each process had before it did anything: a fork maps what its zygote imported."""
    on_host = [series for series in shown if _peaks(series, phase)[0].startswith("host")]
    births = [record.memory[BIRTH] for series in on_host for record in series.ok if BIRTH in record.memory]
    if not births:
        return ""
    low, high = format_bytes(min(births)), format_bytes(max(births))
    return f"host peaks include {high if low == high else f'{low} to {high}'} with which each process begins"


def _checks(series: Series) -> str:
    required = [
        (check["path"], check["status"])
        for record in series.records
        for check in record.checks
        if check["required"] is not None
    ]
    if not required:
        return "nothing required" if any(record.checks for record in series.records) else "not checked"
    failed = sorted({f"{path} {status}" for path, status in required if status != "active"})
    paths = len({path for path, _ in required})
    return ", ".join(failed) if failed else f"{paths} of {paths} active"


_NAMED = ("device", "device_name", "threads", "python")


def _facts(run: Run, study: Study) -> tuple[str, ...]:
    provenance, workload, protocol = run.manifest.provenance, study.workload, study.protocol
    tokens, git = run.manifest.tokens, provenance.get("git", {})
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {provenance.get('libraries', {}).get(name)}" for name in libraries)
    changes = " with local changes" if git.get("dirty") else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git.get("commit") else "no repository"
    device, name, threads, python = (provenance.get(key, "unknown") for key in _NAMED)
    plural = "s" if threads != 1 else ""
    of_what = (
        [*describe_scripts(run, study)]
        if study.of_scripts
        else [
            f"workload  {workload.model}; {tokens.get('data', workload.data)}; "
            f"{workload.batch_size} × {workload.sequence_length} tokens a batch, {workload.layout}{_ranks_of(workload)}"
            f"{'' if workload.loss == 'all' else f', {LOSSES[workload.loss]}'}; "
            f"{workload.prompt_tokens} + {workload.new_tokens} tokens a request",
            f"tokens    {_tokens(tokens)}",
        ]
    )
    return (
        f"device    {name} ({device}, {threads} thread{plural}){_power_limit(provenance)}",
        f"software  {versions}, Python {python}; {commit}",
        *of_what,
        *_own_workloads(run, study),
        f"plan      {replicates_said(run)}, {protocol.turns * protocol.steps_per_turn} timed steps a trial, "
        f"order seed {run.manifest.seed}",
        f"level     {run.manifest.interleaving}{_level(run)}",
        *([f"stopped   {run.manifest.stopped}"] if run.manifest.stopped else []),
        *standing(run, study),
    )


def _power_limit(provenance: Mapping[str, Any]) -> str:
    """Of a card: what it is, and what it is by default; nothing on a CPU and of runs that did not record it."""
    limit, default = (power_limit_w(provenance, which) for which in ("power_limit_w", "default_power_limit_w"))
    if limit is None:
        return ""
    return f", power limit {limit} W" + ("" if default is None else f" of {default} W")


def _tokens(tokens: Mapping[str, Any]) -> str:
    real, padded = tokens.get("real_tokens", 0), tokens.get("padded_tokens", 0)
    loss = f", loss over {tokens['loss_tokens']}" if "loss_tokens" in tokens else ""
    loss += f" ({tokens['without_loss']} sequences without a label left out)" if tokens.get("without_loss") else ""
    return f"{real} real and {padded} padded in an epoch{loss}, hash {str(tokens.get('hash', ''))[:12]}"


def _own_workloads(run: Run, study: Study) -> Iterator[str]:
    """What variants are measured on that are not measured on the study's workload."""
    tokens = run.manifest.tokens.get("own", {})
    found = codec.from_json(dict[str, Workload], run.manifest.own_workloads, f"run {run.manifest.run}")
    for name, workload in found.items():
        pairs = ((field.name, getattr(workload, field.name)) for field in dataclasses.fields(workload))
        changes = ", ".join(f"{key} = {value}" for key, value in pairs if value != getattr(study.workload, key))
        yield f"own       {name} has {changes}; {_tokens(tokens.get(name, {}))}"


def _level(run: Run) -> str:
    """Why this level, and what was measured outside it."""
    why = f": {run.manifest.why}" if run.manifest.why else ""
    solo = any(record.interleaving != run.manifest.interleaving for record in run.records)
    return f"{why}; peaks, cold starts and what needs its own base: solo trials" if solo else why


def _ranks_of(workload: Workload) -> str:
    """Who shares a batch, where more than one rank does."""
    if workload.ranks == 1:
        return ""
    mended = f", bitsandbytes mended: {workload.repair}" if workload.repair else ""
    return f", by {workload.ranks} ranks ({workload.strategy}{mended})"
