"""Simulates the calls of a campaign whose steps take 1.0 and 1.5 times the expected time, and the claims that each
decides."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.claim import Claim
from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.loop import REPORT_S, attempts_s, is_pending, run_steps
from benchmarks.gpu.steps import Step

FACTORS = (1.0, 1.5)
CALL_MINUTES = 9.5
"""Minutes of a call on a machine that allows ten minutes for a command."""
REPEATED_S = 30.0
"""The time that a resumed run repeats: that of the interrupted replicate."""


def simulate(
    steps: Sequence[Step], claims: Sequence[Claim], factor: float
) -> Iterator[tuple[float, list[str], list[str]]]:
    """Yield the seconds of each call of a campaign whose steps take `factor` times the expected time, the steps that
    end in it, and the claims that it decides first."""
    with tempfile.TemporaryDirectory() as folder:
        journal, decided = Journal(Path(folder)), set[str]()
        whole_s = CALL_MINUTES * 60 - REPORT_S
        while any(is_pending(step, journal) for step in steps):
            left_s, before = whole_s, len(journal.entries)

            def run(step: Step, limit_s: float) -> Entry:
                nonlocal left_s
                resumed = REPEATED_S * len(journal.attempts(step.name))
                needed_s = factor * step.expected_s + resumed - attempts_s(step, journal)
                took_s = min(needed_s, limit_s)
                left_s -= took_s
                return Entry(
                    step=step.name, outcome="done" if needed_s <= limit_s else "stopped", code=0, took_s=took_s,
                    begun_unix_s=0.0, device="", gpu_uuid="", harness="",
                )  # fmt: skip

            with contextlib.redirect_stderr(io.StringIO()):
                run_steps(steps, journal, left_s=lambda: left_s, run=run)  # noqa: B023
            if len(journal.entries) == before:
                return
            ended = {entry.step for entry in journal.entries if entry.outcome == "done"}
            new = [claim.name for claim in claims if claim.name not in decided and ended.issuperset(claim.steps)]
            decided.update(new)
            yield whole_s - left_s, [one.step for one in journal.entries[before:] if one.outcome == "done"], new


def write_table(steps: Sequence[Step], claims: Sequence[Claim]) -> str:
    """Return the calls at each factor as a Markdown table."""
    lines = [
        "| steps take | call | minutes | steps that end | claims that it decides |",
        "| --- | --- | --- | --- | --- |",
    ]
    for factor in FACTORS:
        total = 0
        for number, (took_s, done, decided) in enumerate(simulate(steps, claims, factor), start=1):
            total += len(decided)
            lines.append(
                f"| {factor:g} × | {number} | {took_s / 60:.1f} | {', '.join(done)} | "
                f"{', '.join(decided) or '–'} ({total} of {len(claims)}) |"
            )
    return "\n".join(lines)
