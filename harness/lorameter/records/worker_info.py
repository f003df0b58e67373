"""Facts that are known before the measurement: about a worker, the tokens of all trials, and their base models.

A measuring process sends them to its parent; parts of them are in the manifest of a run.
"""

from __future__ import annotations

import msgspec


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's first message, after it has imported the libraries that every trial needs."""

    harness: str
    """Version and content of the harness that it runs."""
    import_time_s: float
    device: str
    """"cuda" or "cpu", as torch sees it."""
    torch: str
    lacks: str | None = None
    """Why bitsandbytes could not run on that device; None if it can."""


class Example(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A held-out record that the model receives whole: its prompt and its reference answer."""

    prompt: str
    reference: str


class TokenSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts about a plan's tokens; part of every record."""

    path: str
    """Absolute path on the machine that measures."""
    hash: str
    data: str
    """Description of the records; "synthetic" for generated ones."""
    synthetic: bool
    tokenizer_substituted: bool
    train_sequences: int
    real_tokens: int
    """Tokens of records in one epoch of the training stream."""
    padded_tokens: int
    """Padding in one epoch of the training stream."""
    records: int
    loss_tokens: int | None = None
    """Tokens in the loss, in one epoch of the training stream; None if they were not counted."""
    without_loss: int = 0
    """Sequences that were left out because they contain no token of an answer."""
    examples: tuple[Example, ...] = ()
    """The whole prompts, in the order of their numbers."""


class BaseSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A base that was prepared for all processes of a run: read, converted and quantised once, unless it was cached."""

    path: str
    """Absolute path of its folder on the machine that measures."""
    hash: str
    """SHA-256 of its tensor file."""
    base: str
    """Description: model, type and quantisation."""
    bytes: int
    """Size of the tensor file."""
    conversions: int
    """How often the base was read and converted, or generated, for this run: once, or 0 if it was cached."""
    quantisations: int
    """How often it was quantised for this run."""
    seconds: float
    """Time to make the base, or to find a complete one in the cache."""
    load_s: float = 0.0
    """Time to make the base from its source; a cold start spends it again."""
