"""How much of a batch is padding, which costs as much time as tokens do and teaches nothing.

Tokens a second, read off a batch that is mostly padding, are a number about the padding. No operator shows it: the
mask that reaches attention has been expanded, and has no meaning of its own. So the inputs of the model are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingSeen:
    """Padding in the inputs of one call of the step."""

    tokens: int
    padded: int
    by: str
    """What told: the attention mask, or the padding token at the ends of the rows."""


def count_padding(model: nn.Module, calls: Sequence[Mapping[str, Any]]) -> PaddingSeen | None:
    """Count padded positions over the calls of the model in one step; None where no call had ``input_ids``.

    A two-dimensional ``attention_mask`` tells. Without one, as with packed rows, the padding tokens at either end of
    a row count, but for one each: the padding token is often the end token as well.
    """
    config: Any = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    tokens = padded = 0
    told: set[str] = set()
    for call in calls:
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        tokens += ids.numel()
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            padded += int(mask.eq(0).sum())
            told.add("attention_mask")
        elif isinstance(pad, int):
            padded += sum(_run(rows) for rows in (ids.eq(pad), ids.eq(pad).flip(1)))
            told.add(f"runs of token {pad} at the ends of the rows")
        else:
            told.add("nothing: neither attention_mask nor pad_token_id is there")
    if not tokens:
        return None
    return PaddingSeen(tokens=tokens, padded=padded, by=" and ".join(sorted(told)))


def _run(marked: Tensor) -> int:
    """Marked positions in a row from the left, one less in each row that has any."""
    lengths = marked.to(torch.long).cumprod(dim=1).sum(dim=1)
    return int((lengths - 1).clamp(min=0).sum())
