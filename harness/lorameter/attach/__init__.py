"""What runs in a training process that somebody else has written: it follows the steps and changes nothing of them.

`Meter` is what a script imports. It is loaded when it is asked for: whoever needs another module of this room, as a
process that only starts scripts, loads neither torch nor transformers.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Meter":
        from lorameter.attach.deferred_import import load

        return load("lorameter.attach.meter").Meter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
