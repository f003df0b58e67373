"""What runs inside a training process of the user: it follows the steps and changes nothing of them.

`Meter` is what a script imports. It is loaded on first access, so that a process which only starts scripts loads
neither torch nor transformers.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Meter":
        from lorameter.attach.meter import Meter

        return Meter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
