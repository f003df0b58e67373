"""Measures the cost of LoRA fine-tuning configurations, with an interval for each number."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorameter.attach.meter import Meter
    from lorameter.results.export import load, load_all

__all__ = ["Meter", "load", "load_all"]
_MODULES = {"Meter": "lorameter.attach", "load": "lorameter.results.export", "load_all": "lorameter.results.export"}


def __getattr__(name: str) -> Any:
    """Import public names on first use, because every measuring process imports this package."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
