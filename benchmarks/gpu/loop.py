"""Which steps a call of the campaign takes: in their order, those that fit in what is left of its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.gpu.attempt import GRACE_S, Ended
from benchmarks.gpu.journal import MOST_ATTEMPTS, Entry, Journal
from benchmarks.gpu.steps import Step

CALL_MINUTES = 9.5
"""Of a call on a machine that allows ten minutes a command."""
REPORT_S = 20.0
"""What must be left of a call for judging and writing."""


def spent_s(step: Step, journal: Journal) -> float:
    """Seconds that attempts at a step have taken so far."""
    return sum(entry.took_s for entry in journal.attempts(step.name))


def is_left(step: Step, journal: Journal) -> bool:
    """Whether a step is to be begun, or resumed: one that failed, or has had its time, is not."""
    last = journal.last(step.name)
    if last is None:
        return True
    if last.outcome != "stopped":
        return False
    if step.resumes:
        return step.total_s - spent_s(step, journal) >= step.least_s
    return len(journal.attempts(step.name)) < MOST_ATTEMPTS


def next_step(steps: Sequence[Step], journal: Journal, left_s: float, tried: set[str]) -> Step | None:
    """The first step that is left, was not tried in this call, and fits in what is left of it; None if none does."""
    fits = (one for one in steps if one.name not in tried and is_left(one, journal) and one.least_s + GRACE_S <= left_s)
    return next(fits, None)


def go_on(
    steps: Sequence[Step],
    journal: Journal,
    *,
    left_s: Callable[[], float],
    run: Callable[[Step, float], Ended],
    about: Callable[[Step, Ended], Entry],
    say: Callable[[str], None],
) -> None:
    """Take the steps that are left, one after the other, as long as there is time; each is kept when it has ended."""
    tried: set[str] = set()
    while (step := next_step(steps, journal, left_s(), tried)) is not None:
        tried.add(step.name)
        limit_s = min(step.limit_s, left_s() - GRACE_S)
        if step.resumes:
            limit_s = min(limit_s, step.total_s - spent_s(step, journal))
        say(f"{step.name}: {step.asks} (at most {limit_s:.0f} s)")
        entry = about(step, run(step, limit_s))
        journal.add(entry)
        said = f": {entry.said}" if entry.outcome in ("failed", "stopped") and entry.said else ""
        say(f"  {entry.outcome} after {entry.took_s:.0f} s{said}")
