"""What a meter leaves in a process when it is off: instructions and pages of a step, counted and not timed.

Both processes of `meter_live.py` run under valgrind's callgrind, the wrapped one with its meter on until the watched
steps are over and off from then on. Some steps are counted: how many instructions they execute, and how often they miss
the translation of an address, for which callgrind simulates caches whose lines are pages of 4 KiB: 64 entries, then
2048 in 16 ways, as of AMD's Zen 2 (its Software Optimization Guide, 56305). Where memory is fragmented a step executes
the same instructions and touches more pages. No clock is read, so that a machine's noise is not in it: replicates, each
with a hash seed of its own, differ by about one per cent.

Judged is the upper end of Student's 95 % interval of what is more in the wrapped process: 1 % of the instructions, and
6 % of the pages that neither level had.

    python benchmarks/selftest/meter_pages.py [--replicates N]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from meter_live import ALONE, OFF, ON, ROOT, Arm, interval_of

from harness.machine.provenance import origin_of

UNDER = (
    "valgrind",
    "--tool=callgrind",
    "--instr-atstart=no",
    "--cache-sim=yes",
    "--I1=262144,64,4096",
    "--D1=262144,64,4096",
    "--LL=8388608,16,4096",
)
COUNTED = 10
"""Steps."""
WATCHED = 60
"""Steps before them: warm-up, and what is watched."""
LIMITS = {"instructions": 0.01, "pages missed": 0.06}


class Counts(NamedTuple):
    """Of the counted steps of one process, in the order of `LIMITS`."""

    instructions: int
    pages: int
    """Misses of the second level by reads and writes of data."""


def count(folder: Path, seed: int, *, wrapped: bool) -> Counts:
    """Run one process up to the counted steps, and count them."""
    out = folder / f"{'wrapped' if wrapped else 'plain'}.counts"
    under = (*UNDER, f"--callgrind-out-file={out}")
    arm = Arm(folder, WATCHED + 3 * COUNTED, "small", wrapped=wrapped, under=under, PYTHONHASHSEED=str(seed))
    try:
        arm.wait()
        arm.turn(ON if wrapped else ALONE, WATCHED)
        arm.turn(OFF, COUNTED)
        control(arm, "-i", "on")
        arm.turn(OFF, COUNTED)
        control(arm, "-i", "off")
        control(arm, "-d")
    finally:
        arm.process.kill()
        arm.process.wait()
    return counts_of(Path(f"{out}.1").read_text())


def control(arm: Arm, *words: str) -> None:
    """Tell callgrind what to do."""
    subprocess.run(["callgrind_control", *words, str(arm.process.pid)], check=True, capture_output=True)


def counts_of(profile: str) -> Counts:
    """The counts of a file of callgrind's.

    Raises:
        ValueError: nothing was counted.
    """
    lines = dict(line.split(": ", 1) for line in profile.splitlines() if line.startswith(("events: ", "totals: ")))
    if set(lines) != {"events", "totals"}:
        raise ValueError("callgrind has counted nothing")
    found = dict(zip(lines["events"].split(), map(int, lines["totals"].split()), strict=True))
    return Counts(found["Ir"], found["DLmr"] + found["DLmw"])


def replicate(seed: int) -> tuple[Counts, Counts]:
    """The process alone and the wrapped one, side by side: nothing is timed."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as side_by_side:
        folder = Path(scratch)
        (folder / "runs").mkdir()
        alone = side_by_side.submit(count, folder, seed, wrapped=False)
        wrapped = side_by_side.submit(count, folder, seed, wrapped=True)
        return alone.result(), wrapped.result()


def main() -> int:
    """Count, print what was found, and say whether the limits were held."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--replicates", type=int, default=4)
    chosen = options.parse_args()
    if shutil.which(UNDER[0]) is None or shutil.which("callgrind_control") is None:
        raise SystemExit("valgrind is not installed: nothing was counted")
    print(origin_of(ROOT), flush=True)
    found = [replicate(seed) for seed in range(1, chosen.replicates + 1)]
    print(
        f"small: {len(found)} replicates, {COUNTED} steps counted of each process; the wrapped one with its meter off"
    )
    broken = []
    for index, (what, limit) in enumerate(LIMITS.items()):
        mean, low, high = interval_of([wrapped[index] / alone[index] - 1 for alone, wrapped in found])
        alone_mean = sum(alone[index] for alone, _ in found) / len(found) / COUNTED
        print(f"  {what:12} {alone_mean:12,.0f} a step alone; wrapped {mean:+.2%} [{low:+.2%}, {high:+.2%}] more")
        if high > limit:
            broken.append(what)
    limits = ", ".join(f"{limit:.0%} of the {what}" for what, limit in LIMITS.items())
    print(f"limits: {limits}: {'NOT HELD: ' + ', '.join(broken) if broken else 'held'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
