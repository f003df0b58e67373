"""Hooks that must not be noticed: what fails in one of them is kept, and is no error of the step that it looks at.

Nor does torch.compile notice them: where code that it compiled only in part calls a module, it would look at the code
of that module's hooks, compile it in vain, and count its graph breaks among the program's.

Nor do copies: a module that is copied or saved takes the hooks on it along. In the copy, and in the file, they do
nothing and name nothing of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeAlias

from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

Hook: TypeAlias = Callable[..., Any]


class ModuleHook:
    """A hook on one module that tells of calls of that module alone; those of its copies are others.

    A shallow copy shares the dictionary in which its hooks lie, a deep copy has one of its own with copies of them. The
    replicas of ``DataParallel`` are the module itself: gradients come back from them to its parameters.

    Args:
        module: that it is registered on.
        hook: what is called for it.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = module, hook
        _keep_from_compiler(ModuleHook.__call__)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """As torch calls a hook of a module."""
        if module is self._module or getattr(module, "_is_replica", False):
            return self._hook(module, *given)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a copy: what takes any arguments and does nothing."""
        return getattr, (nullcontext(), "__exit__")


class HookGuard:
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

        _keep_from_compiler(shielded)
        return wraps(hook)(shielded) if hasattr(hook, "__name__") else shielded


def _keep_from_compiler(function: Any) -> None:
    """Let it neither compile a function nor look at what that calls."""
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
