"""The display of a run that is about to be measured, with what it is expected to take."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LorameterError

if TYPE_CHECKING:
    from harness.machine.provenance import Machine
    from harness.report.live import LiveDisplay
    from harness.run.plan import Plan


def display_of(plan: Plan, machine: Machine, runs: Path, console: Any) -> LiveDisplay:
    """A display that knows the device and how long such a plan takes; what cannot be foreseen stops no run."""
    from harness.report.live import LiveDisplay
    from harness.run.forecast import forecast

    with contextlib.suppress(LorameterError):
        expected = forecast(plan, machine, runs)
        return LiveDisplay(console, device=machine.device_name, expected_s=expected.time_s, basis=expected.basis)
    return LiveDisplay(console, device=machine.device_name)
