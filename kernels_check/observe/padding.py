"""Assigns each token of a batch to its record and counts padding, from the inputs of the model.

The records of a packed row can be given in several ways: positions that restart, sequence numbers, cumulative lengths,
a mask with record numbers, or a block mask. The first of these that shows a boundary is used, because a model that
ignores it leaks between records.

None of the inputs alone shows padding: a mask of ones may cover padded rows, and the padding token need not be the
one in the configuration. Positions that a mask hides are padding. A run of one repeated token at either end of a record
is padding if all its labels are -100, its positions do not advance, or a configuration names the token. Any other run
may be text, and is counted separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_check.observe.loss import (
    ModelCall,
    configurations,
    find_tokens,
    names_tokens,
    special_tokens,
    training_calls,
)
from kernels_check.observe.modules import ModelTree

PADDING = -1
NUMBERED = ("seq_idx", "sequence_ids", "segment_ids", "document_ids")
CUMULATED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens")
_IGNORED = -100
"""The label that the loss ignores."""


class LayoutError(ValueError):
    """Raised if the input that gives the records does not fit the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The records of one batch."""

    numbers: Tensor
    """Record number of each token, [rows, tokens], from 0 in each row; ``PADDING`` for tokens outside all records."""
    by: str
    """Name of the input from which they were read."""

    @property
    def count(self) -> int:
        """Number of records in all rows."""
        return int((self.numbers.amax(dim=1) + 1).sum())

    @property
    def packed(self) -> bool:
        """Whether any row holds at least two records."""
        return bool(self.numbers.max() > 0)


def find_records(arguments: Mapping[str, Any], rows: int, tokens: int) -> Records | None:
    """Read the records of a batch; None if no input gives them.

    Raises:
        LayoutError: an input does not fit the tokens; the message has both shapes.
    """
    first: Records | None = None
    readers: dict[str, Callable[[str, Tensor, int, int], Tensor | None]] = {
        **dict.fromkeys(NUMBERED, _number_by_values),
        **dict.fromkeys(CUMULATED, _number_by_lengths),
        "position_ids": partial(_number_by_positions, ids=arguments.get("input_ids")),
        "attention_mask": _number_by_mask,
    }
    for name, read in readers.items():
        value = arguments.get(name)
        if isinstance(value, Mapping):  # a mask for each kind of layer
            value = next((one for one in value.values() if isinstance(one, Tensor)), None)
        numbers = read(name, value, rows, tokens) if isinstance(value, Tensor) else None
        if numbers is not None:
            found = Records(numbers=_without_padding(numbers, arguments), by=name)
            if found.packed:
                return found
            first = first or found
    return first


def _number_by_lengths(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    ends = value.flatten().to(torch.long)
    if not ends.numel() or int(ends.max()) > rows * tokens or bool((ends.diff() < 0).any()):
        raise LayoutError(f"{name} ends at {ends[-1:].tolist()}, and there are {rows} x {tokens} tokens")
    numbers = torch.bucketize(torch.arange(rows * tokens, device=value.device), ends, right=True)
    by_row = numbers.reshape(rows, tokens)
    return torch.where(by_row < ends.numel(), by_row - by_row[:, :1], PADDING)


def _number_by_positions(name: str, value: Tensor, rows: int, tokens: int, *, ids: Any) -> Tensor:
    if value.dim() == 3 and value.shape[0] == 3:  # time, height and width of images: they jump, and restart at zero
        restarts = value[:, :, 1:].eq(0).all(dim=0) & value[:, :, :-1].ne(0).any(dim=0)
        return _rows(name, pad(restarts.cumsum(dim=1), (1, 0)), rows, tokens)
    positions = value[0] if value.dim() == 3 else value  # the first plane is that of the text
    known = ids if isinstance(ids, Tensor) and ids.shape == (rows, tokens) else None
    return record_numbers(_rows(name, positions, rows, tokens), known)


def record_numbers(positions: Tensor, ids: Tensor | None = None) -> Tensor:
    """Number the records of each row from 0; a record starts wherever the position does not continue.

    A run of one repeated position, as in padding, counts as a single filler, not as one record per token; if ``ids``
    are given, the token must repeat as well.

    Args:
        positions: position ids, [rows, tokens].
        ids: the tokens, of the same shape.
    """
    begins = pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    alone = begins & pad(begins[:, 1:], (0, 1), value=True)
    repeated = alone[:, 1:] & alone[:, :-1] & (positions[:, 1:] == positions[:, :-1])
    if ids is not None:
        repeated &= ids[:, 1:] == ids[:, :-1]
    return pad((begins[:, 1:] & ~repeated).cumsum(dim=1), (1, 0))


def mask_to_bool(mask: Tensor) -> Tensor:
    """Convert a mask to booleans of the same shape, True where attention is allowed.

    Args:
        mask: boolean, of ones and zeros, or additive, in which nothing is above zero.
    """
    is_additive = mask.is_floating_point() and not bool((mask > 0).any())
    return mask > -1.0 if is_additive else mask != 0


def masked_positions(mask: Any, rows: int, length: int) -> Tensor | None:
    """Positions that no other position attends to, [rows, tokens]; None if the mask does not fit."""
    if isinstance(mask, Tensor) and mask.shape == (rows, length):
        return ~mask_to_bool(mask)
    if (
        not isinstance(mask, Tensor)
        or mask.dim() not in (3, 4)
        or mask.shape[-1] != length
        or len(mask) not in (1, rows)
    ):
        return None
    attended = mask_to_bool(mask) if mask.dim() == 3 else mask_to_bool(mask).any(dim=1)
    if attended.shape[1] == length:
        # Rows that attend to nothing are opened to everything, because their softmax is undefined; such rows hide no
        # others.
        opened = attended.all(dim=2, keepdim=True) & ~attended.all(dim=2).all(dim=1)[:, None, None]
        opened[:, -1] = False  # the last row of a causal mask attends to everything anyway
        attended = attended & ~opened
    return ~attended.any(dim=1).expand(rows, length)


def _number_by_mask(name: str, value: Tensor, rows: int, tokens: int) -> Tensor | None:
    if value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool and bool((value > 1).any()):
        return _number_by_values(name, value, rows, tokens)
    if value.dim() not in (3, 4) or value.shape[-2:] != (tokens, tokens):
        return None
    allowed = mask_to_bool(value)
    blocks = allowed if value.dim() == 3 else allowed.all(dim=1)  # a head that leaks does not hide a boundary
    numbers = pad((~blocks.diagonal(-1, dim1=1, dim2=2)).cumsum(dim=1), (1, 0))
    hidden = masked_positions(value, rows, tokens)
    unseen = ~blocks.diagonal(dim1=1, dim2=2).expand(rows, tokens)
    return _rows(name, numbers, rows, tokens).masked_fill(unseen if hidden is None else unseen | hidden, PADDING)


def _rows(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    """One value per token, for each row, also if all rows share the values."""
    shared = value.unsqueeze(0) if value.dim() == 1 else value
    if shared.dim() != 2 or shared.shape[1] != tokens or shared.shape[0] not in (1, rows):
        raise LayoutError(f"{name} of {list(value.shape)} does not fit tokens of {[rows, tokens]}")
    return shared.expand(rows, tokens)


def _number_by_values(name: str, value: Tensor, rows: int, tokens: int) -> Tensor:
    values = _rows(name, value, rows, tokens)
    return pad((values[:, 1:] != values[:, :-1]).cumsum(dim=1), (1, 0))


def _without_padding(numbers: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Remove the positions that a mask of [rows, tokens] hides, and renumber the rest from 0."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == numbers.shape:
        numbers = numbers.masked_fill(~mask_to_bool(mask), PADDING)
    is_token = numbers != PADDING
    before = pad(numbers[:, :-1], (1, 0), value=PADDING)
    renumbered = (is_token & (numbers != before)).cumsum(dim=1) - 1
    return torch.where(is_token, renumbered, PADDING)


@dataclass(slots=True, kw_only=True)
class PaddingRecord:
    """Padding in the inputs of the calls of one step."""

    by_call: list[tuple[int, int]] = field(default_factory=list)
    """Positions known to be padding, and all positions, of each call."""
    doubtful: int = 0
    """Further positions at the end of a record, in runs of one token or of a padding token, which may be text."""
    by: set[str] = field(default_factory=set)
    """The kinds of evidence in the inputs."""
    unseen: str | None = None
    """Why the tokens of a call could not be read."""

    @property
    def padded(self) -> int:
        """Padded positions of all calls."""
        return sum(padded for padded, _ in self.by_call)

    @property
    def tokens(self) -> int:
        """All positions of all calls."""
        return sum(total for _, total in self.by_call)


def count_padding(tree: ModelTree, calls: Sequence[ModelCall]) -> PaddingRecord | None:
    """Count padded positions over the calls that train; None if no call was observed."""
    trained = training_calls(calls)
    if not trained:
        return None
    configs, record = list(configurations(tree.model)), PaddingRecord()
    calls_with_tokens = [one for outer in trained for one in outer.matching(names_tokens) or [outer]]
    if any(getattr(config, "is_encoder_decoder", False) is True for config in configs):
        calls_with_tokens += [
            decoded
            for decoded in map(_decoder_call, calls_with_tokens)
            if isinstance(decoded.arguments["input_ids"], Tensor)
        ]
    ends, others = special_tokens(configs, ("pad", "eos", "bos")), special_tokens(configs, but=("pad",))
    for call in calls_with_tokens:
        name, tokens = find_tokens(call.arguments) or ("", None)
        if tokens is None:
            record.unseen = f"a call of {type(call.module).__name__} received no tokens of shape [rows, tokens]"
            continue
        hidden = masked_positions(call.arguments.get("attention_mask"), *tokens.shape[:2])
        padded = torch.zeros(tokens.shape[:2], dtype=torch.bool) if hidden is None else hidden.cpu()
        is_masked = bool(padded.any())
        record.by |= {"attention_mask"} if is_masked else set()
        if not tokens.is_floating_point():
            padded, doubtful = _add_runs(call, tokens.cpu(), padded, ends, others, record.by)
            record.doubtful += 0 if is_masked else int((doubtful & ~padded).sum())  # the mask was made for the rows
        elif not is_masked:  # a mask of ones proves nothing
            record.unseen = f"{name} of {list(tokens.shape)} hides the tokens, and no attention_mask shows any padding"
        record.by_call.append((int(padded.sum()), padded.numel()))
    return record


def _decoder_call(call: ModelCall) -> ModelCall:
    """The call of the decoder of an encoder-decoder, whose tokens have their own padding; without tokens, of the
    labels."""
    tokens, labels, mask = map(call.arguments.get, ("decoder_input_ids", "labels", "decoder_attention_mask"))
    arguments = {"input_ids": labels if tokens is None else tokens, "labels": labels, "attention_mask": mask}
    return replace(call, arguments=arguments)


def _add_runs(
    call: ModelCall, ids: Tensor, masked: Tensor, ends: Set[int], others: Set[int], signs: set[str]
) -> tuple[Tensor, Tensor]:
    """Add the runs of one token at the ends of records for which there is evidence of padding.

    Args:
        call: the call.
        ids: its tokens, [rows, tokens], on the CPU like all other tensors here.
        masked: positions that its mask hides.
        ends: tokens that end texts, begin them, or pad.
        others: tokens that the configuration names for other purposes than padding; some repeat, such as image
            placeholders.
        signs: the set to which the evidence is added.

    Returns:
        Positions that are padding, and positions that may be.
    """
    numbers = _records(call, ids).numbers.cpu()
    padded, doubtful = masked.clone(), torch.zeros_like(masked)
    unlabelled, unchanging = (
        _mask_unlabelled(call, ids),
        _unchanging_positions(call.arguments.get("position_ids"), numbers),
    )
    filler_tokens = {*ends, *ids[masked].tolist()}
    for row, run, inner in _end_runs(ids, numbers):
        token = int(ids[row, run.start])
        if token in others - ends:
            continue
        doubtful[row, run if token in ends - others else inner] = True  # a token used only for padding is no text
        evidence = (
            ("labels of -100", inner, unlabelled[row, inner]),
            ("positions that do not change", run, unchanging[row, run]),
            (f"runs of token {token} at the ends of the records", inner, masked.new_tensor(token in filler_tokens)),
        )
        for sign, where, shown in evidence if run.stop - run.start > 1 else ():
            signs |= {sign} if bool((shown & ~masked[row, where]).any()) else set()
            padded[row, where] |= shown
    return padded, doubtful


def _records(call: ModelCall, ids: Tensor) -> Records:
    """The records of a call; if no input gives them, each row is one record."""
    with suppress(LayoutError):
        if found := find_records(call.arguments, *ids.shape):
            return found
    return Records(numbers=torch.zeros_like(ids, dtype=torch.long), by="rows")


def _end_runs(ids: Tensor, numbers: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Each run of equal tokens at an end of a record: its row, its span, and its span without one token of the text.

    Padding often uses the end-of-text token, so the token next to the text is left out. If a record consists of one
    repeated token, its last token is left out, as with padding on the left.
    """
    for row, records in enumerate(numbers):
        lengths = records.unique_consecutive(return_counts=True)[1].tolist()
        for begin, length in zip(accumulate([0, *lengths]), lengths, strict=False):
            end = begin + length
            if records[begin] == PADDING:
                continue
            counts = ids[row, begin:end].unique_consecutive(return_counts=True)[1].tolist()
            yield row, slice(begin, begin + counts[0]), slice(begin, begin + counts[0] - 1)
            if len(counts) > 1:
                yield row, slice(end - counts[-1], end), slice(end - counts[-1] + 1, end)


def _mask_unlabelled(call: ModelCall, ids: Tensor) -> Tensor:
    """Tokens without a label, if other tokens have one."""
    labels = call.arguments.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return torch.zeros_like(ids, dtype=torch.bool)
    ignored = labels.eq(_IGNORED).cpu()
    return ignored & ~ignored.all()


def _unchanging_positions(positions: Any, numbers: Tensor) -> Tensor:
    """Where a position equals that of an adjacent token in the same record, and all records begin at the same
    position."""
    if not isinstance(positions, Tensor) or positions.dim() not in (1, 2) or positions.shape[-1] != numbers.shape[1]:
        return torch.zeros_like(numbers, dtype=torch.bool)
    rows = positions.expand_as(numbers).to(numbers.device)
    equal = (rows[:, 1:] == rows[:, :-1]) & (numbers[:, 1:] == numbers[:, :-1])
    return pad(equal, (1, 0)) | pad(equal, (0, 1))


def packed_or_all(calls: Sequence[ModelCall]) -> list[ModelCall]:
    """The calls that train: for each, the inner calls with packed records, or else those with tokens."""
    trained = training_calls(calls)
    return [
        one for call in trained for one in call.matching(has_packed_records) or call.matching(names_tokens) or [call]
    ]


def has_packed_records(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call contain two records in a row."""
    with suppress(LayoutError):
        records = find_packed_records(arguments)
        return records is not None and records.packed
    return False


def find_packed_records(arguments: Mapping[str, Any]) -> Records | None:
    """The records of one call; None if no argument gives them.

    Raises:
        LayoutError: an argument does not fit the tokens.
    """
    tokens = find_tokens(arguments)
    return None if tokens is None else find_records(arguments, *tokens[1].shape[:2])
