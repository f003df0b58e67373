"""The spy beside a step that takes place by itself: it must change nothing of it, and be gone afterwards.

A dispatch mode is noticed by one thing that a step may do: enter code of torch.compile, which then fails its guards and
is run eagerly, or is given up for good. So the spy leaves for the rest of the step just before any is entered. And a
mode is taken off the stack wherever it lies there: what was put on it later stays. Each thread has a stack of its own,
so that a block that another thread closes leaves the spy behind until the next operator in the thread that opened it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.dispatch_recorder import DispatchRecorder, entries_counted
from kernels_check.observe.monkeypatch import patched
from kernels_check.observe.safe_hooks import Shielding


@contextmanager
def spied_beside(calls: CallRecorder, shield: Shielding) -> Iterator[DispatchRecorder]:
    """Watch the operators of the block as ``spied`` does, as long as no compiled code is entered."""
    spy = DispatchRecorder(calls)
    with ExitStack() as stack:
        there = stack.enter_context(ExitStack())
        stack.enter_context(entries_counted(spy, there.close))
        there.push(register_optimizer_step_pre_hook(shield(spy.before_update)))
        there.push(register_optimizer_step_post_hook(shield(spy.after_update)))
        there.enter_context(patched(torch.nn.functional, "scaled_dot_product_attention", spy.attention_function))
        there.callback(_leave, spy)
        TorchDispatchMode.__enter__(spy)
        yield spy


class _LeftSpy(DispatchRecorder):
    """A spy on the stack of the thread that opened it, closed by another, which cannot reach that: it sees nothing.

    Torch puts a mode back when its dispatch returns, so that it cannot take itself off in one. So at the next operator
    of its thread it has the interpreter call it once more, right after that.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator."""
        if threading.get_ident() == self._calls.thread and sys.getprofile() is None:
            sys.setprofile(self._go)
        return func(*args, **(kwargs or {}))

    def _go(self, *_: object) -> None:
        """What the interpreter calls as a profiler of this thread; until the operator has returned it is too early."""
        if self in _get_current_dispatch_mode_stack():
            sys.setprofile(None)
            _leave(self)


def _leave(mode: DispatchRecorder) -> None:
    """Take a mode off this thread's stack, and leave those above it there."""
    stack = _get_current_dispatch_mode_stack()
    place = next((index for index, one in enumerate(stack) if one is mode), None)
    if place is None:
        mode.left_behind = True
        mode.__class__ = _LeftSpy
        return
    above = stack[place + 1 :]
    for one in (*reversed(above), mode):
        TorchDispatchMode.__exit__(one, None, None, None)
    for one in above:
        TorchDispatchMode.__enter__(one)
