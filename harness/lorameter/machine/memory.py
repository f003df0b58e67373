"""Measures peak memory by phase, for the current process.

Peaks are maxima, so they are reset at the start of each phase. On the host the peak is VmHWM, which the kernel resets
on request (`/proc/self/clear_refs`); `ru_maxrss` is unsuitable, because a forked child inherits its parent's maximum. A
forked child also maps its parent's pages, so its initial resident size is recorded as well.
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
    """Peaks of one phase at a time: `begin` resets, `peaks` reads, both in the measured process."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begun: dict[str, int] = {}

    def begin(self) -> None:
        """Start a phase: peaks count from now on."""
        _CLEAR_REFS.write_text("5")  # 5: reset only the peak resident set
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._begun = _shortages(torch.cuda.memory_stats())

    def peaks(self, phase: str) -> dict[str, int]:
        """Peak bytes since `begin`: `host_peak_PHASE_bytes`, and on CUDA three peaks of the allocator, each included in
        the next.

        `device_peak_allocated_PHASE_bytes` is memory of tensors. `device_peak_active_PHASE_bytes` also includes freed
        memory that cannot be reused yet because another stream still uses it. `device_peak_reserved_PHASE_bytes` is all
        memory that the allocator took from the device.

        On CUDA there are also two counts: `device_alloc_retries_PHASE`, how often the allocator released its cache and
        retried, which stalls the device, and `device_ooms_PHASE`, how often the retry failed.
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
    """Counts since the start of the process, from torch.cuda.memory_stats."""
    return {"alloc_retries": int(stats["num_alloc_retries"]), "ooms": int(stats["num_ooms"])}
