"""A run in the formats of pages that follow numbers over time.

- github-action-benchmark, `tool: customSmallerIsBetter`: a list of `{name, unit, value, range, extra}`. One file has
  one direction, so what is better when higher is left out.
- Bencher Metric Format (bencher.dev/docs/reference/bencher-metric-format): benchmark → measure → value with its ends.

Such a page keeps every number and knows no verdict, so a run that is not valid is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.results.columns import names_of
from lorameter.results.rows import RANGE, estimate_rows
from lorameter.studies.from_run import read_study
from lorameter.verdicts.compare import default_metrics, matching
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
    if invalid := run_validity(run, study).invalid:
        raise InvalidRunError(
            f"run {run.manifest.run} is invalid: {invalid}. A page of trends would keep its numbers as good ones. "
            "Measure again, or export it as json."
        )
    rows = [dict(zip(names_of("estimates"), row, strict=True)) for row in estimate_rows(run, study)]
    rows = [row for row in rows if row["role"] == "variant" and math.isfinite(row["value"])]
    known = list(dict.fromkeys(row["metric"] for row in rows))
    wanted = matching(known, metrics) if metrics else default_metrics(run.manifest.phases, known)
    if metrics and not wanted:
        raise UsageError(
            f"--metric {' '.join(metrics)}: nothing of that name in run {run.manifest.run}. It has {', '.join(known)}."
        )
    return [row for row in rows if row["metric"] in wanted]


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
