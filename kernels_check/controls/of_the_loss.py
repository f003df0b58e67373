"""Controls of what the loss is over, where a step takes several passes."""

from __future__ import annotations

from functools import partial
from typing import Any

from kernels_check.controls.control import Control, small
from kernels_check.controls.small_run import SmallRun

_FIRST, _SECOND = 12, 4
"""Tokens with a label in each row of the two passes."""


def accumulate(
    run: SmallRun, *, told: bool = False, weighed: bool = False, divided: bool = True, even: bool = False
) -> None:
    """Two passes before each update, of which the second has fewer tokens with a label.

    Args:
        run: to be changed.
        told: whether each forward is told the tokens of both.
        weighed: whether each loss is multiplied by its share of them.
        divided: whether each loss is divided by the number of passes, where it is neither told nor weighed.
        even: whether both have as many.
    """
    ids = run.inputs["input_ids"]
    batches = []
    for count in (_FIRST, _FIRST if even else _SECOND):
        labels = ids.clone()
        labels[:, count + 1 :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def passes(run: SmallRun) -> Any:
        for batch in batches:
            more = {"num_items_in_batch": total} if told else {}
            loss = run.model(**batch, **more).loss
            share = int((batch["labels"][:, 1:] != -100).sum()) / total if weighed else 1.0
            whole = told or weighed or not divided
            (loss * share if whole else loss / len(batches)).backward()
        return loss

    run.passes = passes


LOSS: tuple[Control, ...] = (
    Control(
        name="a mean of the means of unequal passes",
        path="loss.tokens",
        required=True,
        sabotage=small(accumulate),
        twin=small(partial(accumulate, told=True)),
        words=("over 32 of 64 tokens", "in 2 passes of 24, 8", "some weigh 3 times as much", "num_items_in_batch"),
    ),
    Control(
        name="a sum of the means of equal passes",
        path="loss.tokens",
        required=True,
        sabotage=small(partial(accumulate, even=True, divided=False)),
        twin=small(partial(accumulate, even=True)),
        words=("add up to 2 and not to 1",),
    ),
    Control(
        name="a mean of means beside losses that are weighed by hand",
        path="loss.tokens",
        required=True,
        sabotage=small(accumulate),
        twin=small(partial(accumulate, weighed=True)),
        words=("some weigh 3 times as much",),
    ),
)
