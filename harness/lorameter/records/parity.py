"""Observations of one adapter served in several modes: answers, losses and distances, without a judgement."""

from __future__ import annotations

import msgspec

from lorameter.records.record import Failure

SERVED = "served"
"""Key in a fragment: what a process has observed of its modes."""
PROMPTS = "prompts"
"""Key in a fragment: the tokens of the prompts."""


class LogitDistance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the logits of one answer lie from the reference's, at the positions of the reference's own answer, so
    that both have read the same tokens. Worked out in float64."""

    positions: int
    argmax_differs: int
    """Positions at which the likeliest token is another."""
    kl_mean_nats: float
    """Mean over the positions of the divergence of the next token's distribution from the reference's,
    KL(reference ‖ other)."""
    kl_max_nats: float
    difference_mean: float
    """Mean absolute difference, over positions and vocabulary."""
    difference_max: float
    """Largest absolute difference."""
    cosine_mean: float
    """Mean over the positions of the cosine between the two rows of logits."""
    cosine_min: float


class Served(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter, served in one way."""

    way: str
    answers: tuple[tuple[int, ...], ...] = ()
    """Tokens of each greedy answer, in the order of the prompts."""
    distances: tuple[LogitDistance, ...] = ()
    """From the reference, an answer each; empty of the reference itself."""
    losses: tuple[float, ...] = ()
    """Mean loss over the labelled tokens of each held-out sequence that has one, in nats."""
    failure: Failure | None = None
    """Why there is nothing of it."""
