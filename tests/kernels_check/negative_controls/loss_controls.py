"""Controls of what the loss is over, where a step takes several passes."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from negative_controls import other_models
from negative_controls.control import Control, changed, small
from negative_controls.small_run import SmallRun

_FIRST, _SECOND = 12, 4
"""Tokens with a label in each row of the two passes."""


def accumulate(
    run: SmallRun,
    *,
    told: bool = False,
    weighed: bool = False,
    divided: bool = True,
    even: bool = False,
    shifted: bool = True,
) -> None:
    """Two passes before each update, of which the second has fewer tokens with a label.

    Args:
        run: to be changed.
        told: whether each forward is told the tokens of both.
        weighed: whether each loss is multiplied by its share of them.
        divided: whether each loss is divided by the number of passes, where it is neither told nor weighed.
        even: whether both have as many.
        shifted: whether the first of each row is no target.
    """
    ids = run.inputs["input_ids"]
    batches = []
    for count in (_FIRST, _FIRST if even else _SECOND):
        labels = ids.clone()
        labels[:, count + shifted :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    total = sum(_targets(batch["labels"], shifted=shifted) for batch in batches)

    def passes(run: SmallRun) -> Any:
        for batch in batches:
            more = {"num_items_in_batch": total} if told else {}
            loss = run.model(**batch, **more).loss
            share = _targets(batch["labels"], shifted=shifted) / total if weighed else 1.0
            whole = told or weighed or not divided
            (loss * share if whole else loss / len(batches)).backward()
        return loss

    run.passes = passes


def _targets(labels: Any, *, shifted: bool) -> int:
    return int((labels[:, int(shifted) :] != -100).sum())


def drop_the_number(run: SmallRun) -> None:
    """Let the forward take the number of tokens that it is told, and make nothing of it."""
    model = run.model.get_base_model()
    own = type(model).forward

    def forward(self: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        del num_items_in_batch
        return own(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def prompt() -> Any:
    """A learned prompt, after which the first token of each row is a target, too."""
    import peft

    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def search_along_a_line(run: SmallRun) -> None:
    """Give the optimizer a closure, which it evaluates several times for one update."""
    import torch

    parameters = [value for value in run.model.parameters() if value.requires_grad]
    run.optimizer, run.by_closure = torch.optim.LBFGS(parameters, lr=1e-3, max_iter=3), True


def update_twice(run: SmallRun) -> None:
    """Two whole updates in what is taken for one step."""
    once = run.step

    def step() -> None:
        once()
        once()

    run.step = step  # type: ignore[method-assign]


LOSS: tuple[Control, ...] = (
    Control(
        name="a mean of the means of unequal passes",
        path="loss.tokens",
        required=True,
        fault=small(accumulate),
        healthy=small(partial(accumulate, told=True)),
        words=("over 32 of 64 tokens", "in 2 passes of 24, 8", "some weigh 3 times as much", "num_items_in_batch"),
    ),
    Control(
        name="a sum of the means of equal passes",
        path="loss.tokens",
        required=True,
        fault=small(partial(accumulate, even=True, divided=False)),
        healthy=small(partial(accumulate, even=True)),
        words=("add up to 2 and not to 1",),
    ),
    Control(
        name="a mean of means beside losses that are weighed by hand",
        path="loss.tokens",
        required=True,
        fault=small(accumulate),
        healthy=small(partial(accumulate, weighed=True)),
        words=("some weigh 3 times as much",),
    ),
    Control(
        name="a number of tokens that the forward is told and drops",
        path="loss.tokens",
        required=True,
        fault=small(partial(accumulate, told=True), drop_the_number),
        healthy=small(partial(accumulate, told=True)),
        words=("in 2 passes of 24, 8", "some weigh 3 times as much"),
    ),
    Control(
        name="a mean of means in a decoder whose labels are not shifted",
        path="loss.tokens",
        required=True,
        fault=changed(other_models.encoder_decoder, partial(accumulate, shifted=False)),
        healthy=changed(other_models.encoder_decoder, partial(accumulate, shifted=False, weighed=True)),
        words=("in 2 passes of 24, 8", "some weigh 3 times as much"),
    ),
    Control(
        name="a mean of means behind a learned prompt",
        path="loss.tokens",
        required=True,
        fault=small(partial(accumulate, shifted=False), adapter=prompt),
        healthy=small(partial(accumulate, shifted=False, weighed=True), adapter=prompt),
        words=("in 2 passes of 24, 8", "some weigh 3 times as much"),
    ),
    Control(
        name="a mean of means in each evaluation of a closure",
        path="loss.tokens",
        required=True,
        fault=small(accumulate, search_along_a_line, quant=None, dtype="float32", lora_dropout=0.0),
        healthy=small(search_along_a_line, quant=None, dtype="float32", lora_dropout=0.0),
        words=("for 3 updates or evaluations", "some weigh 3 times as much"),
    ),
    Control(
        name="a mean of means in each of two updates",
        path="loss.tokens",
        required=True,
        fault=small(accumulate, update_twice),
        healthy=small(update_twice),
        words=("in 4 passes of 24, 8, 24, 8, for 2 updates", "some weigh 3 times as much"),
    ),
)
