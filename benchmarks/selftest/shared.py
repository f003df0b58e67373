"""Functions that the self-tests share: print the machine, report violated bounds, run lorameter, load the CPUs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.machine.provenance import describe_origin
from lorameter.records.units import format_ratio

ROOT = Path(__file__).parents[2]


def print_origin() -> None:
    """Print machine, libraries and commit."""
    print(describe_origin(ROOT), flush=True)


def report_violations(violations: Iterable[str]) -> int:
    """Print the bounds that do not hold, and return the exit code: 1 if any bound does not hold, else 0."""
    reasons = list(violations)
    print("\n".join(f"does not hold: {reason}" for reason in reasons) or "holds: every bound", flush=True)
    return 1 if reasons else 0


def run_lorameter(arguments: list[str], **options: object) -> str:
    """Run `lorameter` with arguments and return its standard output. Any exit code is accepted.

    Raises:
        SystemExit: the command printed nothing.
    """
    python_path = os.pathsep.join(filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "lorameter.cli", *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": python_path}, **options,
    )  # fmt: skip
    if not done.stdout.strip():
        raise SystemExit(f"lorameter {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def run_ab(arguments: list[str], **options: object) -> dict[str, Any]:
    """Run one `lorameter ab` and return its document. `step` is added, the comparison of the step time, and `seconds`,
    the wall time of the command."""
    begin = time.monotonic()
    document: dict[str, Any] = json.loads(run_lorameter(["ab", *arguments, "--json"], **options))
    step = next(row for row in document["comparisons"] if row["metric"] == "step_time_s")
    return document | {"step": step, "seconds": time.monotonic() - begin}


def format_comparison(row: dict[str, Any]) -> str:
    """Format the ratio of a compared metric and its interval."""
    return format_ratio(row["ratio"], row["low"], row["high"])


@dataclass(frozen=True)
class Share:
    """The number of draws that have a property, and the bounds of their share."""

    description: str
    count: int
    draws: int
    minimum: float | None = None
    maximum: float | None = None

    @property
    def holds(self) -> bool:
        """Whether an exact binomial test at 1 % accepts both bounds."""
        from scipy import stats  # imported late, since programs that measure memory fork this process

        return all(
            bound is None or stats.binomtest(self.count, self.draws, bound, side).pvalue > 0.01
            for bound, side in ((self.minimum, "less"), (self.maximum, "greater"))
        )

    def __str__(self) -> str:
        bounds = [f"at least {self.minimum:.1%}"] if self.minimum is not None else []
        bounds += [f"at most {self.maximum:.1%}"] if self.maximum is not None else []
        required = f" ({', '.join(bounds)})" if bounds else ""
        return f"{self.description}: {self.count / self.draws:.2%} of {self.draws}{required}"


@contextlib.contextmanager
def busy_cpus() -> Iterator[None]:
    """Run a busy process on each CPU."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
