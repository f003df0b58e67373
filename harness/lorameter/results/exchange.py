"""A run in the formats of others that follow numbers over time: trend pages and the log of MLPerf.

- github-action-benchmark, `tool: customSmallerIsBetter`: a list of `{name, unit, value, range, extra}`. One file has
  one direction, so what is better when higher is left out.
- Bencher Metric Format (bencher.dev/docs/reference/bencher-metric-format): benchmark → measure → value with its ends.
- mllog, the lines of MLPerf's logging (github.com/mlcommons/logging): `:::MLLOG {json}`, here of each trial its
  parameters, its losses, and its run from start to stop.

A trend page keeps what it is given for good and knows no verdict, so nothing that is invalid goes there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.results.columns import names_of
from lorameter.results.rows import RANGE, estimate_rows
from lorameter.studies.from_run import read_own_workloads, read_study
from lorameter.studies.study import Study
from lorameter.studies.variant import AnyVariant, LoraVariant, Variant
from lorameter.studies.workload import Workload
from lorameter.verdicts.compare_pairs import default_metrics, matching
from lorameter.verdicts.validity import run_validity


def trend_rows(run: Run, metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The estimates of a run that go to a page of trends, as tables of their columns.

    Args:
        run: a run that is valid as a whole.
        metrics: names or patterns of metrics and kinds of memory; empty for what two runs are compared by.

    Raises:
        InvalidRunError: the run is not valid.
        UsageError: a pattern that nothing goes by.
    """
    study = read_study(run)
    _require_valid(run, study)
    rows = [dict(zip(names_of("estimates"), row, strict=True)) for row in estimate_rows(run, study)]
    rows = [row for row in rows if row["role"] == "variant" and math.isfinite(row["value"])]
    known = list(dict.fromkeys(row["metric"] for row in rows))
    wanted = matching(known, metrics) if metrics else default_metrics(run.manifest.phases, known)
    if metrics and not wanted:
        raise UsageError(
            f"--metric {' '.join(metrics)}: nothing of that name in run {run.manifest.run}. It has {', '.join(known)}."
        )
    return [row for row in rows if row["metric"] in wanted]


def _require_valid(run: Run, study: Study) -> None:
    if invalid := run_validity(run, study).invalid:
        raise InvalidRunError(
            f"run {run.manifest.run} is invalid: {invalid}. A page of trends would keep its numbers as good ones. "
            "Measure again, or export it as json."
        )


def encode_action(run: Run, metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Entries for github-action-benchmark's `customSmallerIsBetter`. Raises as `trend_rows`."""
    return [
        {
            "name": f"{_name(row)}, {row['metric']}",
            "unit": row["unit"],
            "value": row["value"],
            **({} if None in (row["low"], row["high"]) else {"range": f"[{row['low']:.6g}, {row['high']:.6g}]"}),
            "extra": f"run {row['run']}\nfingerprint {row['fingerprint']}\n"
            f"{format_count(row['replicates'], 'replicate')}\n"
            f"range: {row['interval'] or 'none, too few replicates for a 95 % interval'}",
        }
        for row in trend_rows(run, metrics)
        if not row["higher_is_better"]
    ]


def encode_bencher(run: Run, metrics: Sequence[str] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """Bencher Metric Format. Raises as `trend_rows`."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in trend_rows(run, metrics):
        whole = row["low"] is not None and row["high"] is not None and row["interval"] != RANGE
        ends = {"lower_value": row["low"], "upper_value": row["high"]} if whole else {}
        found.setdefault(_name(row), {})[row["metric"]] = {"value": row["value"], **ends}
    return found


def _name(row: dict[str, Any]) -> str:
    side = f", {row['side']}" if row["side"] else ""
    return f"{row['study']}: {row['variant']}{side}"


def mllog_lines(run: Run) -> Iterator[str]:
    """The trials that began, good or bad, one after the other, each as one run of MLPerf's log."""
    study = read_study(run)
    variants = {variant.name: variant for variant in study.variants}
    own = {} if study.of_scripts else read_own_workloads(run)
    yield _line("submission_benchmark", study.name, run.manifest.created_unix_s, {"run": run.manifest.run})
    yield _line("submission_platform", run.manifest.provenance.get("device_name"), run.manifest.created_unix_s)
    for record in run.records:
        if record.status != "not_run":
            workload = None if study.of_scripts else own.get(record.name, study.workload)
            yield from _trial(record, workload, variants.get(record.name))


def _trial(record: TrialRecord, workload: Workload | None, variant: AnyVariant | None) -> Iterator[str]:
    """`workload` is None of a script, which has its own of both."""
    begun, about = record.started_unix_s, {"trial": record.trial, "variant": record.name}
    yield _line("run_start", None, begun, about, event="INTERVAL_START")
    facts: dict[str, Any] = {"seed": record.seed}
    if workload is not None:
        facts |= {"global_batch_size": workload.batch_size, "max_sequence_length": workload.sequence_length}
    if isinstance(variant, Variant):
        facts |= {
            "gradient_accumulation_steps": variant.gradient_accumulation,
            "opt_name": variant.optimizer,
            "opt_base_learning_rate": variant.learning_rate,
            "opt_weight_decay": variant.weight_decay,
        }
    if isinstance(variant, LoraVariant):
        facts |= {"lora_rank": variant.r, "lora_alpha": variant.lora_alpha}
    for key, value in facts.items():
        yield _line(key, value, begun, about)
    for step, loss in enumerate(record.samples.get("timed_loss", ())):
        yield _line("timed_loss", loss, begun, about | {"timed_step": step})
    tracked = {key: record.values[key] for key in ("held_out_loss",) if key in record.values}
    if times := record.samples.get("step_time_s"):
        tracked["step_time_s_median"] = statistics.median(times)
    if tracked:
        yield _line("tracked_stats", tracked, begun + record.wall_time_s, about)
    status = {"status": "success" if record.status == "ok" else "aborted", "ended": record.status}
    yield _line("run_stop", None, begun + record.wall_time_s, about | status, event="INTERVAL_END")


def _line(
    key: str, value: Any, unix_s: float, metadata: dict[str, Any] | None = None, *, event: str = "POINT_IN_TIME"
) -> str:
    """A line of the log. Times are those at which a trial began and ended: no others are known of it."""
    document = {
        "namespace": "lorameter",
        "time_ms": round(1000 * unix_s),
        "event_type": event,
        "key": key,
        "value": codec.to_json(value),
        "metadata": metadata or {},
    }
    return f":::MLLOG {json.dumps(document, allow_nan=False)}\n"
