"""The report of a run: validity and verdicts, the measurement, a table for each phase, failures and notices.

Facts common to all variants are written once; the statistics behind the verdicts are below the tables. `encode_run`
gives the same content as a JSON document.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorameter.machine.provenance import MAIN_LIBRARIES, power_limit_w
from lorameter.measurements.metrics import MEASUREMENTS, METRICS, PHASE_TITLES, PHASE_WORDS
from lorameter.records import codec
from lorameter.records.store import Run, TimeBreakdown
from lorameter.records.units import first_few, format_count, format_duration, format_percent
from lorameter.report.blocks import (
    Block,
    Collapsible,
    Document,
    Line,
    Section,
    Span,
    collapse_constant_columns,
    list_sections,
    make_invalid_lines,
    to_line,
    to_lines,
    verdict_tone,
)
from lorameter.report.figures import describe_charts
from lorameter.report.phrases import (
    describe_notices,
    describe_request,
    explain_inconclusive,
    format_effect,
    format_verdict,
    metric_title,
    ratio_title,
)
from lorameter.report.run_view import ALL_ACTIVE, PEAK, PhaseTable, RunView, describe_required_paths
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_own_workloads
from lorameter.studies.workload import LOSSES, Workload
from lorameter.verdicts.same_training import describe_threads, library_versions
from lorameter.verdicts.series import describe_machines, is_difference, is_memory, is_mixed
from lorameter.verdicts.validity import is_single_script_run

ESTIMATORS = {
    "ratio": "median of paired turns, else of the trials' medians paired by replicate; above 1 is worse; its interval "
    "is corrected for all variants",
    "estimates": "geometric mean over trials of each trial's median (tokens/s, energy: mean; cold starts: median of "
    "the processes), with 95 % intervals",
}
"""How the numbers of a report are computed from the trials."""
MAX_NAMED = 5
"""Maximum variants of one kind that are named; the table has all of them."""
SOURCES = {"trainer": "a Trainer", "loop": "a loop that names its steps", "optimizer": "updates of an optimizer"}
"""How the steps of a script were recognised."""
_STATES = {
    "running": "under way: a process is measuring it",
    "killed": "its process was killed",
    "interrupted": "stopped by the user",
    "failed": "ended by an error; the logs say which",
}


def describe_run(view: RunView) -> Document:
    """The whole report of a run."""
    run, study, failures = view.run, view.study, view.validity.failures
    facts = (to_line(text, label=label) for label, text in _facts(run, study))
    tables: list[Block] = []
    for table in view.tables:
        control = to_line(f"A/A control: {format_verdict(table.control, table.metric)}")
        notes = () if view.alone else (control,)
        tables.append(collapse_constant_columns(dataclasses.replace(table.table, notes=notes)))
        if table.phase in view.phases:
            tables += describe_charts(view, table)
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    rest = f" ({run.state}): the report shows the trials that have ended."
    incomplete = to_line(Span(text="This run is not complete", tone="alarm"), rest, indented=False)
    return (
        *make_invalid_lines(view.validity.invalid, view.validity.remedy),
        Section(title=study.headline, lines=(*_summary(view), *facts)),
        *tables,
        *list_sections({"Differs from the study as written": study.deviations, "Notes": study.notes}),
        *([Section(title="Trials without a result", lines=to_lines(failures), tone="bad")] if failures else []),
        *describe_notices(view.notices),
        *_statistics(view),
        *_time(run.manifest.spending),
        to_line(f"Trials: {counted}. Run {run.manifest.run} in {run.path}", indented=False),
        *([] if run.state == "complete" else [incomplete]),
    )


def _summary(view: RunView) -> Iterator[Line]:
    """The summary: whether the run is valid, the verdicts on time, memory and loss, and whether the required paths were
    active. A terminal repeats it below the report."""
    lines = [line for table in (*view.tables, *view.outcomes) for line in _verdicts(table)]
    yield from (dataclasses.replace(line, last=True) for line in (_validity(view), *lines, *_paths(view)))


def _validity(view: RunView) -> Line:
    total = sum(view.counts.values())
    trials = ", ".join(f"{count} of {total} trials {status}" for status, count in view.counts.items())
    controls = [f"{_label(table)} {table.control.verdict}" for table in view.tables if table.control is not None]
    if not view.valid:
        return to_line(Span(text="no", tone="alarm"), f": {trials}; the first line says why", label="valid")
    return to_line(f"yes: {trials}{'; A/A control: ' if controls else ''}{', '.join(controls)}", label="valid")


def _verdicts(table: PhaseTable) -> Iterator[Line]:
    """The verdicts of a table in one line: which variants differ and by how much, and which are equivalent,
    inconclusive or invalid."""
    differing = [(name, ratio) for name, ratio in table.ratios.items() if is_difference(ratio)]
    if len(differing) > MAX_NAMED:
        differing.sort(key=lambda one: -abs(math.log(one[1].ratio or 1.0)))
    spans: list[Span] = []
    for name, ratio in differing[:MAX_NAMED]:
        effect, interval = format_effect(ratio, table.metric)
        spans += [Span(text=", " if spans else ""), Span(text=name, tone="strong")]
        spans.append(Span(text=f" {effect}", tone=verdict_tone(ratio.verdict)))
        spans += [Span(text=interval, tone="faint")] if interval else []
    if len(differing) > MAX_NAMED:
        spans.append(Span(text=f" and {len(differing) - MAX_NAMED} more"))
    for verdict in ("equivalent", "inconclusive", "invalid"):
        if names := [name for name, ratio in table.ratios.items() if ratio.verdict == verdict]:
            spans += [Span(text="; " if spans else ""), Span(text=f"{verdict}: ", tone=verdict_tone(verdict))]
            spans.append(Span(text=first_few(names, MAX_NAMED)))
    reasons = {(one.verdict, one.reason) for one in table.ratios.values()}
    if len(reasons) == 1 and _label(table) == "loss":
        spans = [Span(text=reason) for verdict, reason in reasons if verdict == "inconclusive"] or spans
    if spans:
        yield to_line(*spans, label=_label(table))


def _paths(view: RunView) -> Iterator[Line]:
    """Whether the required paths were active, if the run has checks."""
    statuses = [
        (name, describe_required_paths(series))
        for table in view.tables
        if table.phase in view.phases
        for name, series in table.series.items()
    ]
    missed = dict.fromkeys(f"{name}: {text}" for name, text in statuses if text != ALL_ACTIVE)
    if missed:
        yield to_line(Span(text=first_few(list(missed), MAX_NAMED, "; "), tone="bad"), label="checks")
    elif statuses:
        yield to_line("all required paths active", label="checks")


def _label(table: PhaseTable) -> str:
    """The label of a table in the summary."""
    if is_memory(table.metric):
        return "memory"
    if METRICS[table.metric].is_loss:
        return "loss"
    whole = table.table.title == PHASE_TITLES[table.phase]
    return table.site or (PHASE_WORDS[table.phase] if whole else metric_title(table.metric))


def _statistics(view: RunView) -> Iterator[Block]:
    """Advice on inconclusive verdicts and the estimators; the reason of each verdict is collapsed."""
    tables = () if view.alone else (*view.tables, *view.outcomes)
    reasons = [
        to_line(f"{ratio_title(table.metric)}, {name}: ", Span(text=one.reason, tone="faint"))
        for table in tables
        for name, one in {"A/A control": table.control, **table.ratios}.items()
        if one is not None and one.verdict != "invalid"
    ]
    advice = [
        to_line(
            Span(text=f"{name}, {ratio_title(table.metric)}", tone="warning"),
            f": {explain_inconclusive(one, table.metric)}",
            label="inconclusive",
        )
        for table in tables
        for name, one in table.ratios.items()
        if one.verdict == "inconclusive"
    ]
    lines, more = [*advice[:MAX_NAMED], *_estimators(tables)], (*advice[MAX_NAMED:], *reasons)
    if lines:
        yield Section(title="Statistics", lines=tuple(lines))
    if more:
        yield Collapsible(summary=to_line(Span(text="what each verdict rests on", tone="faint")), lines=more)


def _estimators(tables: Sequence[PhaseTable]) -> Iterator[Line]:
    """How ratios (of pairs) and estimates (of one variant) are computed."""
    if any(not is_memory(table.metric) for table in tables):
        yield from (to_line(text, label=label) for label, text in ESTIMATORS.items())
    keys = {head.key for table in tables for head in table.table.heads}
    if PEAK in keys or any(is_memory(key) for key in keys):
        notes = dict.fromkeys(table.note for table in tables if table.note)
        yield to_line("; ".join(["the largest of the trials, with the least and the largest", *notes]), label="memory")


def _time(spending: TimeBreakdown | None) -> Iterator[Section]:
    """The time spent on each part of a run; empty if the run has not recorded it."""
    if spending is None:
        return
    of_limit = "" if spending.limit_s is None else f" of {format_duration(spending.limit_s)}"
    measured = {MEASUREMENTS[part].title: took for part, took in spending.measured_s.items() if part in MEASUREMENTS}
    parts = ", ".join(f"{part} {format_duration(took)}" for part, took in measured.items())
    share = f"{format_percent(spending.share)} of it measurement{': ' if parts else ''}{parts}"
    yield Section(title="Time", lines=to_lines([f"{format_duration(spending.wall_s)}{of_limit}, {share}"]))


def _facts(run: Run, study: Study) -> Iterator[tuple[str, str]]:
    """The facts of a run, each with its label."""
    manifest, protocol, provenance = run.manifest, study.protocol, run.manifest.provenance
    device, name = (provenance.get(key, "unknown") for key in ("device", "device_name"))
    name = describe_machines(run.records) if is_mixed(run) else name
    limit, default = (power_limit_w(provenance, which) for which in ("power_limit_w", "default_power_limit_w"))
    power = "" if limit is None else f", power limit {limit} W{'' if default is None else f' of {default} W'}"
    yield "device", f"{name} ({device}, {describe_threads(provenance, run.records)}){power}"
    reported, git = library_versions(provenance, run.records), provenance.get("git", {})
    versions = ", ".join(f"{library} {reported.get(library)}" for library in MAIN_LIBRARIES)
    changes = " with local changes" if git.get("dirty") else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git.get("commit") else "no repository"
    if study.dtype:
        yield "dtype", study.dtype
    yield "software", f"{versions}, Python {reported['python'] or 'unknown'}; {commit}"
    if study.supports("workload"):
        yield "workload", _workload(study.workload, str(manifest.tokens.get("data", study.workload.data)))
        yield "tokens", _tokens(manifest.tokens)
    else:
        yield from ((study.form.key, text) for text in _summaries(run, study))
    for name, workload in read_own_workloads(run).items():
        pairs = ((field.name, getattr(workload, field.name)) for field in dataclasses.fields(workload))
        changed = ", ".join(f"{key} = {value}" for key, value in pairs if value != getattr(study.workload, key))
        yield "own", f"{name} has {changed}; {_tokens(manifest.tokens.get('own', {}).get(name, {}))}"
    unit, planned, sample = "timed step", protocol.turns * protocol.steps_per_turn, "step_time_s"
    if not study.form.trains():
        unit, planned, sample = "timed request", protocol.generate_requests, "request_time_s"
    timed = {len(record.samples.get(sample, ())) for record in run.records if record.status == "ok"} - {0}
    timed = timed or {planned}
    least = f"{min(timed)} to " if len(timed) > 1 else ""  # a time limit changes the steps of a replicate
    steps = f"{least}{format_count(max(timed), unit)}"
    trained = sorted({int(one.values["training_steps"]) for one in run.records if "training_steps" in one.values})
    of = f" of {' to '.join(map(str, dict.fromkeys((trained[0], trained[-1]))))} trained" if trained else ""
    yield "plan", f"{_replicates(run)}, {steps}{of} a trial, order seed {manifest.seed}"
    isolated = any(record.interleaving != manifest.interleaving for record in run.records)
    why = f": {manifest.why}" if manifest.why else ""
    exceptions = "; peaks and what needs its own base: isolated trials" if isolated else ""
    yield "level", f"{manifest.interleaving}{why}{exceptions}"
    if manifest.stopped:
        yield "stopped", manifest.stopped
    if run.state != "complete":
        ended = f"{sum(record.settled for record in run.records)} of {len(manifest.order)} trials have ended"
        resumable = run.state != "running" and not is_single_script_run(run, study)
        resume = f". Resume: lorameter run --resume {manifest.run}" if resumable else ""
        yield "status", f"{_STATES[run.state]}; {ended}{resume}"
    if manifest.resumed:
        times = (time.strftime("%Y-%m-%d %H:%M", time.localtime(one.unix_s)) for one in manifest.resumed)
        yield "resumed", ", ".join(times)


def _workload(workload: Workload, data: str) -> str:
    ranks = ""
    if workload.ranks > 1:
        repair_note = f", bitsandbytes mended: {workload.repair}" if workload.repair else ""
        ranks = f", by {workload.ranks} ranks ({workload.strategy}{repair_note})"
    loss = "" if workload.loss == "all" else f", {LOSSES[workload.loss]}"
    adapters = "" if workload.adapters == 1 else f" by {workload.adapters} adapters on one base"
    return (
        f"{workload.model}; {data}; {workload.batch_size} × {workload.sequence_length} tokens a batch, "
        f"{workload.layout}{ranks}{loss}; {describe_request(workload)} tokens a request{adapters}"
    )


def _tokens(tokens: Mapping[str, Any]) -> str:
    loss = f", loss over {tokens['loss_tokens']}" if "loss_tokens" in tokens else ""
    if without := tokens.get("without_loss"):
        loss += f" ({format_count(without, 'sequence')} without a label left out)"
    real, padded = tokens.get("real_tokens", 0), tokens.get("padded_tokens", 0)
    return f"{real} real and {padded} padded in an epoch{loss}, hash {str(tokens.get('hash', ''))[:12]}"


def _replicates(run: Run) -> str:
    """The replicates of a run; for an incomplete run, those whose trials have all ended."""
    planned = run.manifest.order or [record.trial for record in run.records]
    settled = {record.trial for record in run.records if record.settled}
    replicates = {trial.partition("-")[0] for trial in planned}
    pending = {trial.partition("-")[0] for trial in planned if trial not in settled}
    if not pending:
        return format_count(len(replicates), "replicate")
    return f"{len(replicates) - len(pending)} of {len(replicates)} replicates complete"


def _summaries(run: Run, study: Study) -> Iterator[str]:
    """What each variant runs, how its steps were recognised, and their number."""
    for variant in study.variants:
        begun = [one for one in run.records if one.name == variant.name and "source" in one.tokens]
        sources = sorted({SOURCES.get(str(one.tokens["source"]), str(one.tokens["source"])) for one in begun})
        counts = sorted({int(one.values["training_steps"]) for one in begun if "training_steps" in one.values})
        recognised = f"; steps seen by {' and '.join(sources)}" if sources else ""
        steps = f", {' or '.join(map(str, counts))} steps a trial" if counts else ""
        yield f"{variant.name}: {variant.summary}{recognised}{steps}"


def encode_run(view: RunView) -> dict[str, Any]:
    """The report as JSON data, without its `schema`."""
    return {
        "run": view.run.manifest.run,
        "valid": view.valid,
        "invalid": view.validity.invalid,
        "faults": codec.to_json(view.validity.faults),
        "path": str(view.run.path),
        "title": view.study.headline,
        "facts": [f"{label:<10}{text}" for label, text in _facts(view.run, view.study)],
        "deviations": list(view.study.deviations),
        "notes": list(view.study.notes),
        "tables": [_encode_table(table) | ({"alone": True} if view.alone else {}) for table in view.tables],
        "outcomes": [_encode_table(table) for table in view.outcomes],
        "failures": list(view.validity.failures),
        "notices": codec.to_json(view.notices),
        "counts": view.counts,
        "state": view.run.state,
        **encode_spending(view.run.manifest.spending),
    }


def encode_spending(spending: TimeBreakdown | None) -> dict[str, Any]:
    """The time spent on each part of a run, under `time`; empty if the run has not recorded it."""
    return {} if spending is None else {"time": codec.to_json(spending) | {"measured_share": spending.share}}


def _encode_table(table: PhaseTable) -> dict[str, Any]:
    """A table as JSON: each cell as a line of text and, if it is a number, also as numbers in base units."""
    heads = table.table.heads
    rows = [
        {
            "name": row.cells[0].text,
            "reference": row.strong,
            "cells": [cell.line for cell in row.cells],
            "ratio": codec.to_json(table.ratios.get(row.cells[0].text)),
            "values": {
                head.key: {"value": cell.value, "low": cell.low, "high": cell.high}
                for head, cell in zip(heads, row.cells, strict=True)
                if cell.value is not None and head.key != "ratio"
            },
        }
        for row in table.table.rows
    ]
    return {
        "phase": table.phase,
        "title": table.table.title,
        "metric": table.metric,
        "heads": [head.text for head in heads],
        "rows": rows,
        "control": codec.to_json(table.control),
        "note": table.note,
        **({"site": table.site} if table.site else {}),
    }
