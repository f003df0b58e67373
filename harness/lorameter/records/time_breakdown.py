"""What the time of a run went to, as its manifest has it."""

from __future__ import annotations

import msgspec


class TimeBreakdown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one invocation."""

    wall_s: float
    """From its begin, the preparing of tokens and bases included, to its last trial."""
    limit_s: float | None = None
    """What it was allowed to take."""
    measured_s: dict[str, float] = msgspec.field(default_factory=dict)
    """In which something timed was at work, and nothing else: steps, requests, open_ended, merged, cold."""
    turns: tuple[int, ...] = ()
    """That each trial of a replicate took, by replicate, where time was limited."""

    @property
    def share(self) -> float:
        """Of the time that was measurement."""
        return sum(self.measured_s.values()) / self.wall_s if self.wall_s else 0.0
