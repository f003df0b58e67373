"""The display of a run that is about to be measured, with what it is expected to take."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorameter.errors import LorameterError

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.report.live import LiveDisplay
    from lorameter.run.plan import Plan


def display_of(plan: Plan, machine: Machine, runs: Path, console: Any) -> LiveDisplay:
    """A display that knows the device and how long such a plan takes; what cannot be foreseen stops no run."""
    from lorameter.report.live import LiveDisplay
    from lorameter.run.forecast import forecast

    with contextlib.suppress(LorameterError):
        expected = forecast(plan, machine, runs).time
        return LiveDisplay(console, device=machine.device_name, expected_s=expected.time_s, basis=expected.basis)
    return LiveDisplay(console, device=machine.device_name)
