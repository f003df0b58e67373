"""Verify a fine-tuning step: watch calls of it, and put the training back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from kernels_check.check import Check, Json
from kernels_check.observe.hooks import restored
from kernels_check.observe.step import MOST_CALLS
from kernels_check.step_watch import Watch, isolation_of_seen


def verify(
    model: nn.Module,
    step: Callable[[], object],
    requirements: Mapping[str, Json],
    *,
    batch: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Judge what really runs in ``step`` against ``requirements``.

    Args:
        model: the model that ``step`` trains, as PEFT returned it.
        step: does one forward, backward and optimizer step; called twice, and up to eight times where its optimizer
            steps in some calls only or begins at a learning rate of zero.
        requirements: path to expected value, see ``REQUIREMENTS``. Other paths are reported, too.
        batch: packed inputs of ``model(**batch)``, to judge isolation in evaluation too. Without it
            ``packing.isolated`` is judged, where it is required, by the step's own calls.

    Returns:
        One check per path, in the order of ``REQUIREMENTS``. A requirement is met only by status ``active``. What the
        profiler records is ``unknown``, with the reason, where the program runs a profiler around this call or inside
        ``step``, which is left undisturbed.

    Restored afterwards, also if ``step`` raises, are to the bit: the parameters of ``model`` that require gradients and
    those that an optimizer updates in ``step``; the gradients of all parameters of ``model``; state and groups of the
    optimizers that step; the random numbers of Python, NumPy and torch; train/eval modes. Not restored is everything
    else: buffers, frozen parameters that the step changes, gradients of other models, learning-rate schedulers,
    gradient scalers, running averages, data iterators, and what the step counts in objects of its own.

    Raises:
        ValueError: unknown path or a value of the wrong kind; ``step`` has not been called then.
        Exception: whatever ``step`` raises.
    """
    watched = Watch(model, requirements, partial(isolation_of_seen, batch=batch), packed=batch is not None)
    with restored(model):
        with watched.updates_only():  # compiles, and moves lora_B off zero
            step()
        for _ in range(MOST_CALLS - 1):
            with watched:
                step()
            if not watched.undecided:
                break
    return watched.checks
