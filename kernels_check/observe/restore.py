"""Leave a training run exactly as it was found.

Verifying takes real steps, so whatever a step changes is kept first and put back afterwards, to the bit:

- of the model: trainable parameters, buffers and gradients by value, in place; which parameter, buffer, module and hook
  is in which slot; train/eval modes and every other attribute of the modules; ``requires_grad``.
- of an optimizer, from before its first update: state, parameter groups, and its own attributes.
- of whatever else can be reached from the step (see ``reach``): second models and running averages of a model, learning
  rate schedulers, gradient scalers, generators of random numbers.
- the generators of Python, NumPy and torch.

Putting back is a transaction: everything is tried, and what failed is raised together, by name, at the end. If the step
itself raised, its exception is the one that is seen, with the rest as notes.

Not covered, since nothing announces them: data iterators, and what a step counts in objects of its own, such as the
number of steps in a trainer; a running average, scheduler or scaler that cannot be reached from the step; the gradients
of a second model that cannot be reached; changes in place of frozen parameters of the model (``base.frozen`` reports
them); objects on a model that hold what cannot be copied; switches of the process, such as the default dtype. A frozen
tensor outside the model too large to be copied (``COPIED_BYTES``) is an error if the step changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.module_tree import every_module
from kernels_check.observe.snapshot import RestoreError, Snapshot


class Modes:
    """The train/eval mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in every_module(model)]

    def restore(self) -> None:
        """Set every module back, one by one: ``model.train()`` would lose a mixture."""
        for module, training in self._modes:
            module.training = training


@contextmanager
def restored(model: nn.Module, step: Callable[[], object] | None = None) -> Iterator[Snapshot]:
    """Restore everything at the end of the block, also when it raises.

    Raises:
        ValueError: something cannot be copied and written back; the block has not been entered then.
        RestoreError: not everything could be put back.
        BaseException: whatever the block raised, with notes on what could not be put back.
    """
    with gc_paused():
        snapshot = Snapshot(model, step)
    try:
        yield snapshot
    except BaseException as error:
        faults = snapshot.put_back()
        if faults:
            error.add_note(str(RestoreError(faults)))
        raise
    snapshot.restore()
