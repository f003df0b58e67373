"""How many tokens a batch holds, by what the batch itself says: mask, position ids, labels.

There is no one count of tokens. A row is as long as its longest neighbour, a mask hides some of it, a packed row has a
tail, and the loss is taken over a part again. So each count goes with its convention, which is printed.

In a step there is no time for that: what counts of a batch is copied there, and counted once the step is told. A copy
it must be, since a script may fill the same tensors with its next batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100
"""The label that torch's cross entropy leaves out by default, and every trainer with it."""
BY_MASK = "real tokens are the positions that the attention mask keeps"
BY_POSITIONS = "no attention mask: real tokens are all positions but the last of a row with position id 0 and no label"
BY_ALL = "neither attention mask nor position ids: every position counts as real"
SHIFTED = "the loss is over the labels that are not -100, the first of each row left out"
AS_GIVEN = "the loss is over the labels that are not -100"


class Copied(NamedTuple):
    """What counts of one batch. A tuple is made sooner than a dataclass is."""

    sequences: int | None = None
    shape: torch.Size | None = None
    """Rows and positions; None where it is no text."""
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    shifted: torch.Tensor | None = None
    """Labels that were shifted before."""


class Tokens(NamedTuple):
    """Of one batch; None is not seen. A tuple, as what was copied."""

    sequences: int | None = None
    padded: int | None = None
    """All positions, padding included."""
    real: int | None = None
    loss: int | None = None
    conventions: tuple[str, ...] = ()
    """In words; empty where nothing was counted."""


def copy_batch(batch: Any) -> Copied:
    """Copy what counts of a batch, on the batch's own device, for which nothing waits.

    Args:
        batch: a mapping with `input_ids` (rows, positions) or `inputs_embeds` (rows, positions, width) and, where there
            are such, `attention_mask`, `position_ids`, `labels`, `shift_labels`; or a sequence whose first item is a
            tensor of whole numbers (rows, positions). Of anything else nothing is counted.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping):
        whole = type(batch) is torch.Tensor and batch.dim() == 2 and not batch.is_floating_point()
        return Copied(batch.shape[0], batch.shape) if whole else Copied()
    ids = batch.get("input_ids")
    shape = ids.shape if type(ids) is torch.Tensor else _shape_of(batch.get("inputs_embeds"))
    if shape is None or len(shape) != 2:
        return Copied(_rows_of(batch))
    mask = _copy_of(batch.get("attention_mask"), shape)
    positions = _copy_of(batch.get("position_ids"), shape) if mask is None else None
    labels, shifted = _copy_of(batch.get("labels")), _copy_of(batch.get("shift_labels"))
    return Copied(shape[0], shape, mask, positions, labels, shifted)


def count_tokens(copies: Sequence[Copied]) -> list[Tokens]:
    """The tokens of each batch; those in a row that are alike are counted at once. Waits for their device."""
    return [tokens for _, alike in itertools.groupby(copies, _form) for tokens in _count(list(alike))]


def _form(copied: Copied) -> tuple[Any, ...]:
    """Of batches that can be counted at once it is the same."""
    _, shape, mask, positions, labels, shifted = copied
    return shape, _kind_of(mask), _kind_of(positions), _kind_of(labels), _kind_of(shifted)


def _kind_of(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _count(alike: Sequence[Copied]) -> Sequence[Tokens]:
    shape = alike[0].shape
    if shape is None:
        return [Tokens(sequences=one.sequences) for one in alike]
    real, by = _real(alike, shape)
    loss, over = _loss_tokens(alike, shape)
    padded, conventions = shape[0] * shape[1], (by, *([over] if over else []))
    return [
        Tokens(sequences=shape[0], padded=padded, real=real_here, loss=loss_here, conventions=conventions)
        for real_here, loss_here in zip(real, loss, strict=True)
    ]


def _shape_of(embedded: Any) -> torch.Size | None:
    return embedded.shape[:2] if type(embedded) is torch.Tensor and embedded.dim() == 3 else None


def _rows_of(batch: Mapping[str, Any]) -> int | None:
    """Of a batch that holds no text: rows of its first tensor."""
    return next((one.shape[0] for one in batch.values() if type(one) is torch.Tensor and one.dim()), None)


def _copy_of(value: Any, shape: torch.Size | None = None) -> torch.Tensor | None:
    """Of a plain tensor, since of a subclass nothing is known. `shape`: that it must have to be counted."""
    return value.clone() if type(value) is torch.Tensor and (shape is None or value.shape == shape) else None


def _real(alike: Sequence[Copied], shape: torch.Size) -> tuple[Sequence[int], str]:
    all_positions = shape[0] * shape[1]
    first = alike[0]
    if first.mask is not None:
        return _true_in(_stack(alike, "mask") != 0), BY_MASK
    if first.positions is None or first.labels is None or first.labels.shape != shape:
        return [all_positions] * len(alike), BY_ALL
    filler = (_stack(alike, "positions") == 0) & (_stack(alike, "labels") == IGNORED)
    tails = _true_in(torch.cumprod(filler.flip(-1), dim=-1))
    return [all_positions - tail for tail in tails], BY_POSITIONS


def _loss_tokens(alike: Sequence[Copied], shape: torch.Size) -> tuple[Sequence[int | None], str]:
    first = alike[0]
    if first.shifted is not None:
        return _true_in(_stack(alike, "shifted") != IGNORED), AS_GIVEN
    if first.labels is None:
        return [None] * len(alike), ""
    labels = _stack(alike, "labels")
    if first.labels.shape == shape:
        return _true_in(labels[:, :, 1:] != IGNORED), SHIFTED
    return _true_in(labels != IGNORED), AS_GIVEN


def _stack(alike: Sequence[Copied], name: str) -> torch.Tensor:
    return torch.stack([getattr(one, name) for one in alike])


def _true_in(stacked: torch.Tensor) -> list[int]:
    """How many are true in each of what was stacked."""
    found: list[int] = stacked.reshape(len(stacked), -1).sum(dim=1).tolist()
    return found
