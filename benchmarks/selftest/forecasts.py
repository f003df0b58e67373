"""Is a finding's cost what its remedy gains? The remedies of a step, each beside the forecast of what it brings.

    python benchmarks/selftest/forecasts.py [--effort standard] [CODE ...]

`lorameter profile --try CODE` takes the variant's step apart and measures the remedy in turns with the present variant.
The cost is a share of a step, and so is the gain: one less the ratio of the step's time with the remedy and without,
with its interval. A forecast holds where the cost lies within 5 % of a step (the margin within which two times count as
equal) of the whole interval. What the profiler's few steps leave open of the cost is not in it.

Exit status 1 unless every forecast holds: also where an interval is too wide to tell, or a finding is not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.machine.provenance import origin_of
from harness.verdicts.judging import MARGIN

ROOT = Path(__file__).parents[2]

VARIANTS = {
    "float32-adapter": "lora-or-qlora:lora-r16",
    "dropout": "lora-or-qlora:qlora-nf4-r16",
    "dequantisation": "lora-or-qlora:qlora-nf4-r16",
}
"""Findings that fields of a variant mend, and a variant of the default study that has each."""
Near = Callable[[float], tuple[float, float]]
"""Of a gain, between which costs it is foretold; both ends grow with it."""


def main() -> int:
    """Profile once for each finding, have its remedy tried, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", nargs="*", default=tuple(VARIANTS), metavar="CODE")
    parser.add_argument("--effort", choices=("quick", "standard", "rigorous"), default="standard")
    options = parser.parse_args()
    if unknown := [code for code in options.codes if code not in VARIANTS]:
        parser.error(f"{', '.join(unknown)}: known are {', '.join(VARIANTS)}")
    print(origin_of(ROOT), flush=True)
    failed = 0
    for code in options.codes:
        with tempfile.TemporaryDirectory() as runs:
            print(VARIANTS[code])
            document = document_of(arguments(VARIANTS[code], code, options.effort, runs))
        failed += document is None or judge_document(document, code, "a step", near_a_step)
    return int(failed > 0)


def near_a_step(gain: float) -> tuple[float, float]:
    """Within the margin."""
    return gain - MARGIN, gain + MARGIN


def arguments(variant: str, code: str, effort: str, runs: str) -> Sequence[str]:
    """Of `lorameter`."""
    return ("profile", variant, "--effort", effort, "--runs-dir", runs, "--json", "--try", code)


def document_of(given: Sequence[str]) -> Mapping[str, Any] | None:
    """What the command prints; None where it prints nothing, and has said why."""
    done = subprocess.run([sys.executable, "-m", "harness.cli", *given], stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        print(f"lorameter {' '.join(given)}: exit status {done.returncode}")
        return None
    return dict(json.loads(done.stdout))


def judge_document(document: Mapping[str, Any], code: str, whole: str, near: Near) -> int:
    """Print what was found and tried; the exit status. `whole` is what cost and gain are shares of."""
    print(f"found: {', '.join(one['code'] for one in document['findings']) or 'nothing'}")
    tried = document["tried"]
    if tried is None or tried["finding"]["code"] != code or tried["comparison"] is None:
        print(f"{code} was not tried")
        return 1
    finding, ratio = tried["finding"], tried["comparison"]
    print(f"{code}: {finding['message']}")
    changes = ", ".join(f"{name} = {value}" for name, value in finding["changes"].items())
    print(f"tried: {changes}; {tried['interleaving']}, {ratio['replicates']} replicates")
    if not tried["valid"]:
        print("the comparison does not count: " + ("; ".join(tried["failures"]) or "its control differs"))
        return 1
    print(f"cost {finding['cost_share']:.1%} of {whole}")
    return judge(finding["cost_share"], ratio["ratio"], ratio["low"], ratio["high"], near)


def judge(cost: float, ratio: float, low: float | None, high: float | None, near: Near) -> int:
    """Print whether the cost is near enough to the gain; the exit status.

    Args:
        cost: the finding's, a share.
        ratio: of the time with the remedy over without.
        low, high: its interval; None where there is none.
        near: between which costs a gain is foretold.
    """
    if low is None or high is None:
        print(f"gain {1 - ratio:.1%}\nnot decided: too few replicates for an interval")
        return 1
    least, most = 1 - high, 1 - low
    print(f"gain {1 - ratio:.1%} [{least:.1%}, {most:.1%}]")
    if near(most)[0] <= cost <= near(least)[1]:
        print("foretold")
        return 0
    is_missed = cost < near(least)[0] or cost > near(most)[1]
    print("not foretold" if is_missed else "not decided: the interval is too wide")
    return 1


if __name__ == "__main__":
    sys.exit(main())
