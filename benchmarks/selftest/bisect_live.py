"""Does `lorameter bisect` find a commit that made it 10 % slower among sixteen, in at most five comparisons?

    python benchmarks/selftest/bisect_live.py [--tries N ...] [--rows N] [--replicates N] [--keep FOLDER]

A clone of this repository gets sixteen commits in a row, one of which, drawn at random, adds real work to every adapted
layer of every trial (`harness.trial.building.injection`); the others change a text. How much work is 10 % is measured
first, by two A/Bs. Then the command is started as a user would, standing in the clone. Exit status 1, with the reasons,
if one try does not name that commit or takes more than five comparisons. A try takes about as long as five runs of
`lorameter ab`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine.provenance import origin_of
from harness.verdicts.calibrate import PILOT_ROWS, rows_for

ROOT = Path(__file__).parents[2]
STUDY = "training-step"
COMMITS, PLANTED, MOST_COMPARISONS = 16, 0.10, 5
PATCHED = Path("harness/trial/building/build.py")
CALL = "inject_work(model, request.injected_rows)"
PLANTED_AS = Path(".git") / "planted"
GUARD = "if request.injected_rows:"


@dataclass(frozen=True)
class Try:
    """One search."""

    culprit: str
    found: str
    comparisons: int
    ratio: float | None
    low: float | None
    high: float | None
    seconds: float


def git(folder: Path, *words: str) -> str:
    """What git says; raises for what it refuses."""
    identity = ("-c", "user.name=bisect", "-c", "user.email=bisect@example.org", "-c", f"core.hooksPath={os.devnull}")
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def plant(folder: Path, rows: int, place: int) -> str:
    """Sixteen commits on top of this one, the one at `place` (from 1) with the extra work; its hash."""
    git(folder.parent, "clone", "--quiet", "--shared", str(ROOT), str(folder))
    source = (folder / PATCHED).read_text(encoding="utf-8")
    if source.count(CALL) != 1 or source.count(GUARD) != 1:
        raise SystemExit(f"{PATCHED}: the place where work is injected has moved: mend {Path(__file__).name}")
    hashes = []
    for number in range(1, COMMITS + 1):
        (folder / "CHANGED.txt").write_text(f"{number}\n", encoding="utf-8")
        if number == place:
            slowed = source.replace(CALL, f"inject_work(model, request.injected_rows + {rows})")
            (folder / PATCHED).write_text(slowed.replace(GUARD, "if True:"), encoding="utf-8")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", f"change {number}")
        hashes.append(git(folder, "rev-parse", "HEAD"))
    return hashes[place - 1]


def command(folder: Path, runs: Path, *words: str) -> dict[str, Any]:
    """A command of lorameter in a folder, with the code that lies there; its document."""
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *words, "--runs-dir", str(runs), "--json"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout.strip():
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def size_rows(runs: Path, replicates: int) -> int:
    """Rows of extra work that are about 10 % here."""
    seen = []
    for rows in PILOT_ROWS:
        words = ("--base", "HEAD", "--candidate", "HEAD", "--phase", "train", "--inject-rows", str(rows))
        document = command(ROOT, runs, "ab", STUDY, *words, "--replicates", str(replicates))
        seen.append(next(float(row["ratio"]) for row in document["comparisons"] if row["metric"] == "step_time_s"))
    return rows_for(PLANTED, *seen)


def kept_rows(keep: Path | None, replicates: int) -> int:
    """The rows that are 10 %, measured once for a folder."""
    file = keep / "rows" if keep else None
    if file is not None and file.is_file():
        return int(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="bisect-") as runs:
        rows = size_rows(Path(runs), replicates)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(rows), encoding="utf-8")
    return rows


def attempt(number: int, rows: int, replicates: int, keep: Path | None) -> Try:
    """One search in a clone of its own; in `keep` one that was stopped goes on with the comparisons that it has."""
    with tempfile.TemporaryDirectory(prefix="bisect-") as name:
        home = Path(name) if keep is None else keep / f"{rows}-{replicates}-{number}"
        home.mkdir(parents=True, exist_ok=True)
        folder, place = home / "clone", random.Random(number).randint(1, COMMITS)
        if not (folder / PLANTED_AS).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / PLANTED_AS).write_text(plant(folder, rows, place), encoding="utf-8")
        culprit, begun = (folder / PLANTED_AS).read_text(encoding="utf-8"), time.monotonic()
        words = ("--good", f"HEAD~{COMMITS}", "--bad", "HEAD", "--replicates", str(replicates), "--resume")
        document = command(folder, home / "runs", "bisect", STUDY, *words)
        found = document["culprit"] or {"spec": document["conclusion"]}
        return Try(
            culprit=culprit,
            found=found["spec"] if document["found"] else document["conclusion"],
            comparisons=len(document["looks"]),
            ratio=document["ratio"],
            low=document["low"],
            high=document["high"],
            seconds=time.monotonic() - begun,
        )


def broken(number: int, one: Try) -> Iterator[str]:
    """What does not hold of a try."""
    if one.found != one.culprit:
        yield f"try {number}: {one.found} instead of {one.culprit[:10]}"
    if one.comparisons > MOST_COMPARISONS:
        yield f"try {number}: {one.comparisons} comparisons, at most {MOST_COMPARISONS} allowed"


def main(arguments: list[str]) -> int:
    """Size the slow-down, plant it, search, judge."""
    parser = argparse.ArgumentParser(description="Whether a planted commit is found.")
    parser.add_argument(
        "--tries", type=int, nargs="+", default=[1, 2, 3], help="seeds, a search each (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, help="rows of extra work (default: measured for 10 %%)")
    parser.add_argument(
        "--keep", type=Path, help="a folder with clones and runs; what was stopped goes on where it was"
    )
    parser.add_argument("--replicates", type=int, default=5, help="of each comparison (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(origin_of(ROOT), flush=True)
    keep = options.keep / git(ROOT, "rev-parse", "--short", "HEAD") if options.keep else None
    rows = options.rows or kept_rows(keep, options.replicates)
    print(f"planted: {rows} rows of extra work in each adapted layer, about {PLANTED:.0%}", flush=True)
    reasons: list[str] = []
    for number in options.tries:
        one = attempt(number, rows, options.replicates, keep)
        size = "no ratio" if one.ratio is None else f"× {one.ratio:.3f} [{one.low:.3f}, {one.high:.3f}]"
        right = "the planted commit" if one.found == one.culprit else one.found
        print(f"try {number}: {right} in {one.comparisons} comparisons, {size}, {one.seconds:.0f} s", flush=True)
        reasons += broken(number, one)
    for reason in reasons:
        print(f"does not hold: {reason}")
    if not reasons:
        print(f"holds: found in each of {len(options.tries)}, in at most {MOST_COMPARISONS} comparisons")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
