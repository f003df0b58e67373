"""Facts that are known before anything is measured: of a worker, of the tokens of all trials, and of their bases.

A measuring process sends them to its parent; parts of them are in the manifest of a run.
"""

from __future__ import annotations

import msgspec


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a worker announces that it has imported what every trial needs."""

    harness: str
    """Version and content of the harness that it runs."""
    import_time_s: float
    device: str
    """"cuda" or "cpu", as torch sees it."""
    torch: str
    lacks: str | None = None
    """Why bitsandbytes could not run on that device; None if it can."""


class Example(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A held-out record that is put to the model whole: its prompt, and what the record continues it with."""

    prompt: str
    reference: str


class TokenSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts of the tokens of a plan; goes into every record."""

    path: str
    """Absolute, on the machine that measures."""
    hash: str
    data: str
    """Description of the records; "synthetic" where they are."""
    synthetic: bool
    tokenizer_substituted: bool
    train_sequences: int
    real_tokens: int
    """Tokens of records in one epoch of the training stream."""
    padded_tokens: int
    """Padding in one epoch of the training stream."""
    records: int
    loss_tokens: int | None = None
    """Tokens that the loss is taken over in one epoch of the training stream; None is not counted."""
    without_loss: int = 0
    """Sequences that were left out because no token of an answer is in them."""
    examples: tuple[Example, ...] = ()
    """The whole prompts, in the order of their numbers."""


class BaseSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A base that was prepared for all processes of a run: read, converted and quantised once, if it was not kept."""

    path: str
    """Its folder, absolute, on the machine that measures."""
    hash: str
    """SHA-256 of its file of tensors."""
    base: str
    """Description: model, type and quantisation."""
    bytes: int
    """Size of that file."""
    conversions: int
    """How often it was read from its source and converted, or drawn, for this run: once, or not where it was kept."""
    quantisations: int
    """How often it was quantised for this run."""
    seconds: float
    """Time to make it, or to find it complete."""
    load_s: float = 0.0
    """Time to make it from its source, which a cold start must do again."""
