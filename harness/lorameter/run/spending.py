"""What the time of a run went to: how much of it was measurement, and how many turns each replicate took."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorameter.records.time_breakdown import Allocation, TimeBreakdown


@dataclass(slots=True)
class Ledger:
    """Seconds of what was timed, by kind; the rest of a run's time is what they took to be had."""

    measured_s: dict[str, float] = field(default_factory=dict)
    allocations: dict[int, Allocation] = field(default_factory=dict)
    """By replicate."""

    def measured(self, kind: str, seconds: float) -> None:
        """So long a process was at work on what is timed, and nothing else was."""
        self.measured_s[kind] = self.measured_s.get(kind, 0.0) + seconds

    def allocated(self, allocation: Allocation) -> None:
        """So many turns the trials of a replicate took; of several groups, each with its own, the fewest count."""
        before = self.allocations.get(allocation.replicate)
        if before is None or allocation.turns < before.turns:
            self.allocations[allocation.replicate] = allocation

    def sum(self, *, limit_s: float | None, wall_s: float) -> TimeBreakdown:
        """As the manifest has it."""
        return TimeBreakdown(
            limit_s=limit_s,
            wall_s=wall_s,
            measured_s=dict(self.measured_s),
            allocations=tuple(self.allocations.values()),
        )
