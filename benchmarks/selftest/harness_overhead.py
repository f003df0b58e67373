"""Measures the overhead of the harness: the step time that a trial records against that of a bare training loop.

    python benchmarks/selftest/harness_overhead.py [--replicates N] [--turns N]

In each fresh process the trial's own step and bare loops take turns (`bare_loop.py`). Bounds: the recorded step takes
at most 1.005 times as long as a bare loop that also frees its graph within the step; the 95 % interval of the step with
telemetry over the step without it is below 1.005.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from shared import print_origin, report_violations

from lorameter.records.units import format_ratio
from lorameter.run.workers.local import worker_environment
from lorameter.stats import Comparison, compare_trials

PROGRAM = Path(__file__).with_name("bare_loop.py")
MAX_RATIO = 1.005
STEPS = {
    "metered": "the step as recorded",
    "scheduled": "a bare loop that steps its schedule",
    "freed": "a bare loop that frees its loss and graph within the step",
    "switched": "a bare loop behind the switch of adapter and random numbers",
    "alone": "the step outside a turn",
    "unmetered": "the step in its turn, without telemetry",
    "turn": "a whole turn of one step",
    "bare": "a bare loop",
}
"""The steps that `bare_loop.py` times, with their descriptions."""


def main() -> int:
    """Measure, compare and print; return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=12, help="fresh processes")
    parser.add_argument("--turns", type=int, default=100, help="turns of each process")
    options = parser.parse_args()
    print_origin()
    replicates = []
    for seed in range(options.replicates):
        words = [sys.executable, str(PROGRAM), str(seed), str(options.turns)]
        done = subprocess.run(words, env=worker_environment(1), stdout=subprocess.PIPE, check=True)
        replicates.append(json.loads(done.stdout))

    def compare(name: str, base: str) -> Comparison:
        comparison = compare_trials(
            [times[base] for times in replicates], [times[name] for times in replicates], pairing="turn"
        )
        ratio = format_ratio(comparison.ratio, comparison.low, comparison.high)
        counts = f"{len(replicates)} processes × {options.turns} turns"
        print(f"{STEPS[name]} over {STEPS[base]}: {ratio} ({counts})", flush=True)
        return comparison

    for name in [name for name in STEPS if name != "bare"]:
        compare(name, "bare")
    step_ratio, telemetry_ratio = compare("metered", "freed").ratio, compare("metered", "unmetered").high
    violations = []
    if step_ratio is None or step_ratio > MAX_RATIO:
        violations.append(f"the step as recorded takes {step_ratio} of a bare loop, at most {MAX_RATIO} is allowed")
    if telemetry_ratio is None or telemetry_ratio >= MAX_RATIO:
        violations.append(f"telemetry may cost {telemetry_ratio} of a step, less than {MAX_RATIO} is required")
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
