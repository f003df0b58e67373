"""The GPUs of a machine together, as NVML tells it: which there are, which a process may use, how they reach each
other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.machine.gpu_topology import MEETINGS, NVLINK, Links, Pair
from lorameter.machine.nvml_calls import asked, card_of, ended, handle_of, handles_of, started, text_of
from lorameter.machine.reading import Reading, missing
from lorameter.machine.visible_gpus import visible_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleCard:
    """A GPU that a process may use, or an instance of one (MIG)."""

    entry: int | str
    """What CUDA_VISIBLE_DEVICES calls it."""
    name: Reading[str]
    board: Reading[str]
    """UUID of the GPU that it is, or is an instance of: two of one board share what it has."""
    power_limit_w: Reading[float]
    """Of the board, in force."""

    @property
    def kind(self) -> str:
        """For a reader, and the same for two GPUs that measure alike: what is not told agrees with nothing told."""
        limit_w = self.power_limit_w.value
        return f"{self.name.value}" + ("" if limit_w is None else f" at {limit_w:.0f} W")


def shared_boards(cards: Iterable[VisibleCard]) -> list[list[VisibleCard]]:
    """Those that are parts of one GPU, which would measure each other; of a board that is not told nothing is said."""
    by: dict[str, list[VisibleCard]] = {}
    for card in cards:
        if card.board.value is not None:
            by.setdefault(card.board.value, []).append(card)
    return [parts for parts in by.values() if len(parts) > 1]


def say_entries(cards: Iterable[VisibleCard]) -> str:
    """As CUDA_VISIBLE_DEVICES calls them."""
    return " and ".join(str(card.entry) for card in cards)


def visible_cards(environment: Mapping[str, str] | None = None) -> Reading[tuple[VisibleCard, ...]]:
    """The GPUs that `environment` (None: this process's) lets CUDA see, in its order."""
    nvml = started()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    entries = range(len(handles_of(nvml.value))) if visible is None else visible
    found = tuple(_look_at(nvml.value, entry) for entry in entries)
    ended(nvml.value)
    return Reading(value=found)


def _look_at(nvml: Any, entry: int | str) -> VisibleCard:
    handle = handle_of(nvml, entry)
    if not handle.known:
        why = handle.reason
        return VisibleCard(entry=entry, name=missing(why), board=missing(why), power_limit_w=missing(why))
    card = card_of(nvml, handle.value)
    board = card.value if card.known else handle.value
    return VisibleCard(
        entry=entry,
        name=asked(nvml, "nvmlDeviceGetName", handle.value, convert=text_of),
        board=asked(nvml, "nvmlDeviceGetUUID", board, convert=text_of),
        power_limit_w=asked(
            nvml, "nvmlDeviceGetEnforcedPowerLimit", board, convert=lambda milliwatts: milliwatts / 1e3
        ),
    )


def card_names() -> Reading[tuple[str, ...]]:
    """Names of all GPUs of the machine, hidden ones too, in the order in which NVML counts them."""
    nvml = started()
    if nvml.value is None:
        return missing(nvml.reason)
    names = [
        asked(nvml.value, "nvmlDeviceGetName", handle.value, convert=text_of).value if handle.known else None
        for handle in handles_of(nvml.value)
    ]
    ended(nvml.value)
    return Reading(value=tuple(name or "a GPU that does not answer" for name in names))


def card_links(environment: Mapping[str, str] | None = None) -> Reading[Links]:
    """How the GPUs that `environment` (None: this process's) lets CUDA see reach each other. An instance of a GPU
    has no links."""
    nvml = started()
    if nvml.value is None:
        return missing(nvml.reason)
    visible = visible_devices(os.environ if environment is None else environment)
    handles = handles_of(nvml.value)
    numbers = range(len(handles)) if visible is None else [_number_of(nvml.value, handles, one) for one in visible]
    cards = {number: handles[number].value for number in numbers if number is not None and handles[number].known}
    pairs = tuple(
        Pair(first=one, second=other, through=_through(nvml.value, cards[one], cards[other]))
        for one, other in itertools.combinations(sorted(cards), 2)
    )
    active = tuple((number, _active_links(nvml.value, card)) for number, card in sorted(cards.items()))
    ended(nvml.value)
    return Reading(value=Links(pairs=pairs, active=active))


def _number_of(nvml: Any, handles: list[Reading[Any]], visible: int | str) -> int | None:
    """NVML's number of an entry of CUDA_VISIBLE_DEVICES; None where it names no whole GPU."""
    if isinstance(visible, int):
        return visible if visible < len(handles) else None
    named = [
        number
        for number, handle in enumerate(handles)
        if (asked(nvml, "nvmlDeviceGetUUID", handle.value, convert=text_of).value or "").startswith(visible)
    ]
    return named[0] if len(named) == 1 else None


def _through(nvml: Any, one: Any, other: Any) -> Reading[str]:
    joined = asked(nvml, "nvmlDeviceGetP2PStatus", one, other, convert=int, constants=("NVML_P2P_CAPS_INDEX_NVLINK",))
    if joined.known and joined.value == getattr(nvml, "NVML_P2P_STATUS_OK", None):
        return Reading(value=NVLINK)
    words = {getattr(nvml, name, None): said for name, said in MEETINGS.items()}
    return asked(nvml, "nvmlDeviceGetTopologyCommonAncestor", one, other, convert=words.__getitem__)


def _active_links(nvml: Any, card: Any) -> Reading[int]:
    """Cards differ in how many they have: beyond the last one the driver refuses to answer."""
    first = asked(nvml, "nvmlDeviceGetNvLinkState", card, 0, convert=int)
    if not first.known:
        return first
    states = (
        asked(nvml, "nvmlDeviceGetNvLinkState", card, link, convert=int).value or 0
        for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 1))
    )
    return Reading(value=sum(states))
