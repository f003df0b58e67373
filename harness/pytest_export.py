"""What pytest-benchmark's files have no field for: enough to compare two of them as well as the runs themselves.

Trial boundaries make the raw samples replicates again. The control and the failures are written down too, because a
file in which a failed variant is merely absent would hide it.
"""

from __future__ import annotations

import statistics
from typing import Any

from harness.agreement import fact_differences
from harness.records import codec
from harness.records.store import Run
from harness.records.units import METRICS
from harness.studies.study import Study
from harness.verdicts.comparand import comparand_of
from harness.verdicts.series import Series, samples_of


def extra_info(run: Run, series: Series, phase: str, metric: str) -> dict[str, Any]:
    """What stands beside the samples of one test: trial boundaries, other metrics of the phase, memory, checks."""
    measured = [name for name, item in METRICS.items() if item.phase == phase and series.measuring(name)]
    trials = series.measuring(metric)
    last = trials[-1]
    checked = [record for record in series.ok if record.checks]
    kinds = dict.fromkeys(kind for record in series.ok for kind in record.memory)
    return {
        "run": run.manifest.run,
        "name": series.name,
        "variant": last.variant,
        "metric": metric,
        "interleaving": last.interleaving,
        "trials": [
            {
                "trial": record.trial,
                "replicate": record.replicate,
                "samples": len(samples_of(record, metric)),
                "turn_lengths": list(record.turn_lengths) if phase == "train" else [],
            }
            for record in trials
        ],
        "medians": {
            name: [statistics.median(samples_of(record, name)) for record in series.measuring(name)]
            for name in measured
            if name != metric
        },
        "estimates": {name: codec.to_json(series.estimate(name)) for name in measured},
        "memory": {kind: max(record.memory.get(kind, 0) for record in series.ok) for kind in kinds},
        "checks": [codec.to_json(check) for check in checked[-1].checks] if checked else [],
        "tokens_hash": last.tokens.get("hash"),
    }


def unlike(study: Study, ours: dict[str, Any], theirs: dict[str, Any], benchmarks: list[dict[str, Any]]) -> list[str]:
    """What differs between this session and a saved file, as far as two runs must agree to stand beside each other."""
    different = [
        f"{difference.field}: {difference.base!r} saved, {difference.candidate!r} now"
        for difference in fact_differences(codec.to_json(theirs), codec.to_json(ours))
    ]
    variants = {variant.name: variant.id for variant in study.variants}
    for bench in benchmarks:
        name, saved = bench.get("param"), bench["extra_info"].get("variant")
        if name in variants and saved != variants[name]:
            different.append(f"variant {name}: {saved} saved, {variants[name]} now")
    return different


def about_run(run: Run) -> dict[str, Any]:
    """What stands once in a file: the run, its fingerprint and variants, its control, and what does not count."""
    side = comparand_of(run)
    return {
        "schema": run.manifest.schema,
        "run": run.manifest.run,
        "fingerprint": run.manifest.fingerprint,
        "study": side.study,
        "variants": [codec.to_json(measured.variant) for measured in side.sides.values() if measured.variant],
        "control": codec.to_json(side.control),
        "invalid": side.broken,
        "failed": {name: measured.broken for name, measured in side.sides.items() if measured.broken},
    }
