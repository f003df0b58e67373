"""How many tokens a batch holds, by what the batch itself says: mask, position ids, labels.

There is no one count of tokens. A row is as long as its longest neighbour, a mask hides some of it, a packed row has a
tail, and the loss is taken over a part again. So each count goes with its convention, which is printed.

Nothing waits for the device here: counts that a kernel makes are scalars on the device until the step has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
"""The label that torch's cross entropy leaves out by default, and every trainer with it."""
BY_MASK = "real tokens are the positions that the attention mask keeps"
BY_POSITIONS = "no attention mask: real tokens are all positions but the last of a row with position id 0 and no label"
BY_ALL = "neither attention mask nor position ids: every position counts as real"
SHIFTED = "the loss is over the labels that are not -100, the first of each row left out"
AS_GIVEN = "the loss is over the labels that are not -100"

Count = int | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Of one batch; a tensor is a scalar that may still be computed on the device, None is not seen."""

    sequences: int | None = None
    padded: int | None = None
    """All positions, padding included."""
    real: Count | None = None
    loss: Count | None = None
    conventions: tuple[str, ...] = ()
    """In words; empty where nothing was counted."""


def count_tokens(batch: Any) -> Tokens:
    """The tokens of a batch.

    Args:
        batch: a mapping with `input_ids` (rows, positions) or `inputs_embeds` (rows, positions, width) and, where there
            are such, `attention_mask`, `position_ids`, `labels`; or a sequence whose first item is a tensor of whole
            numbers (rows, positions). Of anything else nothing is counted.
    """
    fields = _fields_of(batch)
    ids = fields.get("input_ids")
    shape = ids.shape if ids is not None else _shape_of(fields.get("inputs_embeds"))
    if shape is None or len(shape) != 2:
        return Tokens(sequences=_rows_of(fields))
    labels = fields.get("labels")
    real, by = _real(fields, shape, labels)
    loss, over = _loss_tokens(labels, fields.get("shift_labels"), shape)
    return Tokens(
        sequences=shape[0],
        padded=shape[0] * shape[1],
        real=real,
        loss=loss,
        conventions=(by, *([over] if over else [])),
    )


def _fields_of(batch: Any) -> dict[str, torch.Tensor]:
    """The plain tensors of a batch by their names; of a subclass of tensors nothing is known."""
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        if isinstance(first, Mapping):
            return _fields_of(first)
        whole = _is_plain(first) and not first.is_floating_point() and first.dim() == 2
        return {"input_ids": first} if whole else {}
    if not isinstance(batch, Mapping):
        return {}
    return {key: value for key, value in batch.items() if isinstance(key, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor


def _shape_of(embedded: torch.Tensor | None) -> torch.Size | None:
    return embedded.shape[:2] if embedded is not None and embedded.dim() == 3 else None


def _rows_of(fields: Mapping[str, torch.Tensor]) -> int | None:
    """Of a batch that holds no text: rows of its first tensor."""
    return next((tensor.shape[0] for tensor in fields.values() if tensor.dim()), None)


def _real(fields: Mapping[str, torch.Tensor], shape: torch.Size, labels: torch.Tensor | None) -> tuple[Count, str]:
    mask, positions = fields.get("attention_mask"), fields.get("position_ids")
    if mask is not None and mask.shape == shape:
        return torch.count_nonzero(mask), BY_MASK
    if positions is None or positions.shape != shape or labels is None or labels.shape != shape:
        return shape[0] * shape[1], BY_ALL
    filler = (positions == 0) & (labels == IGNORED)
    tail = torch.cumprod(filler.flip(-1), dim=-1).sum()
    return shape[0] * shape[1] - tail, BY_POSITIONS


def _loss_tokens(
    labels: torch.Tensor | None, shifted: torch.Tensor | None, shape: torch.Size
) -> tuple[Count | None, str]:
    if shifted is not None:
        return (shifted != IGNORED).sum(), AS_GIVEN
    if labels is None:
        return None, ""
    if labels.shape == shape:
        return (labels[:, 1:] != IGNORED).sum(), SHIFTED
    return (labels != IGNORED).sum(), AS_GIVEN
