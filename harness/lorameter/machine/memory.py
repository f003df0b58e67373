"""Memory gauges: peaks per phase, of the process that asks.

Peaks are maxima, so they are reset at the start of each phase. On the host that is VmHWM, which the kernel resets on
request (`/proc/self/clear_refs`); `ru_maxrss` will not do, because a forked child inherits its parent's maximum. A
forked child also maps its parent's pages, so its resident size at birth is recorded too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def host_bytes(field: str) -> int:
    """A memory field of /proc/self/status in bytes: VmRSS (resident now) or VmHWM (peak since the last reset)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: host memory cannot be measured on this system")


class PeakMemoryTracker:
    """Peaks of one phase at a time: `begin` resets, `peaks` reads, both in the process that is measured."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begun: dict[str, int] = {}

    def begin(self) -> None:
        """Start a phase: from here on peaks count."""
        _CLEAR_REFS.write_text("5")  # 5: reset the peak resident set, and nothing else
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._begun = _shortages(torch.cuda.memory_stats())

    def peaks(self, phase: str) -> dict[str, int]:
        """Bytes since `begin`: `host_peak_PHASE_bytes`, and on CUDA the allocator's peaks, each within the next.

        `device_peak_allocated_PHASE_bytes` is what tensors held, `device_peak_active_PHASE_bytes` that with what was
        freed and could not be given out again yet because another stream still used it, and
        `device_peak_reserved_PHASE_bytes` what the allocator had taken from the device.

        On CUDA there are also two counts: `device_alloc_retries_PHASE`, how often the allocator gave its cache back
        and tried again, which stops the device, and `device_ooms_PHASE`, how often that did not help.
        """
        peaks = {f"host_peak_{phase}_bytes": host_bytes("VmHWM")}
        if self._cuda:
            import torch

            stats = torch.cuda.memory_stats()
            for kind in ("allocated", "active", "reserved"):
                peaks[f"device_peak_{kind}_{phase}_bytes"] = int(stats[f"{kind}_bytes.all.peak"])
            peaks |= {f"device_{name}_{phase}": count - self._begun[name] for name, count in _shortages(stats).items()}
        return peaks


def _shortages(stats: Mapping[str, Any]) -> dict[str, int]:
    """Counts since the process began, of torch.cuda.memory_stats."""
    return {"alloc_retries": int(stats["num_alloc_retries"]), "ooms": int(stats["num_ooms"])}
