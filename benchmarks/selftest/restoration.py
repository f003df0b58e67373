"""Is a run that was watched the run it would have been, whatever its step does?

    python benchmarks/selftest/restoration.py --many

Runs drawn at random (`kernels_check.controls.random_run`): optimizers, accumulation, groups, buffers, counters, second
models, averages, and a step that may raise anywhere. Each has a twin of the same seed that is never watched, and must
equal it: all state to the bit, and the next three losses.

Exit status 1, with the seeds, if one does not.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter

from kernels_check.controls.random_run import RandomRun, check_restored

FEW, MANY = 200, 2000
PROFILED = 20
"""One in so many is watched by the profiler, which takes several times as long."""


def main() -> int:
    """Check the seeds and print what they were about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", action="store_true", help=f"{MANY} runs instead of {FEW}")
    parser.add_argument("--first", type=int, default=10_000, help="the first seed; the tests take those from 0")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faults, about = list[str](), Counter[str]()
    count = MANY if options.many else FEW
    for place in range(count):
        seed, instrument = options.first + place, "profile" if place % PROFILED == 0 else "spy"
        about.update(_features(RandomRun(seed)), **{f"watched by {instrument}": 1})
        fault = check_restored(seed, instrument)
        if fault is not None:
            faults.append(fault)
    print(f"{count} runs, seeds {options.first} to {options.first + count - 1}: {len(faults)} differ from their twins")
    for feature, runs in sorted(about.items()):
        print(f"{runs:6} {feature}")
    for fault in faults:
        print(fault)
    return bool(faults)


def _features(run: RandomRun) -> list[str]:
    """What a run has about it that restoring must cope with."""
    told = {
        "several optimizers": len(run.optimizers) > 1,
        "accumulates": run.accumulate > 1,
        "second model": run.second is not None,
        "running average": run.average is not None,
        "learning-rate schedule": run.schedule is not None,
        "sparse gradients": run.model.embed.sparse,
        "adds a group": run.adds_group,
        "drops a parameter": run.drops_parameter,
        "planned to raise": run.breaks_at is not None,
        "never stepped before": run.warm == 0,
    }
    kinds = {f"optimizer {type(optimizer).__name__}" for optimizer in run.optimizers}
    return [*(name for name, has in told.items() if has), *kinds, *(f"habit: {habit}" for habit in run.model.habits)]


if __name__ == "__main__":
    sys.exit(main())
