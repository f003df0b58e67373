"""How long measuring took. A run's calendar says it only where nobody has set the clock and nothing paused between."""

from __future__ import annotations

from collections.abc import Iterable

from lorameter.records.record import TrialRecord


def measuring_time_s(records: Iterable[TrialRecord]) -> float:
    """Seconds in which at least one of these trials was under way.

    Trials that took turns lie over each other and count once; what lies between trials (a pause before a run was gone
    on with, a clock that was set) counts nothing. Each trial's own length is by a clock that nobody sets, so a jump of
    the calendar can only part what lay together: it adds one group's time at most, however far it jumped.
    """
    spans = sorted(
        (record.started_unix_s, record.started_unix_s + record.wall_time_s) for record in records if record.wall_time_s
    )
    total_s, reached = 0.0, float("-inf")
    for begin, end in spans:
        total_s += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total_s
