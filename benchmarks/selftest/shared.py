"""Common functions of the programs: the line that names the machine, the verdict on the bounds, and a loaded
machine."""

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


def exit_code(broken: Iterable[str]) -> int:
    """Print the bounds that do not hold; return 1 if there are any."""
    reasons = list(broken)
    print("\n".join(f"does not hold: {reason}" for reason in reasons) or "holds: every bound", flush=True)
    return 1 if reasons else 0


def command_output(words: list[str], **options: object) -> str:
    """Return what `lorameter` with these arguments prints, whatever its exit code.

    Raises:
        SystemExit: it prints nothing.
    """
    search = os.pathsep.join(filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "lorameter.cli", *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": search}, **options,
    )  # fmt: skip
    if not done.stdout.strip():
        raise SystemExit(f"lorameter {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def run_ab(words: list[str], **options: object) -> dict[str, Any]:
    """Return the document of one `lorameter ab`, with its step time as `step` and its wall time as `seconds`."""
    begin = time.monotonic()
    document: dict[str, Any] = json.loads(command_output(["ab", *words, "--json"], **options))
    step = next(row for row in document["comparisons"] if row["metric"] == "step_time_s")
    return document | {"step": step, "seconds": time.monotonic() - begin}


def ratio_text(row: dict[str, Any]) -> str:
    """Return ratio and interval of a compared metric."""
    return format_ratio(row["ratio"], row["low"], row["high"])


@dataclass(frozen=True)
class Share:
    """The number of draws with a property, and its lower and upper bound."""

    what: str
    count: int
    draws: int
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether an exact binomial test at 1 % accepts both bounds."""
        from scipy import stats  # imported late, since programs that measure memory fork this process

        return all(
            bound is None or stats.binomtest(self.count, self.draws, bound, side).pvalue > 0.01
            for bound, side in ((self.least, "less"), (self.most, "greater"))
        )

    def __str__(self) -> str:
        bounds = [f"at least {self.least:.1%}"] if self.least is not None else []
        bounds += [f"at most {self.most:.1%}"] if self.most is not None else []
        required = f" ({', '.join(bounds)})" if bounds else ""
        return f"{self.what}: {self.count / self.draws:.2%} of {self.draws}{required}"


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
