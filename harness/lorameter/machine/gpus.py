"""The GPUs of a machine: which ones a process may use, which are parts of one board, and how they are connected."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.machine.nvml import ask, card_of, handle_of, handles_of, nvml_session, text_of, visible_devices
from lorameter.machine.reading import Reading, missing

NVLINK = "NVLink"
MEETINGS: dict[str, str] = {
    "NVML_TOPOLOGY_INTERNAL": "one board",
    "NVML_TOPOLOGY_SINGLE": "one PCIe switch",
    "NVML_TOPOLOGY_MULTIPLE": "several PCIe switches",
    "NVML_TOPOLOGY_HOSTBRIDGE": "a PCIe host bridge",
    "NVML_TOPOLOGY_NODE": "the host bridges of one memory node",
    "NVML_TOPOLOGY_SYSTEM": "the link between memory nodes",
}
"""Where the paths of two GPUs meet, nearest first, by NVML's names (nvmlGpuTopologyLevel_t)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleCard:
    """A GPU that a process may use, or a MIG instance of one."""

    entry: int | str
    """Its entry in CUDA_VISIBLE_DEVICES."""
    name: Reading[str]
    board: Reading[str]
    """UUID of the GPU that it is, or is an instance of: instances of one board share its resources."""
    power_limit_w: Reading[float]
    """In force, of the board."""

    @property
    def kind(self) -> str:
        """Name and power limit in words: equal for two GPUs that measure alike."""
        limit_w = self.power_limit_w.value
        return f"{self.name.value}" + ("" if limit_w is None else f" at {limit_w:.0f} W")


def shared_boards(cards: Iterable[VisibleCard]) -> list[list[VisibleCard]]:
    """Groups of devices that are parts of one GPU and would disturb each other; unknown boards are left out."""
    by: dict[str, list[VisibleCard]] = {}
    for card in cards:
        if card.board.value is not None:
            by.setdefault(card.board.value, []).append(card)
    return [parts for parts in by.values() if len(parts) > 1]


def say_entries(cards: Iterable[VisibleCard]) -> str:
    """The devices in words, as entries of CUDA_VISIBLE_DEVICES."""
    return " and ".join(str(card.entry) for card in cards)


def visible_cards(environment: Mapping[str, str] | None = None) -> Reading[tuple[VisibleCard, ...]]:
    """The GPUs that `environment` (None: this process's) lets CUDA see, in its order; all GPUs for an empty one."""
    with nvml_session() as nvml:
        if nvml.value is None:
            return missing(nvml.reason)
        visible = visible_devices(os.environ if environment is None else environment)
        entries = range(len(handles_of(nvml.value))) if visible is None else visible
        return Reading(value=tuple(_describe(nvml.value, entry) for entry in entries))


def _describe(nvml: Any, entry: int | str) -> VisibleCard:
    handle = handle_of(nvml, entry)
    if not handle.known:
        reason = handle.reason
        return VisibleCard(entry=entry, name=missing(reason), board=missing(reason), power_limit_w=missing(reason))
    card = card_of(nvml, handle.value)
    board = card.value if card.known else handle.value
    return VisibleCard(
        entry=entry,
        name=ask(nvml, "nvmlDeviceGetName", handle.value, convert=text_of),
        board=ask(nvml, "nvmlDeviceGetUUID", board, convert=text_of),
        power_limit_w=ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", board, convert=lambda milliwatts: milliwatts / 1e3),
    )


def card_links(environment: Mapping[str, str] | None = None) -> Reading[dict[str, list[str]]]:
    """Pairs of the GPUs that `environment` (None: this process's) lets CUDA see, such as "0 and 1", by how they are
    connected: `NVLINK`, or where their paths meet. MIG instances have no links."""
    with nvml_session() as nvml:
        if nvml.value is None:
            return missing(nvml.reason)
        visible = visible_devices(os.environ if environment is None else environment)
        entries = range(len(handles_of(nvml.value))) if visible is None else visible
        cards = [(entry, handle_of(nvml.value, entry)) for entry in entries]
        whole = [
            (entry, card.value) for entry, card in cards if card.known and not card_of(nvml.value, card.value).known
        ]
        found: dict[str, list[str]] = {}
        for (one, first), (other, second) in itertools.combinations(whole, 2):
            found.setdefault(_connection(nvml.value, first, second), []).append(f"{one} and {other}")
        return Reading(value=found)


def _connection(nvml: Any, one: Any, other: Any) -> str:
    joined = ask(nvml, "nvmlDeviceGetP2PStatus", one, other, convert=int, constants=("NVML_P2P_CAPS_INDEX_NVLINK",))
    if joined.known and joined.value == getattr(nvml, "NVML_P2P_STATUS_OK", None):
        return NVLINK
    words = {getattr(nvml, name, None): meeting for name, meeting in MEETINGS.items()}
    return str(
        ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", one, other, convert=words.__getitem__).value_or_reason()
    )
