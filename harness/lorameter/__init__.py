"""lorameter's measuring harness: studies in, trial records and verdicts out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorameter.results.frames import load, load_all

__all__ = ["load", "load_all"]


def __getattr__(name: str) -> Any:
    """`load` and `load_all`, imported when somebody asks for them: every measuring process imports this package."""
    if name in __all__:
        return getattr(importlib.import_module("lorameter.results.frames"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
