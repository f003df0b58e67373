"""Batches from a prepared token file, in a fixed order: every variant trains on the same stream.

The file is mapped once; a batch is a view of it. With flash-attn the rows of a packed batch are joined into one, since
its variable-length kernel takes a single row with any number of isolated records (transformers detects them by the
positions).

Ranks that train together read the same file, and each takes its own rows of every batch. So together they train on the
same stream as a single rank, and each knows its share of a batch's loss without communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorameter.studies.variant import Variant
from lorameter.studies.workload import Layout, Workload
from lorameter.trial.data.tokens import IGNORED

Batch = dict[str, torch.Tensor]
_KEYS: dict[Layout, tuple[str, ...]] = {
    "packed": ("input_ids", "labels", "position_ids"),
    "padded": ("input_ids", "labels", "attention_mask"),
    "joined": ("input_ids", "labels"),
    "bucketed": ("input_ids", "labels", "attention_mask"),
}
"""The tensors of a batch that are passed to the model."""


class TokenStream:
    """Endless training batches, held-out batches and prompts of one token file; training batches contain the rows of
    one rank (`rank` of `ranks`)."""

    def __init__(
        self, path: Path, workload: Workload, variant: Variant, device: str, *, rank: int = 0, ranks: int = 1
    ) -> None:
        self._tensors = load_file(path)
        self._workload = workload
        self._device = device
        self._in_one_row = workload.layout == "packed" and variant.attention == "flash_attention_2"
        self._next = 0
        self._rank, self.ranks = rank, ranks
        self._labelled = (self._tensors["train.labels"][:, 1:] != IGNORED).sum(dim=1)
        self.sequences = len(self._tensors["train.input_ids"])
        """Sequences in one epoch."""
        self.prompt_count = len(self._tensors["prompts"])
        """Number of prompts of a fixed length."""
        self.open_ended_prompt_count = len(self._tensors.get("open_ended.length", ()))
        """Number of whole prompts."""
        self.real_tokens = 0
        """Real tokens used for training so far."""
        self.padded_tokens = 0

    def take(self) -> Batch:
        """The next training batch; after the last sequence the stream starts again."""
        return self.take_share()[0]

    def take_share(self) -> tuple[Batch, float]:
        """The next training batch of this rank, and its share of the labelled tokens of all ranks."""
        all_rows = self._rows(self._next, self._workload.batch_size)
        self._next = (all_rows[-1] + 1) % self.sequences
        size = len(all_rows) // self.ranks
        rows = all_rows[self._rank * size : (self._rank + 1) * size]
        mask = self._tensors["train.attention_mask"][rows][:, : self._length("train", all_rows)]
        real = int(mask.sum())
        self.real_tokens += real
        self.padded_tokens += mask.numel() - real
        share = 1.0 if self.ranks == 1 else float(self._labelled[rows].sum() / self._labelled[all_rows].sum())
        return self._batch("train", rows, self._length("train", all_rows)), share

    def upcoming(self, batches: int) -> torch.Tensor:
        """Token ids of the sequences of the next batches, of all ranks together; shape (sequences, tokens)."""
        ids: torch.Tensor = self._tensors["train.input_ids"][
            self._rows(self._next, batches * self._workload.batch_size)
        ]
        return ids

    def _rows(self, start: int, count: int) -> list[int]:
        return [(start + offset) % self.sequences for offset in range(count)]

    def record_lengths(self) -> tuple[int, ...]:
        """Real tokens of every record, or piece of one, in one epoch: attention is causal within each of them."""
        positions = self._tensors["train.position_ids"][self._tensors["train.attention_mask"].bool()]
        starts = (positions == 0).nonzero().flatten().tolist()
        return tuple(end - start for start, end in pairwise([*starts, len(positions)]))

    def position(self) -> tuple[int, int, int]:
        """The position of the stream, for `restore`."""
        return self._next, self.real_tokens, self.padded_tokens

    def restore(self, position: tuple[int, int, int]) -> None:
        """Return to an earlier `position`, so that batches used by a check are also trained on."""
        self._next, self.real_tokens, self.padded_tokens = position

    def held_out(self) -> Iterator[Batch]:
        """All held-out batches, in order; the last may be smaller."""
        count, size = int(self._tensors["held_out.input_ids"].shape[0]), self._workload.batch_size
        for start in range(0, count, size):
            yield self._batch("held_out", list(range(start, min(start + size, count))))

    def packed_batch(self, rows: int | None = None) -> Batch | None:
        """A training batch whose first row has at least two records, for the isolation probe; None if there is none.
        Its default number of rows is that of a step."""
        starts = (self._tensors["train.position_ids"] == 0).sum(dim=1)
        most = self._workload.batch_size // self.ranks if rows is None else rows
        chosen = [int(row) for row in starts.argsort(descending=True)[:most]]
        if self._workload.layout != "packed" or starts[chosen[0]] < 2:
            return None
        return self._batch("train", chosen)

    def prompts(self, index: int) -> torch.Tensor:
        """The prompts of request `index`, shape (request_batch, prompt_tokens); requests use the prompts in turn."""
        batch = self._workload.request_batch
        return torch.cat([self.prompt(index * batch + place) for place in range(batch)])

    def prompt(self, index: int) -> torch.Tensor:
        """Prompt `index` alone (modulo their number), shape (1, prompt_tokens)."""
        row: torch.Tensor = self._tensors["prompts"][index % self.prompt_count]
        return row.unsqueeze(0).to(self._device)

    def open_ended_prompt(self, index: int) -> torch.Tensor:
        """Whole prompt `index` (modulo their number), shape (1, its own length)."""
        number = index % self.open_ended_prompt_count
        row: torch.Tensor = self._tensors["open_ended.input_ids"][number]
        return row[: int(self._tensors["open_ended.length"][number])].unsqueeze(0).to(self._device)

    def _length(self, split: str, rows: list[int]) -> int | None:
        """The length to which these rows are truncated: that of the longest in the bucketed layout, else None."""
        if self._workload.layout != "bucketed":
            return None
        return int(self._tensors[f"{split}.attention_mask"][rows].sum(dim=1).max())

    def _batch(self, split: str, rows: list[int], length: int | None = None) -> Batch:
        batch = {key: self._tensors[f"{split}.{key}"][rows][:, :length] for key in _KEYS[self._workload.layout]}
        if self._in_one_row:
            batch = {key: value.reshape(1, -1) for key, value in batch.items()}
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}
