"""What a decoded token takes, or one of each prompt of a request: FLOPs, and bytes that must come from memory for it.

For one prompt each weight is read for two FLOPs, so decoding is bound by memory: its ceiling is the bandwidth, and
what counts is the size in which the weights are stored, the constants of their quantisation included. Each weight is
read once a forward pass, which gives a token to each prompt: so several prompts share what weights cost, and each has
keys and values of its own (Databricks 2023, "LLM Inference Performance Engineering: Best Practices", whose model
bandwidth utilisation this is the numerator of). A layer that writes its weights out in 16 bits before it multiplies
moves more; that is its own cost, and shows as a low utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.models.costs.flops import adapted_layers, product_weights
from lorameter.models.costs.storage import constant_bytes, weight_bytes, width
from lorameter.models.shapes import ModelShape, family_of, linear_widths
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """What a forward pass over one token of each prompt takes: FLOPs, and bytes that must come from memory, by kind."""

    flops: int
    linear_bytes: int
    """Weights of the blocks' linear layers as they are stored, with the constants of their quantisation."""
    adapter_bytes: int
    head_bytes: int
    other_bytes: int
    """Norms, and each token's row of the embedding."""
    cache_bytes: int
    """Keys and values of the contexts: those of earlier tokens read, each token's own written."""

    @property
    def bytes(self) -> int:
        """All of them. Activations are left out: they stay in caches."""
        return self.linear_bytes + self.adapter_bytes + self.head_bytes + self.other_bytes + self.cache_bytes


def mean_context(workload: Workload) -> int:
    """Tokens attended to by a token after a request's first, itself included, in the mean over those tokens.

    With p prompt tokens and n new ones, the forward passes after the first attend to p + 1 ... p + n - 1 tokens.
    """
    return workload.prompt_tokens + workload.new_tokens // 2


def decode_cost(
    shape: ModelShape,
    variant: Variant,
    *,
    context: int,
    prompts: int = 1,
    merged: bool = False,
    repacked: bool = False,
) -> DecodeCost:
    """FLOPs and bytes of one token after the first of each prompt, `context` tokens attended to by each, itself
    included.

    Left out: biases, norms of heads, and the norm that PEFT's DoRA takes anew for every token, which an implementation
    could keep.

    Args:
        prompts: of the request (`Workload.request_batch`).
        merged: the adapter is merged into the base, which keeps its type and size.
        repacked: 4-bit weights are in bitsandbytes' CPU layout, with one bfloat16 scale a block and no double
            quantisation (`_convert_weight_packed_for_cpu` of bitsandbytes 0.50).

    Raises:
        UsageError: a model type or a target whose layers are not known here.
    """
    widths = linear_widths(shape)
    adapted = frozenset[str]() if merged else adapted_layers(shape, variant)
    ranks = shape.layers * variant.r * sum(sum(widths[name]) for name in adapted)
    magnitudes = shape.layers * sum(widths[name][1] for name in adapted) if variant.use_dora else 0
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_dim * context
    plain = width("float32" if variant.prepare_for_kbit else variant.dtype)
    linear = sum(
        weight_bytes(*sizes, variant) + constant_bytes(*sizes, variant, repacked=repacked) for sizes in widths.values()
    )
    return DecodeCost(
        flops=prompts * (2 * product_weights(shape) + 2 * ranks + attention),
        linear_bytes=shape.layers * linear,
        adapter_bytes=(ranks + magnitudes) * width(variant.adapter_dtype or "float32"),
        head_bytes=shape.vocab_size * shape.hidden_size * plain,
        other_bytes=(family_of(shape).norms * shape.layers + 1 + prompts) * shape.hidden_size * plain,
        cache_bytes=prompts * 2 * shape.layers * shape.kv_heads * shape.head_dim * context * plain,
    )
