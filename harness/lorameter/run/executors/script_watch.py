"""The machine around a script's timed turns, read by the parent: the script's process has no meter of ours in it.

What the kernel counts for the machine is the same from here. What it counts for a process would be the parent's, and
who holds memory on a GPU would be the scripts themselves, so neither is read.
"""

from __future__ import annotations

import time

from lorameter.machine.host import HostTelemetry
from lorameter.machine.nvml import open_device
from lorameter.machine.telemetry import GpuTelemetry, telemetry_key

OF_A_PROCESS = ("voluntary_switches", "involuntary_switches", "major_faults")
OF_NEIGHBOURS = ("own_bytes", "used_bytes", "others", "others_bytes", "hidden_bytes")


class ScriptWatch:
    """What happened around the turns of one script, over all of them."""

    def __init__(self, on_card: bool) -> None:
        self._host = HostTelemetry()
        device = open_device().value if on_card else None
        self._card = None if device is None else GpuTelemetry(device, energy=False)

    def begin(self) -> None:
        """A turn is about to begin."""
        if self._card is not None:
            self._card.begin(time.monotonic())
        self._host.begin()

    def end(self) -> dict[str, float]:
        """It has ended: all values so far, by their names in the record."""
        host = self._host.end()
        card = {} if self._card is None else self._card.end(time.monotonic())
        found = {
            telemetry_key("host", name, "train"): value for name, value in host.items() if name not in OF_A_PROCESS
        }
        return found | {
            telemetry_key("device", name, "train"): value for name, value in card.items() if name not in OF_NEIGHBOURS
        }
