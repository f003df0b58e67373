"""The meter inside a user's training process: it measures the steps and does not change them.

A script imports `Meter`. It is loaded on first access, so that a process which only starts scripts loads neither torch
nor transformers.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Meter":
        from lorameter.attach.meter import Meter

        return Meter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
