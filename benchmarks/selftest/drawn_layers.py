"""Layers of models that are drawn at random, each of a kind whose truth is known before it runs.

What an attention is follows from how it is written. On a CPU the scaled dot product of torch is its flash kernel,
unless that is forbidden around the call or the weights are dropped out. A softmax between two products is eager,
however many dimensions they have. An attention of elementwise operations is nothing that anybody could recognise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, WORDS = 32, 2, 61
SDPA = ("flash", "math by context", "math by dropout")
EAGER = ("eager in 4 dimensions", "eager in 3 dimensions", "eager by einsum", "eager of MultiheadAttention")
UNRECOGNISABLE = "elementwise"
KINDS = (*SDPA, "flash of MultiheadAttention", *EAGER, UNRECOGNISABLE)
BACKEND = {kind: kind.split()[0] for kind in KINDS}
"""What each kind is, ``elementwise`` being none that has a name."""


@dataclass(frozen=True, slots=True)
class Attending:
    """How one layer attends."""

    kind: str
    mask: str
    """``none``; ``causal``: by flag; ``additive``, ``filled`` and ``boolean``: written out."""
    upcast: bool = False
    """Whether a softmax that is written out is taken in float32."""

    @property
    def seen_mask(self) -> str:
        """The mask in the words of ``attention.mask``."""
        return self.mask if self.mask in ("none", "causal") else "explicit"


def masks_of(kind: str) -> tuple[str, ...]:
    """Masks that a kind can be written with."""
    if kind in ("flash of MultiheadAttention", *SDPA):
        return ("none", "causal", "additive", "boolean")
    return ("none", "additive") if "Multihead" in kind else ("none", "additive", "filled")


def allowed(length: int, padding: Tensor | None, segments: Tensor | None) -> Tensor:
    """What may be seen by what, [rows or 1, 1, length, length]: the past, in the same segment, that is not padded."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        seen = seen & padding.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, how: Attending, *, training: bool) -> Tensor:
    """Attention over [rows, heads, length, size] in the way of ``how``."""
    if how.kind in SDPA:
        mask = {"additive": _additive(seen, query), "boolean": seen}.get(how.mask)
        drop = 0.1 if how.kind == "math by dropout" and training else 0.0
        around: AbstractContextManager[Any] = nullcontext()
        if how.kind == "math by context":
            around = sdpa_kernel(SDPBackend.MATH)
        with around:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=drop, is_causal=how.mask == "causal"
            )
    if how.kind == UNRECOGNISABLE:
        return elementwise(query, key, value, seen if how.mask != "none" else None)
    query = query / math.sqrt(query.shape[-1])
    if how.kind == "eager by einsum":
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
        return torch.einsum("bhqk,bhkd->bhqd", _weights(scores, seen, how), value)
    if how.kind == "eager in 3 dimensions":
        rows, heads, length, size = query.shape
        query, key, value = (one.reshape(rows * heads, length, size) for one in (query, key, value))
        seen = seen.expand(rows, heads, length, length).reshape(rows * heads, length, length)
        mixed = torch.bmm(_weights(torch.bmm(query, key.transpose(1, 2)), seen, how), value)
        return mixed.view(rows, heads, length, size)
    return torch.matmul(_weights(torch.matmul(query, key.transpose(-1, -2)), seen, how), value)


def elementwise(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Attention without a product of matrices and without a softmax."""
    scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) / math.sqrt(query.shape[-1])
    weights = scores.clamp(-20, 20).exp()
    if seen is not None:
        weights = weights * seen
    return ((weights / weights.sum(-1, keepdim=True)).unsqueeze(-1) * value.unsqueeze(2)).sum(3)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)


def _weights(scores: Tensor, seen: Tensor, how: Attending) -> Tensor:
    if how.mask == "additive":
        scores = scores + _additive(seen, scores)
    elif how.mask == "filled":
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return functional.softmax(scores, -1, dtype=torch.float32 if how.upcast else None).to(scores.dtype)


class SelfAttention(nn.Module):
    """Four projections and an attention between them."""

    def __init__(self, how: Attending) -> None:
        super().__init__()
        self.how = how
        self.bypassed = False
        """Whether the query goes around its adapter."""
        if "Multihead" in how.kind:
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        else:
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Mix [rows, length, width]."""
        rows, length, _ = hidden.shape
        if "Multihead" in self.how.kind:
            return self._multihead(hidden, seen.expand(rows, 1, length, length)[:, 0])
        project = self.q_proj.base_layer if self.bypassed else self.q_proj
        query, key, value = (
            one(hidden).view(rows, length, HEADS, -1).transpose(1, 2) for one in (project, self.k_proj, self.v_proj)
        )
        mixed = attend(query, key, value, seen, self.how, training=self.training)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, WIDTH).to(hidden.dtype))

    def _multihead(self, hidden: Tensor, seen: Tensor) -> Tensor:
        seen = seen.repeat_interleave(HEADS, 0)
        mask = {
            "additive": lambda: _additive(seen, hidden), "boolean": lambda: ~seen, "causal": lambda: ~seen,
        }.get(self.how.mask, lambda: None)()  # fmt: skip
        weights = BACKEND[self.how.kind] == "eager"
        mixed, _ = self.inner(
            hidden, hidden, hidden, attn_mask=mask, need_weights=weights, is_causal=self.how.mask == "causal"
        )
        return mixed


class Mlp(nn.Module):
    """Two layers with a smooth gate between them, so that no gradient dies."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform [rows, length, width]."""
        return self.down_proj(functional.gelu(self.up_proj(hidden)))


class Block(nn.Module):
    """A decoder layer, recomputed in the backward pass as a whole, in its MLP, or not at all."""

    def __init__(self, how: Attending) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(how), Mlp()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.recomputes = "none"
        self.reentrant = False

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Transform [rows, length, width]."""
        hidden = hidden + self.attention(self.before(hidden), seen)
        inner = self.between(hidden)
        if self.recomputes == "mlp" and torch.is_grad_enabled():
            return hidden + checkpoint(self.mlp, inner, use_reentrant=self.reentrant)
        return hidden + self.mlp(inner)


class Decoder(nn.Module):
    """A language model of few blocks; packed records are told apart by positions that begin again.

    Args:
        hows: of its blocks.
        merges: the boundary between records, by its place, that is lost; None keeps all.
    """

    def __init__(self, hows: list[Attending], *, merges: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block(how) for how in hows)
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.merges = merges

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits, [rows, length, words], of ids, [rows, length]."""
        segments = None if position_ids is None else (position_ids == 0).cumsum(-1)
        if segments is not None and self.merges is not None:
            segments = segments - (segments > self.merges).long()
        seen = allowed(input_ids.shape[1], attention_mask, segments)
        hidden = self.embed(input_ids)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # a checkpoint of the reentrant kind passes gradients only to what wants one
        for layer in self.layers:
            if layer.recomputes == "all" and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, seen, use_reentrant=layer.reentrant)
            else:
                hidden = layer(hidden, seen)
        return self.lm_head(self.norm(hidden))


def registered() -> dict[str, str]:
    """Attention functions of transformers for the kinds that it does not bring, and their names by kind."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def by_math(*given: Any, **options: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa_attention_forward(*given, **options)

    def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen = allowed(query.shape[2], None, None)
        return elementwise(query, key, value, seen).transpose(1, 2).contiguous(), None

    functions: dict[str, Callable[..., Any]] = {"drawn_math": by_math, "drawn_hand": by_hand}
    for name, function in functions.items():
        AttentionInterface.register(name, function)
    return {
        "flash": "sdpa",
        "math by context": "drawn_math",
        "eager in 4 dimensions": "eager",
        UNRECOGNISABLE: "drawn_hand",
    }
