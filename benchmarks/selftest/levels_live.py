"""What do the levels of interleaving buy? The same variants for the same minutes at each level, side by side.

    python benchmarks/selftest/levels_live.py [--minutes M] [--rounds N]

The levels themselves take turns: in each round every level has its share of the minutes, in shuffled order, so that a
neighbour who comes or goes does so for all of them. A level's replicates of all rounds are judged together.
For each level the table shows how often a replicate fitted into the time, the interval of the control (the reference
against itself: the narrower, the more can be seen) and the smallest slow-down that the level would have found. At
shared-base it also shows what switching costs: the turn phase over the sum of its timed steps (at most 1.1), and how
often a replicate loaded the base. Ends with 1 where that bound is broken.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.machine.provenance import probe_machine
from harness.machine.repository import git_state
from harness.records import store
from harness.records.record import TrialRecord
from harness.records.units import format_ratio
from harness.run.levels import LEVELS
from harness.stats import Comparison
from harness.verdicts.series import compare_series, series_of

MOST_OVERHEAD = 1.1
STUDY = """
title = "Six ranks on one base"
[workload]
model = "tiny-llama"
sequence_length = 128
batch_size = 2
[protocol]
replicates = 40
warmup_steps_min = 3
warmup_steps_max = 6
turns = 16
steps_per_turn = 1
[controls]
quantization = "nf4"
lora_dropout = 0.1
learning_rate = 1e-3
[axes]
r = [4, 8, 16, 32, 64, 128]
"""


def measure(level: str, minutes: float, folder: str) -> store.Run:
    """One run of the study at a level, as long as the minutes allow. Only training: the A/A is what is looked at."""
    study = Path(folder) / "ranks.toml"
    study.write_text(STUDY)
    command = [
        sys.executable, "-m", "harness.cli", "run", str(study), "--interleave", level, "--max-minutes", str(minutes),
        "--phase", "train", "--runs-dir", folder, "--json", "--allow-disturbed",  # disturbances are what is looked at
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return store.read_run(json.loads(done.stdout)["run"], Path(folder))


def pooled(runs: list[store.Run]) -> list[TrialRecord]:
    """The records of several runs of one level as if of one: replicates numbered on."""
    records: list[TrialRecord] = []
    for number, run in enumerate(runs):
        records += [record.replaced(replicate=1000 * number + record.replicate) for record in run.records]
    return records


def control_of(records: list[TrialRecord], name: str) -> Comparison:
    """The reference against itself in step time."""
    groups = series_of(records)
    found = compare_series(groups[name, "variant"], groups[name, "control"], "step_time_s")
    if found is None:
        raise SystemExit("the control was not measured")
    return found


def overhead(records: list[TrialRecord]) -> float:
    """Wall time of the turn phase over the sum of its timed steps, of the replicate where it is worst."""
    worst = 0.0
    for replicate in {record.replicate for record in records}:
        group = [record for record in records if record.replicate == replicate]
        steps = sum(sum(record.samples["step_time_s"]) for record in group)
        worst = max(worst, group[0].values["turns_wall_time_s"] / steps)
    return worst


def main() -> int:
    """Measure each level, print the table, return 1 where switching costs too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each level, over all rounds")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    machine, state = probe_machine(), git_state(Path.cwd())
    changes = " with local changes" if state["dirty"] else ""
    console.print(f"{machine.device_name}, {machine.cpus} CPUs; commit {str(state['commit'])[:10]}{changes}")
    table = Table(
        title=f"Six variants and the control, {options.minutes:g} minutes a level, in turns", title_justify="left"
    )
    heads = (
        "level",
        "replicates",
        "control of step time",
        "± half-width",
        "found with 80 % power",
        "turns / steps",
        "loads",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "level" else "right")
    broken = False
    with tempfile.TemporaryDirectory(prefix="lorameter-proof-") as folder:
        runs: dict[str, list[store.Run]] = {level: [] for level in LEVELS}
        shuffler = random.Random(0)
        for _ in range(options.rounds):
            for level in shuffler.sample(LEVELS, len(LEVELS)):
                runs[level].append(measure(level, options.minutes / options.rounds, folder))
        for level in LEVELS:
            records = pooled(runs[level])
            control = control_of(records, runs[level][0].manifest.study["reference"])
            timed = [record for record in records if record.samples.get("step_time_s")]
            loads = max(
                sum(record.values.get("base_loads", 0.0) for record in timed if record.replicate == replicate)
                for replicate in {record.replicate for record in timed}
            )
            cost = overhead(timed) if level != "replicates" else None
            broken = broken or (level == "shared-base" and (cost is None or cost > MOST_OVERHEAD or loads != 1))
            half = "–" if not control.low or not control.high else f"{50 * (control.high / control.low - 1):.2g} %"
            table.add_row(
                level,
                str(control.replicates),
                f"{format_ratio(control.ratio, control.low, control.high)} {control.verdict}",
                half,
                "–" if control.mde80 is None else f"+{100 * control.mde80:.2g} %",
                "–" if cost is None else f"{cost:.3f}",
                f"{loads:g}",
            )
    console.print(table)
    console.print("turns / steps: wall time of the turn phase over its timed steps, in the worst replicate")
    bound = f"at shared-base at most {MOST_OVERHEAD} and one load of the base a replicate"
    console.print(f"broken: {bound}" if broken else f"holds: {bound}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
