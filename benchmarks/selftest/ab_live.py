"""Does `lorameter ab` keep its word on this machine? Twenty A/B runs each of three kinds, as a user starts them.

- a commit against itself: never called slower;
- a commit against itself with about 5 % more real work in the step: called slower in at least 18 of 20, and the
  interval covers the true size in at least 17; the size is measured first, by a rigorous run with more turns;
- a commit against itself while a process for each CPU does nothing but compute: never called slower, and the
  notices name the contention.

    python benchmarks/selftest/ab_live.py [--tries N] [--part identical planted hogged] [--rows N]

Needs a git repository to stand in. Prints every try and ends with 1 where the word was not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.machine.provenance import probe_machine
from harness.machine.repository import git_state
from harness.records.units import format_ratio
from harness.studies.study_file import builtin_studies
from harness.verdicts.calibrate import PILOT_ROWS, PLANTED, rows_for

STUDY = "training-step"
PARTS = ("hogged", "identical", "planted")
LONGEST_TRY_S = 45.0
"""What an undisturbed try may take."""
RIGOROUS_TURNS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One A/B run."""

    part: str
    number: int
    verdict: str
    ratio: tuple[float | None, float | None, float | None]
    control: tuple[float | None, float | None, float | None]
    control_verdict: str
    notices: tuple[str, ...]
    seconds: float

    def covers(self, value: float) -> bool:
        """Whether the interval holds a ratio."""
        _, low, high = self.ratio
        return low is not None and high is not None and low <= value <= high


def run_ab(runs: str, *options: str, study: str = STUDY) -> tuple[dict[str, Any], float]:
    """One `lorameter ab HEAD HEAD`, and its wall time in seconds."""
    command = [
        sys.executable, "-m", "harness.cli", "ab", study, "--base", "HEAD", "--candidate", "HEAD", "--phase", "train",
        "--runs-dir", runs, "--json", *options,
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout), seconds


def attempt(part: str, number: int, runs: str, *options: str) -> Try:
    """One try of a part."""
    document, seconds = run_ab(runs, *options)
    step = next(row for row in document["comparisons"] if row["metric"] == "step_time_s")
    control = document["control"]["train"] or {}
    return Try(
        part=part,
        number=number,
        verdict=step["verdict"],
        ratio=(step["ratio"], step["low"], step["high"]),
        control=(control.get("ratio"), control.get("low"), control.get("high")),
        control_verdict=control.get("verdict", "not measured"),
        notices=tuple(notice["code"] for notice in document["notices"]),
        seconds=seconds,
    )


@contextlib.contextmanager
def hogs() -> Iterator[None]:
    """A process for each CPU that only computes."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def planted_rows(runs: str, rows: int | None) -> tuple[int, tuple[float, float, float]]:
    """Rows of extra work for about 5 %, and the slow-down that they really are, by a rigorous run of more turns."""
    if rows is None:
        pilots = [run_ab(runs, "--inject-rows", str(count), "--replicates", "5")[0] for count in PILOT_ROWS]
        rows = rows_for(PLANTED, *(float(pilot["comparisons"][0]["ratio"]) for pilot in pilots))
    text = builtin_studies()[STUDY].read_text(encoding="utf-8")
    longer = Path(runs) / f"{STUDY}.toml"
    longer.write_text(re.sub(r"^turns = \d+$", f"turns = {RIGOROUS_TURNS}", text, flags=re.MULTILINE))
    document, _ = run_ab(runs, "--inject-rows", str(rows), "--effort", "rigorous", study=str(longer))
    step = document["comparisons"][0]
    return rows, (float(step["ratio"]), float(step["low"]), float(step["high"]))


def broken_promises(tries: list[Try], truth: float | None) -> list[str]:
    """What was promised and not kept; tries beyond or below twenty scale the promises."""
    found = []
    for part in dict.fromkeys(one.part for one in tries):
        group = [one for one in tries if one.part == part]
        verdicts = Counter(one.verdict for one in group)
        if part != "planted" and verdicts["regressed"]:
            found.append(f"{part}: {verdicts['regressed']} of {len(group)} called slower")
        if part == "planted":
            covered = sum(one.covers(truth) for one in group if truth is not None)
            if verdicts["regressed"] < 0.9 * len(group):
                found.append(f"planted: found in {verdicts['regressed']} of {len(group)}, promised 18 of 20")
            if covered < 0.85 * len(group):
                found.append(f"planted: the interval covers the true size in {covered} of {len(group)}, not 17 of 20")
        if part == "hogged" and (silent := sum("contention" not in one.notices for one in group)):
            found.append(f"hogged: {silent} of {len(group)} do not name the contention")
        slow = [one.seconds for one in group if one.seconds > LONGEST_TRY_S]
        if part != "hogged" and slow:
            found.append(f"{part}: {len(slow)} of {len(group)} took over {LONGEST_TRY_S:g} s, up to {max(slow):.0f} s")
    return found


def show(group: list[Try], truth: float | None, console: Console) -> None:
    """The tries of one part, and their sum."""
    part = group[0].part
    table = Table(
        title=f"{part}: lorameter ab {STUDY} --base HEAD --candidate HEAD --phase train", title_justify="left"
    )
    for head in ("try", "verdict", "candidate / base", "base / base", "control", "seconds"):
        table.add_column(head, justify="right" if head in ("try", "seconds") else "left")
    for one in group:
        ratios = format_ratio(*one.ratio), format_ratio(*one.control)
        table.add_row(str(one.number), one.verdict, *ratios, one.control_verdict, f"{one.seconds:.0f}")
    console.print(table)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(o.verdict for o in group).most_common())
    count = sum(one.covers(truth) for one in group) if truth is not None else 0
    covered = f"; {count} intervals cover its size" if part == "planted" else ""
    named = sum("contention" in one.notices for one in group)
    longest = max(one.seconds for one in group)
    console.print(f"{part}: {verdicts}{covered}; contention named in {named}; a try took up to {longest:.0f} s")


def main() -> int:
    """Measure all parts, print the table, return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, help="rows of the planted work; default: sized by two pilots for 5 %%")
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    machine, state = probe_machine(), git_state(Path.cwd())
    changes = " with local changes" if state["dirty"] else ""
    console.print(f"{machine.device_name}, {machine.cpus} CPUs; commit {str(state['commit'])[:10]}{changes}")
    tries: list[Try] = []
    truth: float | None = None
    with tempfile.TemporaryDirectory(prefix="lorameter-proof-") as runs:
        for part in options.part:
            extra: tuple[str, ...] = ()
            if part == "planted":
                rows, size = planted_rows(runs, options.rows)
                truth, extra = size[0], ("--inject-rows", str(rows))
                console.print(f"planted: {rows} rows in each adapted layer are a slow-down of {format_ratio(*size)}")
            group: list[Try] = []
            with hogs() if part == "hogged" else contextlib.nullcontext():
                for number in range(1, options.tries + 1):
                    group.append(attempt(part, number, runs, *extra))
                    print(f"{part} {number}: {group[-1].verdict}", file=sys.stderr, flush=True)
            show(group, truth, console)  # before the next part begins: an hour may be interrupted
            tries += group
    broken = broken_promises(tries, truth)
    for line in broken:
        console.print(f"broken: {line}")
    if not broken:
        console.print("holds: every promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
