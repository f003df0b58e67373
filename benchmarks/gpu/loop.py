"""Takes the steps of a campaign in order, as far as they fit into the time of the call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from benchmarks.gpu.attempt import GRACE_S
from benchmarks.gpu.journal import MAX_ATTEMPTS, Entry, Journal
from benchmarks.gpu.steps import Step

REPORT_S = 20.0
"""The time of a call that is reserved for judging and writing."""


def spent_s(step: Step, journal: Journal) -> float:
    """Return the seconds that all attempts at a step have taken."""
    return sum(entry.took_s for entry in journal.attempts(step.name))


def is_left(step: Step, journal: Journal) -> bool:
    """Return whether a step is to be started or resumed; a step that failed or has used its time is not."""
    last = journal.last(step.name)
    if last is None:
        return True
    if last.outcome != "stopped":
        return False
    if step.resumes:
        return step.total_s - spent_s(step, journal) >= step.least_s
    return len(journal.attempts(step.name)) < MAX_ATTEMPTS


def take_steps(
    steps: Sequence[Step],
    journal: Journal,
    *,
    left_s: Callable[[], float],
    run: Callable[[Step, float], Entry],
) -> None:
    """Take each remaining step that fits into the time that is left of the call, and add it to the journal.

    Args:
        steps: the steps, in order.
        journal: the journal of the campaign.
        left_s: returns the remaining seconds of the call.
        run: takes one step within the given seconds.
    """
    for step in steps:
        if not is_left(step, journal) or step.least_s + GRACE_S > left_s():
            continue
        limit_s = min(step.limit_s, left_s() - GRACE_S)
        if step.resumes:
            limit_s = min(limit_s, step.total_s - spent_s(step, journal))
        print(f"{step.name}: {step.asks} (at most {limit_s:.0f} s)", file=sys.stderr, flush=True)
        entry = run(step, limit_s)
        journal.add(entry)
        reason = f": {entry.last_line}" if entry.outcome in ("failed", "stopped") and entry.last_line else ""
        print(f"  {entry.outcome} after {entry.took_s:.0f} s{reason}", file=sys.stderr, flush=True)
