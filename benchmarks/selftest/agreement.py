"""Does the time of a step in somebody's script agree with that of the same training in a trial of lorameter's own?

The same model, optimizer and batches are trained by lorameter's loop, by a plain one, and by transformers' Trainer
(`agreement_loops.py`), and followed from outside as any script is. What the follower reads of the trial is set against
what the trial records of the same steps, and the loops take turns step by step against the trial's. Ratios of medians
come without an interval, those of turns with theirs.

They agree within what the loops really differ in: all three train the same, so their losses agree, and a step takes as
long as the trial's but for what stands at `BOUNDS`. It ends with 1 where that does not hold.

    python benchmarks/selftest/agreement.py [--model MODEL] [--replicates N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine.provenance import origin_of
from harness.records import store
from harness.records.units import format_count

ROOT = Path(__file__).parents[2]
LOOPS = Path(__file__).with_name("agreement_loops.py")


TWICE = (0.99, 1.06)
"""From outside a step of a trial is as long as the trial says, and what the trial does between two steps: it keeps what
it has recorded, and looks at the machine around a turn."""
BOUNDS = {"loop": (0.95, 1.02), "trainer": (1.0, 1.15)}
"""The ratio of a step to the trial's, both followed. A loop lacks what the trial does between two steps. A Trainer has
its callbacks, its log and its own accounts beside, some milliseconds of Python a step, whatever the model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Twice:
    """One training as two have read it."""

    what: str
    """What was trained, as the process that built it tells."""
    followed_s: float
    """Median time of a step as the follower reads it."""
    recorded_s: float
    """The same as the trial records it."""


def start(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """lorameter on one thread, in a folder; what it printed and how it ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables)


def ask(*words: str, folder: Path) -> str:
    """What lorameter prints."""
    done = start(*words, "--runs-dir", str(folder / "runs"), folder=folder)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def read_twice(model: str, steps: int, folder: Path) -> Twice:
    """One training, read from inside and from outside."""
    told = folder / "told.json"
    command = [sys.executable, LOOPS.name, "trial", "--model", model, "--steps", str(steps), "--told", str(told)]
    start("wrap", "--no-report", "--runs-dir", str(folder / "one"), "--", *command, folder=folder).check_returncode()
    (run,) = store.list_runs(folder / "one")
    (record,) = store.read_run(str(run), run.parent).records
    followed = record.samples["step_time_s"]
    document = json.loads(told.read_text(encoding="utf-8"))
    recorded = document["times"][-len(followed) :]
    variant, threads = document["variant"], document["threads"]
    return Twice(
        what=f"{variant['quantization']}, LoRA of rank {variant['r']}, {format_count(threads, 'thread')}",
        followed_s=statistics.median(followed[-len(recorded) :]),
        recorded_s=statistics.median(recorded),
    )


def against(way: str, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What an A/B says of the time of a step by this loop, against that of the trial's."""
    commands = [f"python {LOOPS.name} {one} --model {chosen.model}" for one in ("trial", way)]
    sides = ("--base-command", commands[0], "--candidate-command", commands[1])
    size = ("--replicates", str(chosen.replicates), "--steps", str(chosen.steps))
    document = json.loads(ask("ab", *sides, *size, "--json", folder=folder))
    row: dict[str, Any] = next(one for one in document["comparisons"] if one["metric"] == "step_time_s")
    return row | {"losses": document["losses"]["agreement_loops"]["found"]}


def judge_twice(found: Twice) -> list[str]:
    """What is not as it should be of one training that was read twice."""
    ratio, (low, high) = found.followed_s / found.recorded_s, TWICE
    return [] if low <= ratio <= high else [f"read twice: {ratio:.4f}, and {low} to {high} is what they differ in"]


def judge_loop(way: str, row: dict[str, Any]) -> list[str]:
    """What is not as it should be of a loop: its interval lies within the bound, and its losses agree."""
    low, high = BOUNDS[way]
    said = f"{way}: [{row['low']:.4f}, {row['high']:.4f}], and {low} to {high} is what the loops differ in"
    found = [] if low <= row["low"] and row["high"] <= high else [said]
    return found + ([] if row["losses"] == "agree" else [f"{way}: the losses do not agree: {row['losses']}"])


def main() -> int:
    """Measure, print, and say whether they agree."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="tiny-llama", help="of the catalogue")
    options.add_argument("--replicates", type=int, default=6)
    options.add_argument("--steps", type=int, default=40)
    chosen = options.parse_args()
    print(origin_of(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / LOOPS.name).write_text(LOOPS.read_text(encoding="utf-8"), encoding="utf-8")
        found = read_twice(chosen.model, 5 * chosen.steps, folder)
        print(f"{chosen.model}, {found.what}")
        print(
            f"one trial, read twice: {found.recorded_s * 1e3:.3f} ms as it records its steps, "
            f"{found.followed_s * 1e3:.3f} ms as they are followed from outside: "
            f"{found.followed_s / found.recorded_s:.4f}"
        )
        broken = judge_twice(found)
        for way in BOUNDS:
            row = against(way, chosen, folder)
            print(
                f"{way} over trial, both followed, in {row['interleaving']}: {row['ratio']:.4f} "
                f"[{row['low']:.4f}, {row['high']:.4f}] ({chosen.replicates} replicates of {chosen.steps} steps); "
                f"losses: {row['losses']}"
            )
            broken += judge_loop(way, row)
    print("\n".join(broken) if broken else "they agree within what the loops differ in")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
