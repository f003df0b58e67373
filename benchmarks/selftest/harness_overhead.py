"""The overhead of the harness: a step as a trial records it against a bare loop.

    python benchmarks/selftest/harness_overhead.py [--replicates N] [--turns N]

In each fresh process the trial's own step and bare loops take turns (`bare_loop.py`). Bounds: the recorded step takes
at most 1.005 times a bare loop that also frees its graph within the step; the 95 % interval of the step with telemetry
is below 1.005 times the step without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from shared import exit_code, print_origin

from lorameter.records.units import format_ratio
from lorameter.run.workers.local import worker_environment
from lorameter.stats import Comparison, compare_trials

PROGRAM = Path(__file__).with_name("bare_loop.py")
MAX_RATIO = 1.005
WAYS = {
    "metered": "the step as recorded",
    "scheduled": "a bare loop that steps its schedule",
    "freed": "a bare loop that frees its loss and graph within the step",
    "switched": "a bare loop behind the switch of adapter and random numbers",
    "alone": "the step outside a turn",
    "unmetered": "the step in its turn, without telemetry",
    "turn": "a whole turn of one step",
    "bare": "a bare loop",
}
"""What `bare_loop.py` times."""


def main() -> int:
    """Measure, compare and print; return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=12, help="fresh processes")
    parser.add_argument("--turns", type=int, default=100, help="of each process")
    options = parser.parse_args()
    print_origin()
    loops = []
    for seed in range(options.replicates):
        words = [sys.executable, str(PROGRAM), str(seed), str(options.turns)]
        done = subprocess.run(words, env=worker_environment(1), stdout=subprocess.PIPE, check=True)
        loops.append(json.loads(done.stdout))

    def compare(name: str, base: str) -> Comparison:
        found = compare_trials([loop[base] for loop in loops], [loop[name] for loop in loops], pairing="turn")
        ratio = format_ratio(found.ratio, found.low, found.high)
        print(f"{WAYS[name]} over {WAYS[base]}: {ratio} ({len(loops)} processes × {options.turns} turns)", flush=True)
        return found

    for name in [name for name in WAYS if name != "bare"]:
        compare(name, "bare")
    recorded, telemetry = compare("metered", "freed").ratio, compare("metered", "unmetered").high
    broken = []
    if recorded is None or recorded > MAX_RATIO:
        broken.append(f"the step as recorded takes {recorded} of a bare loop, at most {MAX_RATIO} is allowed")
    if telemetry is None or telemetry >= MAX_RATIO:
        broken.append(f"telemetry may cost {telemetry} of a step, less than {MAX_RATIO} is required")
    return exit_code(broken)


if __name__ == "__main__":
    sys.exit(main())
