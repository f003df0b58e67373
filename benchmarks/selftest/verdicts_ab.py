"""Tests the verdicts of `lorameter ab` on identical commits, on an injected slow-down and on a loaded machine, and
compares the interleaving levels.

    python benchmarks/selftest/verdicts_ab.py [--tries N] [--part identical injected loaded levels] [--minutes M]

- identical: a commit against itself is never called slower.
- injected: a commit against itself with about 5 % more work in the step is called slower in 90 % of the A/Bs, and the
  interval covers the true ratio in 85 %. A rigorous run measures the true ratio first.
- loaded: identical commits, with a busy process on each CPU, are never called slower, and a notice reports the
  contention.
- levels: six variants and the A/A control are measured for equally long at each interleaving level. In each round the
  levels run in shuffled order, so that other load affects all of them. At shared-base the turn phase takes at most 1.1
  times its timed steps, and a replicate loads the base once.

An A/B takes at most 45 s on an idle machine. Run the program from a git repository.
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

from shared import busy_cpus, format_comparison, print_origin, report_violations, run_ab, run_lorameter

from lorameter.records import store
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_ratio
from lorameter.run.build_plan import LEVELS
from lorameter.verdicts.calibrate import INJECTED, PILOT_ROWS, rows_for_slowdown
from lorameter.verdicts.series import compare_series, group_trials

STUDY = "training-step"
MAX_AB_S = 45.0
MIN_DETECTED, MIN_COVERAGE = 0.9, 0.85
MAX_OVERHEAD = 1.1
LORA_RANKS_STUDY = """
title = "Six LoRA ranks on one base"
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


def run_part(part: str, tries: int, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Run and print the A/Bs of a part; return their documents and the true ratio. Two pilot runs determine the number
    of injected rows, and a rigorous run measures their slow-down."""
    words = [STUDY, "--base", "HEAD", "--candidate", "HEAD", "--phase", "train", "--runs-dir", str(folder)]
    true_ratio, documents = 1.0, []
    if part == "injected":
        pilots = [run_ab([*words, "--inject-rows", str(rows), "--replicates", "5"]) for rows in PILOT_ROWS]
        rows = rows_for_slowdown(INJECTED, *(pilot["step"]["ratio"] for pilot in pilots))
        words += ["--inject-rows", str(rows)]
        rigorous = run_ab([*words, "--effort", "rigorous"])["step"]
        true_ratio = rigorous["ratio"]
        print(f"injected: {rows} rows in each adapted layer are a slow-down of {format_comparison(rigorous)}")
    with busy_cpus() if part == "loaded" else contextlib.nullcontext():
        for number in range(1, tries + 1):
            document = run_ab(words)
            step, control = document["step"], document["control"]["train"]
            print(
                f"{part} {number}: {step['verdict']}, candidate / base {format_comparison(step)}, "
                f"base / base {format_comparison(control)} {control['verdict']}, {document['seconds']:.0f} s",
                flush=True,
            )
            documents.append(document)
    return documents, true_ratio


def judge(part: str, documents: list[dict[str, Any]], true_ratio: float) -> Iterator[str]:
    """Print the counts of a part; yield the bounds that do not hold."""
    count, steps = len(documents), [document["step"] for document in documents]
    verdicts = Counter(step["verdict"] for step in steps)
    slower, longest = verdicts["regressed"], max(document["seconds"] for document in documents)
    covered = sum(step["low"] is not None and step["low"] <= true_ratio <= step["high"] for step in steps)
    with_notice = sum(
        any(notice["code"] == "cpu-contention" for notice in document["notices"]) for document in documents
    )
    print(
        f"{part}: {dict(verdicts)}; {covered} cover the true ratio; {with_notice} have a notice of contention; "
        f"up to {longest:.0f} s"
    )
    injected, loaded = part == "injected", part == "loaded"
    bounds = (
        (injected or not slower, f"{slower} of {count} are called slower"),
        (
            not injected or slower >= MIN_DETECTED * count,
            f"{slower} of {count} are called slower, {MIN_DETECTED:.0%} are required",
        ),
        (
            not injected or covered >= MIN_COVERAGE * count,
            f"{covered} of {count} intervals cover the true ratio, {MIN_COVERAGE:.0%} are required",
        ),
        (not loaded or with_notice == count, f"{count - with_notice} of {count} have no notice of the contention"),
        (loaded or longest <= MAX_AB_S, f"an A/B took {longest:.0f} s, at most {MAX_AB_S:g} are allowed"),
    )
    yield from (f"{part}: {reason}" for holds, reason in bounds if not holds)


def measure_levels(minutes: float, rounds: int, folder: Path) -> dict[str, list[TrialRecord]]:
    """Measure the six LoRA ranks at each level and return the trials; no two rounds share a replicate number."""
    study = folder / "ranks.toml"
    study.write_text(LORA_RANKS_STUDY, encoding="utf-8")
    words = ["run", str(study), "--max-minutes", str(minutes / rounds), "--phase", "train", "--runs-dir", str(folder)]
    records: dict[str, list[TrialRecord]] = {level: [] for level in LEVELS}
    shuffler = random.Random(0)
    for number in range(rounds):
        for level in shuffler.sample(LEVELS, len(LEVELS)):
            output = run_lorameter([*words, "--interleave", level, "--json", "--allow-disturbed"])
            run = store.read_run(json.loads(output)["run"], folder)
            records[level] += [one.replaced(replicate=1000 * number + one.replicate) for one in run.records]
    return records


def judge_level(level: str, records: list[TrialRecord]) -> Iterator[str]:
    """Print the control, the smallest detectable slow-down and the overhead of a level; yield the bounds that do not
    hold."""
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
        yield (
            f"levels: shared-base: overhead {overhead:.3f} (at most {MAX_OVERHEAD}), "
            f"{loads:g} loads of the base a replicate (must be 1)"
        )


def main() -> int:
    """Measure the parts and print them; return 1 where a bound does not hold."""
    parts = ("identical", "injected", "loaded", "levels")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=8, help="A/Bs of each part; `loaded` has half as many")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--minutes", type=float, default=2.0, help="for each level, over all rounds")
    options = parser.parse_args()
    print_origin()
    violations: list[str] = []
    for part in options.part:
        with tempfile.TemporaryDirectory() as folder:
            if part == "levels":
                for level, records in measure_levels(options.minutes, 2, Path(folder)).items():
                    violations += judge_level(level, records)
                continue
            tries = -(-options.tries // 2) if part == "loaded" else options.tries
            violations += judge(part, *run_part(part, tries, Path(folder)))
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
