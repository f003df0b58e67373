"""Functions of torch that are replaced for the whole process while a training is followed.

Nothing is put on a model, an optimizer or a data loader, so that they can be pickled, scripted and freed as ever.
torch.compile sees the training as it is: where it traces a replaced function it finds the original call alone, and what
the meter does around that call is never compiled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

Before = Callable[[tuple[Any, ...]], None]
"""Is given the positional arguments of a call before it."""
After = Callable[[tuple[Any, ...], Any, BaseException | None], None]
"""Is given the positional arguments, and what was returned or raised."""


class Patches:
    """Replaced functions, until they are taken off."""

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, Any, Any]] = []
        """The holder, the name, what was there, and what is there now."""
        self._on = [True]

    def put(self, holder: Any, name: str, *, before: Before | None = None, after: After | None = None) -> None:
        """Have a function of a module, or of a class, call these two around it."""
        original = vars(holder)[name]
        replaced = _around(original, before and uncompiled(before), after and uncompiled(after), self._on)
        self._put.append((holder, name, original, replaced))
        setattr(holder, name, replaced)

    def take_off(self) -> None:
        """Have everything as it was. Where somebody has replaced ours since, ours stays and does nothing."""
        self._on[:] = []
        self._on = [True]
        while self._put:
            holder, name, original, replaced = self._put.pop()
            if vars(holder).get(name) is replaced:
                setattr(holder, name, original)


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone, with everything that it calls. An optimizer has loaded Dynamo."""
    wrapped: Callable[..., Any] = torch.compiler.disable(lambda *args: call(*args))
    return wrapped


def _around(original: Any, before: Any, after: Any, on: list[bool]) -> Callable[..., Any]:
    compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not on:  # Dynamo takes the first of them for true, and sees nothing else
            return original(*args, **kwargs)
        if before is not None:
            before(args)
        if after is None:
            return original(*args, **kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            after(args, None, error)
            raise
        after(args, result, None)
        return result

    return replaced


def compiles_here() -> bool:
    """Whether this is called from a function that torch.compile was given, outside of its graphs."""
    with contextlib.suppress(Exception):  # of a version of torch that has no such function
        from torch._C._dynamo.eval_frame import get_eval_frame_callback

        return callable(get_eval_frame_callback())
    return False
