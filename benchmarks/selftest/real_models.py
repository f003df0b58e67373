"""Measures real models within a time limit: six variants of SmolLM2-135M in 8 minutes, of Gemma 3 270M in 15.

    python benchmarks/selftest/real_models.py [--only smollm2|gemma3]

The variants are ranks 8 and 64 and DoRA, on a 16-bit and a 4-bit base; `lorameter run --max-minutes` measures them on
two idle cores. Fetch smollm2-135m first; $LORAMETER_GEMMA names a GGUF file of Gemma 3 270M, without which that model
is skipped.

Bounds: the limit is exceeded by at most 10 %, or by one timed round of all measurements; at least five replicates are
complete; the 95 % interval of every ratio of step times is at most ± 5 %; at least 60 % of the time is measurement.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared import print_origin, report_violations, run_lorameter

from lorameter.records import store
from lorameter.records.units import format_duration
from lorameter.report.run_view import make_run_view
from lorameter.stats import relative_half_width
from lorameter.verdicts.series import compare_series, group_trials

MIN_REPLICATES, MIN_MEASURED_SHARE, MAX_OVERRUN_SHARE, MAX_HALF_WIDTH = 5, 0.6, 0.1, 0.05
MINUTES = {"smollm2": 8, "gemma3": 15}
BASES = {"bf16": "", "nf4": 'quantization = "nf4"'}
ADAPTERS = {"r8": "r = 8", "r64": "r = 64", "dora": "r = 8\nuse_dora = true"}


def format_study(model: str) -> str:
    """Return a study of six variants of a model, as TOML."""
    variants = [
        f'[[variant]]\nname = "{base}-{adapter}"\n{base_fields}\n{adapter_fields}\n'
        for base, base_fields in BASES.items()
        for adapter, adapter_fields in ADAPTERS.items()
    ]
    return f'title = "Ranks and DoRA"\nreference = "bf16-r8"\n[workload]\nmodel = "{model}"\n' + "".join(variants)


def judge(run: store.Run) -> Iterator[str]:
    """Print the time and the ratios of a run; yield the bounds that do not hold."""
    spending = run.manifest.spending
    if spending is None or spending.limit_s is None:
        raise SystemExit(f"run {run.manifest.run} has no record of how its time was spent: {run.state}")
    statuses: dict[int, set[str]] = {}
    for record in run.records:
        statuses.setdefault(record.replicate, set()).add(record.status)
    replicates = sum(one == {"ok"} for one in statuses.values())
    duration, limit = format_duration(spending.wall_s), format_duration(spending.limit_s)
    print(f"  {duration} of {limit}, {replicates} replicates, {spending.share:.1%} of the time is measurement")
    max_overrun_s = max(MAX_OVERRUN_SHARE * spending.limit_s, sum(_round_times(run)))
    bounds = [
        (
            spending.wall_s <= spending.limit_s + max_overrun_s,
            f"{duration} of {limit}, {format_duration(max_overrun_s)} more are allowed",
        ),
        (replicates >= MIN_REPLICATES, f"{replicates} replicates, {MIN_REPLICATES} are required"),
        (
            spending.share >= MIN_MEASURED_SHARE,
            f"{spending.share:.1%} of the time is measurement, {MIN_MEASURED_SHARE:.0%} are required",
        ),
        (make_run_view(run).valid, "the run is invalid"),
    ]
    series, reference = group_trials(run.records), run.manifest.study["reference"]
    for name in [name for name, role in series if role == "variant" and name != reference]:
        ratio = compare_series(series[reference, "variant"], series[name, "variant"], "step_time_s")
        width = None if ratio is None else relative_half_width(ratio)
        print(f"  step time of {name}: " + ("no interval" if width is None else f"± {100 * width:.1f} %"), flush=True)
        narrow = width is not None and width <= MAX_HALF_WIDTH
        bounds.append((narrow, f"step time of {name}: ± {MAX_HALF_WIDTH:.0%} is required"))
    yield from (reason for holds, reason in bounds if not holds)


def _round_times(run: store.Run) -> Iterator[float]:
    """Yield the seconds of a turn, a request and a merged request of each trial of the first replicate."""
    for record in (one for one in run.records if one.replicate == 0 and one.turn_lengths):
        yield record.turn_lengths[0] * statistics.median(record.samples["step_time_s"])
        for name in ("request_time_s", "merged_request_time_s"):
            yield statistics.median(record.samples.get(name) or [0.0])


def main() -> int:
    """Measure the available models; return 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MINUTES))
    only = parser.parse_args().only
    print_origin()
    violations: list[str] = []
    for name in [only] if only else MINUTES:
        minutes = MINUTES[name]
        model = "smollm2-135m" if name == "smollm2" else os.environ.get("LORAMETER_GEMMA", "")
        print(f"{name}, six variants in {minutes} minutes{'' if model else ': skipped, LORAMETER_GEMMA is not set'}")
        if not model:
            continue
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / f"{name}.toml"
            study.write_text(format_study(model), encoding="utf-8")
            run_lorameter(["run", str(study), "--max-minutes", str(minutes), "--runs-dir", folder, "--json"])
            run = store.read_run(str(store.list_runs(Path(folder))[-1]), Path(folder))
            violations += [f"{name}: {one}" for one in judge(run)]
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
