"""Determines which of the loaded batches a step has used, and counts their tokens.

Tokens can be counted in several ways: rows are padded to the longest row, a mask hides some positions, and a packed row
has an unused tail. So each count has a convention, which is printed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

IGNORED = -100
"""The label that torch's cross entropy ignores by default, and which all trainers use."""
BY_MASK = "real tokens are the positions that the attention mask keeps"
BY_POSITIONS = "no attention mask: real tokens are all positions but the last of a row with position id 0 and no label"
BY_ALL = "neither attention mask nor position ids: every position counts as real"


class BatchParts(NamedTuple):
    """The parts of a batch from which tokens are counted. A tuple is faster to make than a dataclass."""

    sequences: int | None = None
    shape: torch.Size | None = None
    """Rows and positions; None if the batch is not text."""
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    """They tell filler from the first token of a record, whose position is 0 as well."""


class Tokens(NamedTuple):
    """Token counts of one step, by the field names of `StepReading`; None if not observed."""

    sequences: int | None = None
    padded_tokens: int | None = None
    real_tokens: int | None = None
    conventions: tuple[str, ...] = ()


def copy_batch(batch: Any) -> BatchParts:
    """Copy the parts of a batch from which tokens are counted, on its own device and without synchronisation.

    Args:
        batch: a mapping with `input_ids` (rows, positions) or `inputs_embeds` (rows, positions, width) and optionally
            `attention_mask`, `position_ids`, `labels`; or a sequence whose first item is an integer tensor (rows,
            positions). For any other object, no tokens are counted.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, (dict, Mapping)):  # the first is decided without a call of Python
        whole = type(batch) is torch.Tensor and batch.dim() == 2 and not batch.is_floating_point()
        return BatchParts(batch.shape[0], batch.shape) if whole else BatchParts()
    ids, vectors = batch.get("input_ids"), batch.get("inputs_embeds")
    shape = ids.shape if type(ids) is torch.Tensor else None
    if shape is None and type(vectors) is torch.Tensor:
        shape = vectors.shape[:-1]
    if shape is None or len(shape) != 2:
        tensors = (value for value in batch.values() if type(value) is torch.Tensor and value.dim())
        return BatchParts(next((tensor.shape[0] for tensor in tensors), None))
    mask = _copy_tensor(batch.get("attention_mask"), shape)
    positions = _copy_tensor(batch.get("position_ids"), shape) if mask is None else None
    labels = None if positions is None else _copy_tensor(batch.get("labels"), shape)
    return BatchParts(shape[0], shape, mask, positions, labels)


def _copy_tensor(value: Any, shape: torch.Size) -> torch.Tensor | None:
    """A copy of a plain tensor of this shape; None for any other object, such as a subclass."""
    return value.clone() if type(value) is torch.Tensor and value.shape == shape else None


def count_tokens(copied: BatchParts) -> Tokens:
    """The tokens of a batch. Waits for its device."""
    if copied.shape is None:
        return Tokens(copied.sequences)
    rows, length = copied.shape
    real, convention = rows * length, BY_ALL
    if copied.mask is not None:
        real, convention = int(torch.count_nonzero(copied.mask)), BY_MASK
    elif copied.positions is not None and copied.labels is not None:
        filler = (copied.positions == 0) & (copied.labels == IGNORED)
        real, convention = real - int(torch.cumprod(filler.flip(-1), dim=-1).sum()), BY_POSITIONS
    return Tokens(rows, rows * length, real, (convention,))


def total_tokens(batches: Sequence[BatchParts]) -> Tokens:
    """The tokens of all batches of a step; a count that one of them lacks is None."""
    found = [count_tokens(batch) for batch in batches]
    if len(found) == 1:
        return found[0]
    return Tokens(
        sequences=sum_known([tokens.sequences for tokens in found]),
        padded_tokens=sum_known([tokens.padded_tokens for tokens in found]),
        real_tokens=sum_known([tokens.real_tokens for tokens in found]),
        conventions=found[-1].conventions if found else (),
    )


def sum_known(counts: Sequence[int | None]) -> int | None:
    """The sum of counts; None if there are none, or if one of them is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


MAX_AHEAD = 64
"""Maximum batches of one loader that no backward pass has used yet; if there are more, the oldest are dropped."""


@dataclass(slots=True)
class _Loader:
    """An iterator of a DataLoader."""

    unused: deque[BatchParts]
    """Batches that no backward pass has used yet."""
    observed_late: bool
    """Whether it had loaded batches before it was observed."""
    loaded: int = 0
    """Number of batches that it has loaded in this step."""
    trains: bool = False
    """Whether any batch was used."""
    ended: bool = False


class Loaders:
    """Tracks which of the loaded batches a step has used. A loader may be ahead of the training by one or more batches,
    so each backward pass uses the oldest batch of each loader."""

    def __init__(self) -> None:
        self._loaders: dict[int, _Loader] = {}
        """By the id of their iterators."""

    def put(self, iterator: Any, batch: BatchParts) -> None:
        """Record that the iterator has loaded a batch."""
        key, loaded = id(iterator), getattr(iterator, "_num_yielded", 1)
        if loaded <= 1 or key not in self._loaders:
            self._loaders[key] = _Loader(
                deque([BatchParts()] * (loaded - 1), maxlen=MAX_AHEAD), observed_late=loaded > 1
            )
        self._loaders[key].unused.append(batch)
        self._loaders[key].loaded += 1

    def end(self, iterator: Any) -> None:
        """Record that the iterator is exhausted. If no pass has used any of its batches, it belongs to an
        evaluation."""
        loader = self._loaders.get(id(iterator))
        if loader is not None and loader.trains:
            loader.ended = True
        else:
            self._loaders.pop(id(iterator), None)

    def take(self) -> list[BatchParts]:
        """The batches that a backward pass uses, as far as known."""
        ready = [loader for loader in self._loaders.values() if loader.unused]
        for loader in ready:
            loader.trains = True
        return [loader.unused.popleft() for loader in ready if not loader.observed_late]

    def end_step(self) -> list[BatchParts]:
        """The other batches that the step has used: all but the newest batch of each loader, which may be loaded ahead.
        The first observed step, like the unobserved one before it, has used as many batches as it has loaded."""
        found = []
        for loader in self._loaders.values():
            if loader.observed_late and loader.trains:
                loader.observed_late, batches = False, [*loader.unused][loader.loaded :]
                found += batches[: loader.loaded]
                loader.unused = deque(batches[loader.loaded :], maxlen=MAX_AHEAD)
            while len(loader.unused) > 1:
                found.append(loader.unused.popleft())
            loader.loaded = 0
        self._loaders = {key: loader for key, loader in self._loaders.items() if loader.unused or not loader.ended}
        return found
