"""Observations of one adapter served in several modes: answers, losses and distances, without judgements."""

from __future__ import annotations

import msgspec

from lorameter.records.record import Failure

SERVED = "served"
"""Key in a fragment: the observations of a process for its modes."""
PROMPTS = "prompts"
"""Key in a fragment: the tokens of the prompts."""


class LogitDistance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Distance between the logits of one answer and the reference's, at the positions of the reference's answer, so
    that both have the same input tokens. Computed in float64."""

    positions: int
    argmax_differs: int
    """Positions at which the most likely token differs."""
    kl_mean_nats: float
    """Mean over positions of the divergence of the next-token distribution from the reference's, KL(reference ‖
    other)."""
    kl_max_nats: float
    difference_mean: float
    """Mean absolute difference, over positions and vocabulary."""
    difference_max: float
    """Largest absolute difference."""
    cosine_mean: float
    """Mean over positions of the cosine similarity between the two rows of logits."""
    cosine_min: float


class Served(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter, served in one way."""

    way: str
    answers: tuple[tuple[int, ...], ...] = ()
    """Tokens of each greedy answer, in the order of the prompts."""
    distances: tuple[LogitDistance, ...] = ()
    """Distances from the reference, one per answer; empty for the reference itself."""
    losses: tuple[float, ...] = ()
    """Mean loss over the labelled tokens of each held-out sequence that has any, in nats."""
    failure: Failure | None = None
    """Why there are no observations."""
