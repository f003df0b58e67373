"""What a run's time went to, as its manifest has it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The timed turns of one replicate."""

    replicate: int
    turns: int
    """That each trial took, or the one that took fewest."""
    steps_per_turn: int
    planned: int
    """Turns of the plan."""
    optimum: float | None = None
    """Turns that narrow the intervals most, by the variances within and between the replicates before it and by what a
    process and a turn cost (Kalibera & Jones 2013), whatever was taken; None before two replicates have told, and where
    more of them would always be better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBreakdown:
    """Seconds of one invocation."""

    wall_s: float
    """From its begin, the preparing of tokens and bases included, to its last trial."""
    limit_s: float | None = None
    """What it was allowed to take."""
    measured_s: dict[str, float] = field(default_factory=dict)
    """In which something timed was at work, and nothing else: steps, requests, open_ended, merged, cold."""
    allocations: tuple[Allocation, ...] = ()

    @property
    def share(self) -> float:
        """Of the time that was measurement."""
        return sum(self.measured_s.values()) / self.wall_s if self.wall_s else 0.0
