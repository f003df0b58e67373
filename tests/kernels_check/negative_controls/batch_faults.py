"""Batches, and ways to pass them, that leak between records or are mostly padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from negative_controls.faults import pad
from negative_controls.small_run import PAD_TOKEN, SmallRun

_FOREIGN_PAD = 5
"""A padding token other than the configuration's."""


def pack(run: SmallRun, **more: Any) -> None:
    """Pack two records into a row, marked by positions that restart."""
    import torch

    positions = torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]])
    run.inputs |= {"position_ids": positions.to(run.inputs["input_ids"].device), **more}
    run.packed = dict(run.inputs)


def pack_without_cache(run: SmallRun) -> None:
    """Pack without a cache, so that the mask follows from the positions, as it should."""
    pack(run, use_cache=False)


def then_pass_a_mask_of_ones(run: SmallRun) -> None:
    """Pass a mask of ones, as a tokenizer returns it, which removes the record boundaries."""
    run.inputs |= {"attention_mask": run.inputs["input_ids"].new_ones(run.inputs["input_ids"].shape)}


def accumulate(**more: Any) -> Callable[[SmallRun], None]:
    """Accumulate over another batch that is passed in another way."""

    def change(run: SmallRun) -> None:
        run.accumulated = [run.inputs | more]

    return change


def mask_blocks(run: SmallRun, *, lost: int | None = None) -> None:
    """Pack four records into a row, marked by a block mask.

    Args:
        run: to be changed.
        lost: number of a record that attends to the previous one.
    """
    import torch

    ids = run.inputs["input_ids"]
    numbers = torch.arange(ids.shape[1], device=ids.device) // 4
    merged = torch.where(numbers == lost, numbers - 1, numbers) if lost is not None else numbers
    mask = merged[:, None] == merged[None, :]
    positions = torch.arange(4, device=ids.device).repeat(len(ids), ids.shape[1] // 4)
    shape = len(ids), 1, ids.shape[1], ids.shape[1]
    mask = mask.tril().expand(shape)
    run.inputs |= {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    run.packed = dict(run.inputs)


def lose_a_boundary(run: SmallRun) -> None:
    """Merge two records, neither of them the first, in the block mask."""
    mask_blocks(run, lost=3)


def pad_most(run: SmallRun) -> None:
    """Pad all rows but one, with one long record among short ones."""
    import torch

    ids = run.inputs["input_ids"]
    run.inputs = {"input_ids": torch.cat([ids, ids.flip(1), ids])}
    pad(run, real=2)


def hide_in_ones(run: SmallRun) -> None:
    """Pad most of the batch, with a mask that marks no padding."""
    pad_most(run)
    run.inputs["attention_mask"].fill_(1)


def pad_with_another_token(run: SmallRun) -> None:
    """Pad with a token other than the configuration's, which only the labels show."""
    pad_most(run)
    hidden = run.inputs.pop("attention_mask").eq(0)
    ids = run.inputs["input_ids"].masked_fill(hidden, _FOREIGN_PAD)
    run.inputs = {"input_ids": ids, "labels": ids.masked_fill(hidden, -100)}


def label_the_answer(run: SmallRun) -> None:
    """Label a prompt with -100, which is not padding."""
    ids = run.inputs["input_ids"]
    labels = ids.clone()
    labels[:, :12] = -100
    run.inputs = {"input_ids": ids, "labels": labels}


def fill_the_row_up(run: SmallRun) -> None:
    """Pack two short records into a row, with padding that is marked as a third record."""
    import torch

    ids = run.inputs["input_ids"].clone()
    ids[:, 6:] = PAD_TOKEN
    positions = torch.tensor([*range(3), *range(3), *range(10)], device=ids.device).expand_as(ids)
    run.inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
