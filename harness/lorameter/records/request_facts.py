"""What was seen of a request: facts that are no times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a forward pass multiplies with and reads, counted from a model's modules, whatever family it is of.

    Elements are weights that take two FLOPs for each row; bytes are as they are stored, constants of quantisation
    included.
    """

    linear_elements: int
    """Linear layers of the base without the output head."""
    linear_bytes: int
    head_elements: int
    head_bytes: int
    adapter_elements: int
    adapter_bytes: int
    norm_bytes: int
    """What is read of each block beside its linear layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What one request found, and what it left."""

    training: bool
    """Whether the model was in train mode in any of its forward passes."""
    checkpointing: bool
    """Whether gradient checkpointing was on."""
    prompt_rows: int
    """Tokens of each prompt that the first forward pass took."""
    decode_rows: int
    """The most tokens of each that a later one took; without a cache it takes all that there are."""
    logit_rows: int
    """Rows of logits that the first pass made of each."""
    cache: str
    """Class of the cache of keys and values; "" where there was none."""
    cache_bytes: int
    """What it held at the end, of all prompts."""
    cache_moved: float
    """Share of the tokens at which its tensors lay elsewhere than before: they were made anew, and copied."""
    head: str
    """Name of the output head's weight; "" where the model has none."""
    size: ModelSize
