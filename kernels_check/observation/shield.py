"""Hooks that must not be noticed: what fails in one of them is kept, and is no error of the step that it looks at.

Nor does torch.compile notice them: where code that it compiled only in part calls a module, it would look at the code
of that module's hooks, compile it in vain, and count its graph breaks among the program's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

Hook: TypeAlias = Callable[..., Any]
Shielding: TypeAlias = Callable[[Hook], Hook]


def unshielded(hook: Hook) -> Hook:
    """The hook itself: a step that the check calls may fail by it."""
    return hook


class Shield:
    """Keeps the first fault of any of its hooks."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def __call__(self, hook: Hook) -> Hook:
        """A hook that does the same and raises nothing; having failed, it changes nothing."""

        def shielded(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.fault = self.fault or f"{type(error).__name__}: {error}"
                return None

        set_code_exec_strategy(shielded.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
        return wraps(hook)(shielded) if hasattr(hook, "__name__") else shielded
