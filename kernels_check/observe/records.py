"""Which record each token of a packed batch belongs to, by what the model was given.

There is no one way to say it: positions that restart, numbers of the sequence, cumulated lengths, a mask that counts
the records, or a mask of blocks. A model that ignores them leaks, so the first of these that shows a boundary
is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

PADDING = -1
NUMBERED = ("seq_idx", "sequence_ids", "segment_ids", "document_ids")
CUMULATED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens")
PASSED_ON = "position_ids that restart at each record, seq_idx, cu_seq_lens_q, or an attention_mask of blocks"


class LayoutError(ValueError):
    """The input that gives the records does not fit the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The records of one batch."""

    numbers: Tensor
    """[rows, tokens], from 0 in each row; ``PADDING`` where there is no record."""
    by: str
    """Name of the input that gave them."""

    @property
    def count(self) -> int:
        """Of all rows together."""
        return int((self.numbers.amax(dim=1) + 1).sum())

    @property
    def packed(self) -> bool:
        """Whether any row holds two."""
        return bool(self.numbers.max() > 0)

    def places(self) -> tuple[Tensor, Tensor]:
        """Place of each token in its record, and length of the record, both [rows, tokens]."""
        index = torch.arange(self.numbers.shape[1], device=self.numbers.device).expand_as(self.numbers)
        begins = torch.ones_like(self.numbers, dtype=torch.bool)
        begins[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        place = index - torch.where(begins, index, 0).cummax(dim=1).values
        columns = self.numbers - PADDING
        lengths = torch.zeros(len(columns), int(columns.max()) + 1, dtype=torch.long, device=columns.device)
        lengths.scatter_add_(1, columns, torch.ones_like(columns))
        return place, lengths.gather(1, columns)


def find_records(arguments: Mapping[str, Any], rows: int, tokens: int) -> Records | None:
    """Read the records of a batch; None where nothing in it gives them.

    Raises:
        LayoutError: names what does not fit, with both shapes.
    """
    first: Records | None = None
    for name, value, read in _sources(arguments):
        numbers = read(name, value, rows, tokens)
        if numbers is None:
            continue
        found = Records(numbers=_without_padding(numbers, arguments), by=name)
        if found.packed:
            return found
        first = first or found
    return first


def record_numbers(positions: Tensor, ids: Tensor | None = None) -> Tensor:
    """Number the records of each row from 0; a record starts wherever the position does not continue.

    A position that is repeated over and over, as padding has it, is one filler and not a record a token; where tokens
    are known, as long as they are repeated, too.

    Args:
        positions: position ids, [rows, tokens].
        ids: the tokens, of the same shape.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    alone = begins.clone()
    alone[:, :-1] &= begins[:, 1:]
    repeated = alone[:, 1:] & alone[:, :-1] & (positions[:, 1:] == positions[:, :-1])
    if ids is not None:
        repeated &= ids[:, 1:] == ids[:, :-1]
    begins[:, 1:] &= ~repeated
    return begins.cumsum(dim=1) - 1


def allowed(mask: Tensor) -> Tensor:
    """A mask as a boolean of the same shape, True where attention is let through.

    Args:
        mask: boolean, of ones and zeros, or additive, in which nothing is above zero.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() and not bool((mask > 0).any()):
        return mask > -1.0
    return mask != 0


def hidden_by(mask: Any, rows: int, length: int) -> Tensor | None:
    """Positions that nothing attends to, [rows, tokens]; None where the mask does not fit."""
    if not isinstance(mask, Tensor):
        return None
    if mask.shape == (rows, length):
        return ~allowed(mask)
    if mask.dim() not in (3, 4) or mask.shape[-1] != length or mask.shape[0] not in (1, rows):
        return None
    seen = allowed(mask) if mask.dim() == 3 else allowed(mask).any(dim=1)
    if seen.shape[1] == length:
        # Rows that see nothing are opened to everything, or their softmax has no value: they hide no one else.
        opened = seen.all(dim=2, keepdim=True) & ~seen.all(dim=2).all(dim=1)[:, None, None]
        opened[:, -1] = False  # the last of a causal mask sees everything anyway
        seen = seen & ~opened
    return ~seen.any(dim=1).expand(rows, length)


_Read = Callable[[str, Tensor, int, int], "Tensor | None"]


def _sources(arguments: Mapping[str, Any]) -> Iterable[tuple[str, Tensor, _Read]]:
    readers: list[tuple[str, _Read]] = [(name, _numbered) for name in NUMBERED]
    readers += [(name, _cumulated) for name in CUMULATED]
    positioned = partial(_positioned, ids=arguments.get("input_ids"))
    readers += [("position_ids", positioned), ("attention_mask", _masked)]
    for name, read in readers:
        value = arguments.get(name)
        if isinstance(value, Mapping):  # a mask for each kind of layer
            value = next((one for one in value.values() if isinstance(one, Tensor)), None)
        if isinstance(value, Tensor):
            yield name, value, read


def _numbered(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    return _runs(_rows(name, value, rows, tokens))


def _cumulated(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    ends = value.flatten().to(torch.long)
    if not ends.numel() or int(ends.max()) > rows * tokens or bool((ends.diff() < 0).any()):
        raise LayoutError(f"{name} ends at {ends[-1:].tolist()}, and there are {rows} x {tokens} tokens")
    places = torch.arange(rows * tokens, device=value.device)
    numbers = torch.bucketize(places, ends, right=True)
    inside = numbers < ends.numel()
    by_row = numbers.reshape(rows, tokens)
    return torch.where(inside.reshape(rows, tokens), by_row - by_row[:, :1], PADDING)


def _positioned(name: str, value: Tensor, rows: int, tokens: int, *, ids: Any) -> Tensor:
    if value.dim() == 3 and value.shape[0] == 3:  # time, height and width of images: they jump, and restart at zero
        restarts = value.eq(0).all(dim=0)
        restarts[:, 1:] &= value[:, :, :-1].ne(0).any(dim=0)
        restarts[:, 0] = True
        return _rows(name, restarts.cumsum(dim=1) - 1, rows, tokens)
    if value.dim() == 3:
        value = value[0]  # the first plane is that of the text
    known = ids if isinstance(ids, Tensor) and ids.shape == (rows, tokens) else None
    return record_numbers(_rows(name, value, rows, tokens), known)


def _masked(name: str, value: Tensor, rows: int, tokens: int) -> Tensor | None:
    if value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool and bool((value > 1).any()):
        return _runs(_rows(name, value, rows, tokens))
    if value.dim() not in (3, 4) or value.shape[-2:] != (tokens, tokens):
        return None
    blocks = allowed(value if value.dim() == 3 else value[:, 0])
    seen_before = blocks.diagonal(-1, dim1=1, dim2=2)
    begins = torch.ones(blocks.shape[:2], dtype=torch.bool, device=value.device)
    begins[:, 1:] = ~seen_before
    numbers = begins.cumsum(dim=1) - 1
    hidden = hidden_by(value, rows, tokens)
    unseen = ~blocks.diagonal(dim1=1, dim2=2).expand(rows, tokens)
    return _rows(name, numbers, rows, tokens).masked_fill(unseen if hidden is None else unseen | hidden, PADDING)


def _rows(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    """One value a token, for each row, also where all rows share them."""
    shared = value.unsqueeze(0) if value.dim() == 1 else value
    if shared.dim() != 2 or shared.shape[1] != tokens or shared.shape[0] not in (1, rows):
        raise LayoutError(f"{name} of {list(value.shape)} does not fit tokens of {[rows, tokens]}")
    return shared.expand(rows, tokens)


def _runs(values: Tensor) -> Tensor:
    begins = torch.zeros_like(values, dtype=torch.long)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    return begins.cumsum(dim=1)


def _without_padding(numbers: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Take out what a mask of [rows, tokens] hides, and number the rest from 0 again."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == numbers.shape:
        numbers = numbers.masked_fill(~allowed(mask), PADDING)
    kept = numbers != PADDING
    before = torch.cat([torch.full_like(numbers[:, :1], PADDING), numbers[:, :-1]], dim=1).masked_fill(~kept, PADDING)
    renumbered = (kept & (numbers != before)).cumsum(dim=1) - 1
    return torch.where(kept, renumbered, PADDING)
