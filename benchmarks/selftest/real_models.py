"""Are real models measured in the minutes that they are given? Six variants of SmolLM2-135M in 8, of Gemma 3 270M in
15.

    python benchmarks/selftest/real_models.py [--only smollm2|gemma3] [--runs-dir DIR]

Ranks 8 and 64 and DoRA, on a base in 16 and in 4 bits, by `lorameter run --max-minutes`, as a user does, on two cores
that have nothing else to do. Fetch smollm2-135m first; $LORAMETER_GEMMA names a GGUF file of Gemma 3 270M. A model that
is not there is skipped, with the reason.

Exit status 1 unless of each model that is there the limit is kept (within a tenth, or one timed round of everything),
there are five replicates, the 95 % interval of every ratio of training, which is what `[protocol] precision` asks
about, is at most ± 5 %, and 60 % of the time were measurement. The wider intervals by which a report decides, whose
rate of false alarms all variants share, are printed beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reading import machine_line

from harness.errors import UsageError
from harness.models import catalogue
from harness.records import store
from harness.records.store import Run
from harness.records.units import format_duration
from harness.report.view import view_of
from harness.stats import Comparison
from harness.verdicts.series import compare_series, series_of

GEMMA = "LORAMETER_GEMMA"
LEAST_REPLICATES = 5
MOST_HALF_WIDTH = 0.05
LEAST_SHARE = 0.6
LATE_SHARE = 0.1
VARIANTS = """
[[variant]]
name = "bf16-r8"
r = 8
[[variant]]
name = "bf16-r64"
r = 64
[[variant]]
name = "bf16-dora"
r = 8
use_dora = true
[[variant]]
name = "nf4-r8"
r = 8
quantization = "nf4"
[[variant]]
name = "nf4-r64"
r = 64
quantization = "nf4"
[[variant]]
name = "nf4-dora"
r = 8
use_dora = true
quantization = "nf4"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One model, and the minutes that six variants of it are given."""

    name: str
    model: str
    minutes: int
    missing: str = ""
    """Why it cannot be measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of it."""

    limit_s: float
    wall_s: float
    round_s: float
    """One timed turn, one request and one merged request of every live trial."""
    share: float
    """Of the time that was measurement."""
    replicates: int
    """Of which every trial is ok."""
    half_widths: dict[str, float | None]
    """Of the 95 % intervals of the ratios of training by variant, the wider side; None without an interval."""
    shared: dict[str, float | None]
    """The same of the intervals of the report."""
    valid: bool


def asked_models() -> tuple[Asked, ...]:
    """Both, with why one is not there."""
    gemma, missing = os.environ.get(GEMMA, ""), ""
    try:
        catalogue.resolve("smollm2-135m")
    except UsageError as error:
        missing = str(error)
    no_gemma = "" if Path(gemma).is_file() else f"${GEMMA} names no GGUF file of Gemma 3 270M"
    return (
        Asked(name="smollm2", model="smollm2-135m", minutes=8, missing=missing),
        Asked(name="gemma3", model=gemma, minutes=15, missing=no_gemma),
    )


def measure(asked: Asked, folder: Path) -> Run:
    """Run the study as a user does, and read what it wrote."""
    study = folder / f"{asked.name}.toml"
    heading = (
        f'title = "Ranks and DoRA, in 16 and 4 bits"\nreference = "bf16-r8"\n[workload]\nmodel = "{asked.model}"\n'
    )
    study.write_text(heading + VARIANTS, encoding="utf-8")
    command = [sys.executable, "-m", "harness.cli", "run", str(study), "--max-minutes", str(asked.minutes)]
    subprocess.run([*command, "--runs-dir", str(folder), "--json"], stdout=subprocess.DEVNULL, check=False)
    return store.read_run(str(store.list_runs(folder)[-1]), folder)


def find(run: Run) -> Found:
    """What a run says of its time and its ratios."""
    spending, view = run.manifest.spending, view_of(run)
    if spending is None or spending.limit_s is None:
        raise SystemExit(f"run {run.manifest.run} does not say what its time went to: {run.state}")
    trials: dict[int, list[str]] = {}
    for record in run.records:
        trials.setdefault(record.replicate, []).append(record.status)
    training = next(table for table in view.tables if table.phase == "train")
    names = [row.name for row in training.rows if row.ratio is not None]
    series = series_of(run.records)
    base = series[run.manifest.study["reference"], "variant"]
    alone = {name: compare_series(base, series[name, "variant"], "step_time_s") for name in names}
    return Found(
        limit_s=spending.limit_s,
        wall_s=spending.wall_s,
        round_s=sum(_round_s(run)),
        share=spending.share,
        replicates=sum(set(found) == {"ok"} for found in trials.values()),
        half_widths={name: None if ratio is None else half_width(ratio) for name, ratio in alone.items()},
        shared={row.name: half_width(row.ratio) for row in training.rows if row.ratio is not None},
        valid=view.valid,
    )


def _round_s(run: Run) -> Iterator[float]:
    """A turn, a request and a merged one of each trial of the first replicate."""
    for record in (one for one in run.records if one.replicate == 0 and one.turn_lengths):
        yield record.turn_lengths[0] * statistics.median(record.samples["step_time_s"])
        for name in ("request_time_s", "merged_request_time_s"):
            yield statistics.median(record.samples.get(name) or [0.0])


def half_width(ratio: Comparison) -> float | None:
    """The wider side of an interval, as a share of the ratio."""
    if ratio.low is None or ratio.high is None or not ratio.ratio or not ratio.low:
        return None
    return max(ratio.high / ratio.ratio, ratio.ratio / ratio.low) - 1


def judge(found: Found) -> list[str]:
    """What of the promises does not hold."""
    broken = []
    late_s = max(LATE_SHARE * found.limit_s, found.round_s)
    if found.wall_s > found.limit_s + late_s:
        took, limit = format_duration(found.wall_s), format_duration(found.limit_s)
        broken.append(f"{took} of {limit}, and {format_duration(late_s)} more are allowed")
    if found.replicates < LEAST_REPLICATES:
        broken.append(f"{found.replicates} replicates, and {LEAST_REPLICATES} are promised")
    for name, width in found.half_widths.items():
        if width is None or width > MOST_HALF_WIDTH:
            said = "no interval" if width is None else f"an interval of ± {100 * width:.1f} %"
            broken.append(f"training of {name}: {said}, and ± {100 * MOST_HALF_WIDTH:g} % are promised")
    if found.share < LEAST_SHARE:
        broken.append(
            f"{100 * found.share:.1f} % of the time were measurement, and {100 * LEAST_SHARE:g} % are promised"
        )
    if not found.valid:
        broken.append("the run is invalid")
    return broken


def say(found: Found) -> Iterator[str]:
    """The figures."""
    yield f"{format_duration(found.wall_s)} of {format_duration(found.limit_s)}, {found.replicates} replicates"
    yield f"{100 * found.share:.1f} % of the time were measurement"
    yield f"95 % intervals of training: {_say_widths(found.half_widths)}"
    yield f"as the report decides, for all variants together: {_say_widths(found.shared)}"


def _say_widths(widths: dict[str, float | None]) -> str:
    said = (f"{name} ± {100 * width:.1f} %" if width is not None else f"{name} none" for name, width in widths.items())
    return ", ".join(said)


def main(arguments: Sequence[str]) -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("smollm2", "gemma3"))
    parser.add_argument("--runs-dir", type=Path, help="where the runs are kept; a temporary folder without")
    options = parser.parse_args(arguments)
    print(machine_line(), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for asked in (one for one in asked_models() if options.only in (None, one.name)):
            print(f"{asked.name}, six variants in {asked.minutes} minutes", flush=True)
            if asked.missing:
                print(f"  skipped: {asked.missing}", flush=True)
                continue
            folder = options.runs_dir or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            found = find(measure(asked, folder))
            broken = judge(found)
            for line in (*say(found), *(f"does not hold: {one}" for one in broken)):
                print(f"  {line}", flush=True)
            failed += bool(broken)
    print("does not hold" if failed else "holds: every promise of every model that is there")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
