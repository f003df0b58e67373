"""How often what is measured is saved before it is whole: a sync costs milliseconds, and shorter stretches are repeated
at little cost."""

from __future__ import annotations

CHECKPOINT_S = 30.0
"""No more often than this."""
CHECKPOINT_SHARE = 0.1
"""And no more often than in this share of all the time: what they take on the disk grows with its logarithm."""


def checkpoint_is_due(now_s: float, *, begun_s: float, saved_s: float) -> bool:
    """Whether to save at `now_s` what began at `begun_s` and was last saved at `saved_s`."""
    return now_s - saved_s >= max(CHECKPOINT_S, CHECKPOINT_SHARE * (now_s - begun_s))
