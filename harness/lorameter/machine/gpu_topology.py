"""How the GPUs of a machine reach each other, as NVML tells it: what the exchanges of several ranks go through."""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.machine.reading import Reading

NVLINK = "NVLink"
MEETINGS: dict[str, str] = {
    "NVML_TOPOLOGY_INTERNAL": "one board",
    "NVML_TOPOLOGY_SINGLE": "one PCIe switch",
    "NVML_TOPOLOGY_MULTIPLE": "several PCIe switches",
    "NVML_TOPOLOGY_HOSTBRIDGE": "a PCIe host bridge",
    "NVML_TOPOLOGY_NODE": "the host bridges of one memory node",
    "NVML_TOPOLOGY_SYSTEM": "the link between memory nodes",
}
"""Where two GPUs meet, nearest first, by NVML's names for it (nvmlGpuTopologyLevel_t)."""
FAR = frozenset({MEETINGS["NVML_TOPOLOGY_NODE"], MEETINGS["NVML_TOPOLOGY_SYSTEM"]})
"""Through these goes every exchange by the CPU's own links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two GPUs, by the numbers that NVML gives them."""

    first: int
    second: int
    through: Reading[str]
    """`NVLINK`, or where they meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Of all GPUs that this process may use."""

    pairs: tuple[Pair, ...]
    """Each two of them."""
    active: tuple[tuple[int, Reading[int]], ...]
    """NVLinks of each GPU that are up, by its number."""
