"""A Trainer that was built in a process whose training is followed gets a meter."""

from __future__ import annotations

from typing import Any

from lorameter.attach.meter import Meter


def add_meter(trainer: Any) -> None:
    """Add a meter, unless the script has given it one."""
    if not any(isinstance(callback, Meter) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(Meter(log=False))  # its log is the script's own
