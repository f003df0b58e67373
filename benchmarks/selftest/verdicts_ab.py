"""Verdicts of `lorameter ab` on identical commits, on an injected slow-down and on a loaded machine; interleaving
levels.

    python benchmarks/selftest/verdicts_ab.py [--tries N] [--part identical injected loaded levels] [--minutes M]

- identical: a commit against itself is never called slower.
- injected: a commit against itself with about 5 % more work in the step is called slower in 90 % of the tries, and the
  interval covers the true size in 85 %. A rigorous run measures the true size first.
- loaded: identical commits, with a busy process on each CPU, are never called slower, and a notice names the
  contention.
- levels: six variants and the A/A control run for the same minutes at each interleaving level. In each round the levels
  run in shuffled order, so that other load affects all of them. At shared-base the turn phase takes at most 1.1 times
  its timed steps, and a replicate loads the base once.

An A/B takes at most 45 s on an idle machine. Run it from a git repository.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared import busy_cpus, command_output, exit_code, print_origin, ratio_text, run_ab

from lorameter.records import store
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_ratio
from lorameter.run.build_plan import LEVELS
from lorameter.verdicts.calibrate import INJECTED, PILOT_ROWS, rows_for_slowdown
from lorameter.verdicts.series import compare_series, group_trials

STUDY = "training-step"
MAX_TRY_S = 45.0
MIN_FOUND, MIN_COVERED = 0.9, 0.85
MAX_OVERHEAD = 1.1
SIX_RANKS = """
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


def try_part(part: str, tries: int, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Run and print the A/Bs of a part, and return them with the true ratio. Two pilots size the injected rows of work,
    and a rigorous run measures their slow-down."""
    words = [STUDY, "--base", "HEAD", "--candidate", "HEAD", "--phase", "train", "--runs-dir", str(folder)]
    truth, found = 1.0, []
    if part == "injected":
        pilots = [run_ab([*words, "--inject-rows", str(rows), "--replicates", "5"]) for rows in PILOT_ROWS]
        rows = rows_for_slowdown(INJECTED, *(pilot["step"]["ratio"] for pilot in pilots))
        words += ["--inject-rows", str(rows)]
        rigorous = run_ab([*words, "--effort", "rigorous"])["step"]
        truth = rigorous["ratio"]
        print(f"injected: {rows} rows in each adapted layer are a slow-down of {ratio_text(rigorous)}")
    with busy_cpus() if part == "loaded" else contextlib.nullcontext():
        for number in range(1, tries + 1):
            one = run_ab(words)
            control = one["control"]["train"]
            print(
                f"{part} {number}: {one['step']['verdict']}, candidate / base {ratio_text(one['step'])}, "
                f"base / base {ratio_text(control)} {control['verdict']}, {one['seconds']:.0f} s",
                flush=True,
            )
            found.append(one)
    return found, truth


def judge(part: str, tries: list[dict[str, Any]], truth: float) -> Iterator[str]:
    """Print the counts of a part; yield the bounds that do not hold."""
    count, steps = len(tries), [one["step"] for one in tries]
    verdicts = Counter(step["verdict"] for step in steps)
    slower, longest = verdicts["regressed"], max(one["seconds"] for one in tries)
    covered = sum(step["low"] is not None and step["low"] <= truth <= step["high"] for step in steps)
    named = sum(any(notice["code"] == "contention" for notice in one["notices"]) for one in tries)
    print(f"{part}: {dict(verdicts)}; {covered} cover the true ratio; {named} name contention; up to {longest:.0f} s")
    injected, loaded = part == "injected", part == "loaded"
    bounds = (
        (injected or not slower, f"{slower} of {count} are called slower"),
        (
            not injected or slower >= MIN_FOUND * count,
            f"{slower} of {count} are called slower, {MIN_FOUND:.0%} are required",
        ),
        (
            not injected or covered >= MIN_COVERED * count,
            f"{covered} of {count} intervals cover the true ratio, {MIN_COVERED:.0%} are required",
        ),
        (not loaded or named == count, f"{count - named} of {count} do not name the contention"),
        (loaded or longest <= MAX_TRY_S, f"an A/B took {longest:.0f} s, at most {MAX_TRY_S:g} are allowed"),
    )
    yield from (f"{part}: {reason}" for holds, reason in bounds if not holds)


def measure_levels(minutes: float, rounds: int, folder: Path) -> dict[str, list[TrialRecord]]:
    """Return the trials of the six ranks at each level; replicates are numbered over all rounds."""
    study = folder / "ranks.toml"
    study.write_text(SIX_RANKS, encoding="utf-8")
    words = ["run", str(study), "--max-minutes", str(minutes / rounds), "--phase", "train", "--runs-dir", str(folder)]
    records: dict[str, list[TrialRecord]] = {level: [] for level in LEVELS}
    shuffler = random.Random(0)
    for number in range(rounds):
        for level in shuffler.sample(LEVELS, len(LEVELS)):
            output = command_output([*words, "--interleave", level, "--json", "--allow-disturbed"])
            run = store.read_run(json.loads(output)["run"], folder)
            records[level] += [one.replaced(replicate=1000 * number + one.replicate) for one in run.records]
    return records


def judge_level(level: str, records: list[TrialRecord]) -> Iterator[str]:
    """Print control, smallest detectable slow-down and cost of a level; yield the bounds that do not hold."""
    series = group_trials(records)
    reference = next(record.name for record in records if record.role == "control")
    control = compare_series(series[reference, "variant"], series[reference, "control"], "step_time_s")
    if control is None:
        raise SystemExit(f"levels: {level}: the control was not measured")
    groups: dict[int, list[TrialRecord]] = {}
    for record in records:
        if record.samples.get("step_time_s"):
            groups.setdefault(record.replicate, []).append(record)
    loads = max(sum(one.values.get("base_loads", 0.0) for one in group) for group in groups.values())
    smallest = "nothing" if control.mde80 is None else f"a slow-down of {100 * control.mde80:.3g} %"
    ratio = format_ratio(control.ratio, control.low, control.high)
    line = (
        f"levels: {level}: {control.replicates} replicates, control {ratio}, {smallest} is found with 80 % power, "
        f"{loads:g} loads of the base a replicate"
    )
    if level == "replicates":
        print(line, flush=True)
        return
    overhead = max(
        group[0].values["turns_wall_time_s"] / sum(sum(one.samples["step_time_s"]) for one in group)
        for group in groups.values()
    )
    print(f"{line}, turn phase over its timed steps {overhead:.3f}", flush=True)
    if level == "shared-base" and (overhead > MAX_OVERHEAD or loads != 1):
        yield f"levels: shared-base: overhead {overhead:.3f} (at most {MAX_OVERHEAD}), {loads:g} loads (1)"


def main() -> int:
    """Measure the parts and print them; return 1 where a bound does not hold."""
    parts = ("identical", "injected", "loaded", "levels")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=8, help="A/Bs of each part; half as many of loaded")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--minutes", type=float, default=2.0, help="for each level, over all rounds")
    options = parser.parse_args()
    print_origin()
    broken: list[str] = []
    for part in options.part:
        with tempfile.TemporaryDirectory() as folder:
            if part == "levels":
                for level, records in measure_levels(options.minutes, 2, Path(folder)).items():
                    broken += judge_level(level, records)
                continue
            tries, truth = try_part(part, -(-options.tries // 2) if part == "loaded" else options.tries, Path(folder))
            broken += judge(part, tries, truth)
    return exit_code(broken)


if __name__ == "__main__":
    sys.exit(main())
