"""What a step shows: its parts, its tokens, and both as the reading of a step.

On a CPU a part is what the clock says. On a GPU the host runs ahead of the device, and waiting for it at each border
would change the step; so the device stamps the borders (events) and they are read once the step has ended. The wait for
data is the host's on either.

There is no one count of tokens. A row is as long as its longest neighbour, a mask hides some of it, a packed row has a
tail, and the loss is taken over a part again. So each count goes with its convention, which is printed.

Between two pieces of a training each line costs ten times what it costs in a loop, since it finds none of its
code in the caches. So nothing is worked out there: what may change meanwhile is copied or read, and all the rest is
kept as it is until the observer is informed of the steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from lorameter.attach.observer import ErrorGuard, StepReading

Part = Literal["data", "forward", "backward", "optimizer"]
Border = tuple[Part | None, bool, float, Any]
"""The part, whether it begins, the host's clock, and on a GPU an event. Without a part it is so many seconds that are
none's."""


class PhaseTimer:
    """A part of a step: it begins and ends by itself, or with a block. It keeps nothing of either, so one serves all of
    a training: a generator would be made and run twice in the middle of each step."""

    def __init__(self, parts: Parts, part: Part) -> None:
        self._parts = parts
        self._part = part

    def begin(self) -> None:
        """The part begins."""
        parts = self._parts
        parts.borders.append((self._part, True, time.perf_counter(), parts.stamp() if parts.cuda else None))

    def end(self, *error: object) -> None:
        """It has ended, with all that is inside it; nothing where it did not begin."""
        parts = self._parts
        parts.borders.append((self._part, False, time.perf_counter(), parts.stamp() if parts.cuda else None))

    __enter__ = begin
    __exit__ = end


class Parts:
    """Times of the parts of the step under way, each the sum over its occurrences. A part that begins inside another,
    as the passes of a closure do inside its optimizer's update, is none of that one's time."""

    def __init__(self, device: torch.device, shield: ErrorGuard) -> None:
        """`shield`: around what may fail, which on a CPU is nothing."""
        self._shield = shield
        self.cuda = device.type == "cuda"
        self.borders: list[Border] = []
        """Of the step under way, in their order; `Steps` begins them anew at its end."""
        self._begun: Border = ("forward", True, 0.0, None)
        self.during: Mapping[Part, PhaseTimer] = {part: PhaseTimer(self, part) for part in get_args(Part)}
        """Each part by its name."""

    def begin(self) -> None:
        """A step begins here."""
        self._begun = "forward", True, time.perf_counter(), self.stamp() if self.cuda else None

    def leave_out(self, seconds: float) -> None:
        """So much of what has just gone is no part of anything; what a device does meanwhile is its own."""
        self.borders.append((None, False, seconds, None))

    def begin_backward(self) -> None:
        """A backward pass begins, and what lies between it and the border before was its forward pass: for a loop whose
        forward passes are not seen by themselves."""
        place, (_, _, at, event) = next(
            ((place, border) for place, border in reversed([*enumerate(self.borders, 1)]) if border[0] is not None),
            (0, self._begun),
        )
        self.borders.insert(place, ("forward", True, at, event))
        now, stamp = time.perf_counter(), self.stamp() if self.cuda else None
        self.borders += [("forward", False, now, stamp), ("backward", True, now, stamp)]

    def stamp(self) -> Any:
        """An event of the device, here and now; None where that fails."""
        return self._shield.run(_new_event)


def _new_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def sum_parts(borders: Sequence[Border]) -> dict[Part, float]:
    """Seconds of each part that was seen; a part inside another is none of that one's time. The device must have done
    what it was asked."""
    found: dict[Part, float] = {}
    under_way: list[tuple[Part, float, Any]] = []
    """The innermost last, and when each began or went on."""
    for part, begins, at, event in borders:
        if part is None:
            if under_way and under_way[-1][2] is None:
                inner, begun, _ = under_way[-1]
                under_way[-1] = inner, begun + at, None
            continue
        if not begins and all(one != part for one, _, _ in under_way):
            continue
        if under_way:
            inner, begun, stamp = under_way[-1]
            spent = at - begun if stamp is None else stamp.elapsed_time(event) / 1e3
            found[inner] = found.get(inner, 0.0) + spent
        if begins:
            under_way.append((part, at, None if part == "data" else event))
            continue
        while under_way.pop()[0] != part:
            pass
        if under_way:
            outer, _, stamp = under_way[-1]
            under_way[-1] = outer, at, None if stamp is None else event
    return found


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


def count_tokens(copied: Copied) -> Tokens:
    """The tokens of a batch. Waits for its device."""
    if copied.shape is None:
        return Tokens(sequences=copied.sequences)
    rows, length = copied.shape
    labels = copied.labels
    per_token = labels is not None and labels.shape == copied.shape
    real, convention = rows * length, BY_ALL
    if copied.mask is not None:
        real, convention = _true_in(copied.mask != 0), BY_MASK
    elif copied.positions is not None and labels is not None and per_token:
        filler = (copied.positions == 0) & (labels == IGNORED)
        real, convention = real - _true_in(torch.cumprod(filler.flip(-1), dim=-1)), BY_POSITIONS
    if copied.shifted is not None:
        loss, over = _true_in(copied.shifted != IGNORED), (AS_GIVEN,)
    elif labels is None:
        return Tokens(rows, rows * length, real, None, (convention,))
    elif per_token:
        loss, over = _true_in(labels[:, 1:] != IGNORED), (SHIFTED,)
    else:
        loss, over = _true_in(labels != IGNORED), (AS_GIVEN,)
    return Tokens(rows, rows * length, real, loss, (convention, *over))


def _true_in(flags: torch.Tensor) -> int:
    return int(flags.sum())


def _shape_of(embedded: Any) -> torch.Size | None:
    return embedded.shape[:2] if type(embedded) is torch.Tensor and embedded.dim() == 3 else None


def _rows_of(batch: Mapping[str, Any]) -> int | None:
    """Of a batch that holds no text: rows of its first tensor."""
    return next((one.shape[0] for one in batch.values() if type(one) is torch.Tensor and one.dim()), None)


def _copy_of(value: Any, shape: torch.Size | None = None) -> torch.Tensor | None:
    """Of a plain tensor, since of a subclass nothing is known. `shape`: that it must have to be counted."""
    return value.clone() if type(value) is torch.Tensor and (shape is None or value.shape == shape) else None


class FinishedStep(NamedTuple):
    """A step that has ended; of all that cannot be changed a tuple is made the soonest."""

    number: int
    wall_s: float
    cpu_s: float
    borders: Sequence[Border]
    batches: Sequence[Copied]
    loss: float | None
    loss_dtype: torch.dtype | None
    gradient_norm: Any
    """A number, or a scalar of the device that no later step changes."""
    checks: tuple[Any, ...] | None


def reading_of(ended: FinishedStep) -> StepReading:
    """What a step showed. Waits for the device."""
    parts, norm = sum_parts(ended.borders), ended.gradient_norm
    tokens = [count_tokens(batch) for batch in ended.batches]
    counted = tokens[0] if len(tokens) == 1 else _together(tokens)
    return StepReading(
        number=ended.number,
        step_time_s=ended.wall_s,
        cpu_time_s=ended.cpu_s,
        data_time_s=parts.get("data"),
        forward_time_s=parts.get("forward"),
        backward_time_s=parts.get("backward"),
        optimizer_time_s=parts.get("optimizer"),
        sequences=counted.sequences,
        real_tokens=counted.real,
        padded_tokens=counted.padded,
        loss_tokens=counted.loss,
        loss=ended.loss,
        loss_dtype=None if ended.loss_dtype is None else _name_of(ended.loss_dtype),
        gradient_norm=None if norm is None else float(norm),
        conventions=counted.conventions,
        checks=ended.checks,
    )


def _together(tokens: Sequence[Tokens]) -> Tokens:
    """Those of all batches of a step."""
    return Tokens(
        sequences=_sum([one.sequences for one in tokens]),
        padded=_sum([one.padded for one in tokens]),
        real=_sum([one.real for one in tokens]),
        loss=_sum([one.loss for one in tokens]),
        conventions=tokens[-1].conventions if tokens else (),
    )


def _sum(counts: list[int | None]) -> int | None:
    """None where one of them was not seen, or there is none."""
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
