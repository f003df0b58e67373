"""How much of a batch is padding, which costs as much time as tokens do and teaches nothing.

Tokens a second, read off a batch that is mostly padding, are a number about the padding. No operator shows it: the
mask that reaches attention has been expanded, and has no meaning of its own. So the inputs of the model are read, and
none of them alone is believed: a mask of ones may lie over padded rows, and the token that pads need not be the one in
the configuration. What a mask hides is padding. So is a run of one token at either end of a record, if anything says
so: labels of -100 all over it, positions that stand still, or a configuration that names the token. A run of which
nothing says so may be text (``"!!!"``), and is counted apart; so is a single token there that is named as padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.check import name_some
from kernels_check.observe.inputs import (
    ModelCall,
    configurations,
    find_tokens,
    names_tokens,
    special_tokens,
    training_calls,
)
from kernels_check.observe.module_tree import attribute, every_module
from kernels_check.observe.records import PADDING, LayoutError, Records, find_records, hidden_by

_IGNORED = -100
"""The label that no loss is computed for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingSeen:
    """Padding in the inputs of the calls of one step."""

    tokens: int
    padded: int
    """Positions that are padding by all that is known."""
    doubtful: int = 0
    """Further positions at the end of a record, in runs of one token or of a token that pads, which may be text."""
    by: tuple[str, ...] = ()
    """What told."""
    by_call: tuple[tuple[int, int], ...] = ()
    """Padded positions and all positions of each call."""
    unseen: str | None = None
    """Why the tokens of a call could not be read."""


def count_padding(model: nn.Module, calls: Sequence[ModelCall]) -> PaddingSeen | None:
    """Count padded positions over the calls that were trained on; None where no call was seen."""
    trained = training_calls(calls)
    if not trained:
        return None
    named = _Named.by(model)
    told, counts, doubtful, unseen = set[str](), list[tuple[int, int]](), 0, None
    given = [one for outer in trained for one in outer.told(names_tokens) or [outer]]
    for call in [one for encoded in given for one in (encoded, *_decoded(encoded))]:
        counted = _Counted.read(call, named)
        if counted is None:
            unseen = f"a call of {type(call.module).__name__} was given no tokens of [rows, tokens]"
            continue
        if counted.unseen is not None:
            unseen = counted.unseen
        counts.append((int(counted.padded.sum()), counted.padded.numel()))
        doubtful += int(counted.doubtful.sum())
        told |= counted.told
    return PaddingSeen(
        tokens=sum(total for _, total in counts),
        padded=sum(padded for padded, _ in counts),
        doubtful=doubtful,
        by=tuple(sorted(told)),
        by_call=tuple(counts),
        unseen=unseen,
    )


def _decoded(call: ModelCall) -> Iterator[ModelCall]:
    """What an encoder-decoder decodes, which is padded by itself; without its own tokens it is made from the labels."""
    if not any(
        getattr(attribute(one, "config"), "is_encoder_decoder", False) is True for one in every_module(call.module)
    ):
        return
    labels, mask = (call.arguments.get(name) for name in ("labels", "decoder_attention_mask"))
    tokens = call.arguments.get("decoder_input_ids")
    if isinstance(tokens, Tensor) or isinstance(labels, Tensor):
        given = {"input_ids": labels if tokens is None else tokens, "labels": labels, "attention_mask": mask}
        yield replace(call, arguments=given)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """Tokens that the configuration names."""

    ends: frozenset[int]
    """They end texts, begin them, or pad."""
    pads: frozenset[int]
    """They pad, and are named for nothing else."""
    holders: frozenset[int]
    """They repeat for another reason, such as the places of an image."""

    @classmethod
    def by(cls, model: nn.Module) -> _Named:
        """Read the configurations of a model."""
        named = list(configurations(model))
        ends = special_tokens(named, ("pad", "eos", "bos"))
        others = special_tokens(named, but=("pad",))
        return cls(ends=ends, pads=ends - others, holders=others - ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The padding of one call, [rows, tokens]."""

    padded: Tensor
    doubtful: Tensor
    told: frozenset[str]
    unseen: str | None = None

    @classmethod
    def read(cls, call: ModelCall, tokens: _Named) -> _Counted | None:
        """Count one call; None where it had no tokens."""
        found = find_tokens(call.arguments)
        if found is None:
            return None
        rows, length = found[1].shape[:2]
        hidden = hidden_by(call.arguments.get("attention_mask"), rows, length)
        told = {"attention_mask"} if hidden is not None and bool(hidden.any()) else set()
        if found[1].is_floating_point():
            nothing = torch.zeros(rows, length, dtype=torch.bool)
            unseen = None
            if not told:  # a mask of ones may lie over anything
                unseen = (
                    f"{found[0]} of {list(found[1].shape)} hides the tokens, and no attention_mask tells any padding"
                )
            return cls(
                padded=nothing if hidden is None else hidden, doubtful=nothing, told=frozenset(told), unseen=unseen
            )
        ids = found[1]
        masked = torch.zeros_like(ids, dtype=torch.bool) if hidden is None else hidden.to(ids.device)
        numbers = _records(call, ids).numbers.to(ids.device)
        runs, spare = _end_runs(ids, numbers)
        runs &= ~_among(ids, tokens.holders)
        ignored = _ignored(call.arguments.get("labels"), runs, spare)
        still = runs & _standing(call.arguments.get("position_ids"), numbers)
        named = runs & ~spare & _among(ids, tokens.ends)
        by_mask = runs & ~spare & torch.isin(ids, ids[masked].unique())
        for what, where in (("labels of -100", ignored), ("positions that stand still", still)):
            told |= {what} if bool((where & ~masked).any()) else set()
        for token in ids[(named | by_mask) & ~masked].unique().tolist():
            told.add(f"runs of token {token} at the ends of the records")
        padded = masked | ignored | still | named | by_mask
        # Where a mask hides anything, it was made for these rows, and what else repeats in them is text.
        # The last before the text, too, and one alone: what is named as nothing but padding hardly is a word.
        nothing_else = (runs | _ends(numbers)) & _among(ids, tokens.pads)
        doubtful = ((runs & ~spare) | nothing_else) & ~padded & ~masked.any()
        return cls(padded=padded, doubtful=doubtful, told=frozenset(told))


def _records(call: ModelCall, ids: Tensor) -> Records:
    """The records, or each row as one where nothing tells."""
    rows, length = ids.shape
    try:
        found = find_records(call.arguments, rows, length)
    except LayoutError:
        found = None
    return found or Records(numbers=torch.zeros_like(ids, dtype=torch.long), by="rows")


def _among(ids: Tensor, tokens: frozenset[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))


def _end_runs(ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that repeat one another up to an end of their record, and of each such run the one that may be text.

    Padding is often done with the token that ends a text, so the one next to the text is spared; a run of one is none.
    """
    head, head_inner = _leading_runs(ids, numbers)
    tail, tail_inner = (one.flip(1) for one in _leading_runs(ids.flip(1), numbers.flip(1)))
    whole = head & tail  # one token over and over: its last is spared, as if padding came before it
    return (head | tail) & (numbers != PADDING), (head_inner & ~whole) | (tail_inner & ~whole) | (head_inner & whole)


def _ends(numbers: Tensor) -> Tensor:
    """The first and the last token of each record."""
    ends = torch.ones_like(numbers, dtype=torch.bool)
    ends[:, 1:-1] = (numbers[:, 1:-1] != numbers[:, :-2]) | (numbers[:, 1:-1] != numbers[:, 2:])
    return ends & (numbers != PADDING)


def _leading_runs(ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of two or more equal ones from the beginning of their record, and of those the last."""
    same, begins = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    same[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & ~begins[:, 1:]
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(begins, index, 0).cummax(dim=1).values
    broken = torch.where(~same & ~begins, index, -1).cummax(dim=1).values
    leading = broken < start  # nothing else has come since the record began
    follows = torch.zeros_like(leading)
    follows[:, :-1] = leading[:, 1:] & same[:, 1:]
    run = leading & (same | follows)
    return run, run & ~follows


def _ignored(labels: Any, runs: Tensor, spare: Tensor) -> Tensor:
    """Runs without a label, all of them but the one that may be text, while others have one."""
    if not isinstance(labels, Tensor) or labels.shape != runs.shape or not bool((labels != _IGNORED).any()):
        return torch.zeros_like(runs)
    return runs & ~spare & labels.eq(_IGNORED).to(runs.device)


def _standing(positions: Any, numbers: Tensor) -> Tensor:
    """Where a position is that of the token before or after it in the same record: each record begins at the same."""
    still = torch.zeros_like(numbers, dtype=torch.bool)
    if not isinstance(positions, Tensor) or positions.dim() not in (1, 2) or positions.shape[-1] != numbers.shape[1]:
        return still
    rows = (positions.unsqueeze(0) if positions.dim() == 1 else positions).expand_as(numbers).to(numbers.device)
    equal = (rows[:, 1:] == rows[:, :-1]) & (numbers[:, 1:] == numbers[:, :-1])
    still[:, 1:] |= equal
    still[:, :-1] |= equal
    return still


def describe(padding: PaddingSeen) -> str:
    """Both numbers, what told, and the calls where they differ."""
    share = padding.padded / padding.tokens if padding.tokens else 0.0
    by = f", told by {' and '.join(padding.by)}" if padding.by else ""
    text = f"{padding.padded} of {padding.tokens} positions ({share:.0%}) are padding{by}"
    if len(set(padding.by_call)) > 1:
        text += f" (by call: {name_some(f'{padded} of {total}' for padded, total in padding.by_call)})"
    if padding.doubtful:
        text += (
            f"; {padding.doubtful} more at the ends of records repeat one token, or are one that pads, and nothing "
            "says whether they are text"
        )
    return text
