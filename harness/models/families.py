"""Model families: what is known of an architecture beside its config."""

from __future__ import annotations

from collections.abc import Mapping

FAMILIES = ("gemma", "llama", "mistral", "qwen2")
"""Architectures of the catalogue."""


DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's own for Llama and its kin."""


COUNTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"})
"""Model types whose blocks have the linear layers of Llama's and no other; others are refused, not guessed."""


_BIASED: Mapping[str, frozenset[str]] = {"qwen2": frozenset({"q_proj", "k_proj", "v_proj"})}
"""Layers with a bias: one that trains draws the gradient down to it, though its own gradient is a sum."""


_TIED_BY_DEFAULT = frozenset(
    "bloom cohere cohere2 falcon gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neo mpt opt smollm3 starcoder2".split()
)
"""Model types whose configuration class in transformers 5.24 ties the head when config.json does not say."""
