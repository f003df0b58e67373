"""Sites that come while others measure already: each is asked what it is, refused where it is unlike the first, held,
prepared as the first ones were, and then takes part. What becomes of each is told; none holds up the others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.record import Notice
from lorameter.run.device_lock import IfBusy
from lorameter.run.plan_spec import PlanSpec
from lorameter.run.prepare import Ready
from lorameter.run.sites.prepare_nodes import check_like, check_prepared
from lorameter.run.sites.remote import RemoteNode
from lorameter.run.sites.scheduler import REFUSED

LOOK_S = 1.0


class PendingNodes(Protocol):
    """Where sites come from."""

    if_busy: IfBusy
    """What one does beside another measurement on its device."""

    def come(self) -> list[RemoteNode]:
        """Those that have come since the last time."""

    def is_expected(self) -> bool:
        """Whether another may come."""


class LateNodes:
    """Looks for those who come, while a run is spread over those who are there."""

    def __init__(
        self,
        arrivals: PendingNodes,
        present: Sequence[RemoteNode],
        prepare: Callable[[RemoteNode], None],
        *,
        ranks: int = 1,
    ) -> None:
        """`present` are described, held and prepared already; `prepare` does it for one who comes, or raises
        `InvalidRunError` or `UsageError`. `ranks`: of a trial, each of which has a GPU."""
        self._arrivals, self._prepare, self._ranks = arrivals, prepare, ranks
        self._lock = threading.Lock()
        self._holders = {_place_of(station): station.name for station in present}
        self._under_way = 0
        self._notices: list[Notice] = []

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What became of those who came."""
        with self._lock:
            return tuple(self._notices)

    def is_expected(self) -> bool:
        """Whether somebody is being prepared, or may come."""
        with self._lock:
            under_way = bool(self._under_way)
        return under_way or self._arrivals.is_expected()

    def lost(self, name: str) -> None:
        """A site is lost, and what it held is free."""
        with self._lock:
            self._holders = {place: holder for place, holder in self._holders.items() if holder != name}

    @contextlib.contextmanager
    def looking(self, add: Callable[[RemoteNode], object]) -> Iterator[None]:
        """Meanwhile those who come are given to `add` when they can measure."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(LOOK_S):
                for station in self._arrivals.come():
                    with self._lock:
                        self._under_way += 1
                    threading.Thread(target=self._receive, args=(station, add), daemon=True).start()

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _receive(self, station: RemoteNode, add: Callable[[RemoteNode], object]) -> None:
        try:
            self._hold(station)
            self._prepare(station)
        except (InvalidRunError, UsageError) as error:
            station.close()
            self.lost(station.name)
            self._note(REFUSED, f"site {station.name} came and takes no part: {error}", "Look at its log.")
        else:
            self._note("site-joined", f"site {station.name} came while others measured, and took part.", "")
            add(station)
        finally:
            with self._lock:
                self._under_way -= 1

    def _hold(self, station: RemoteNode) -> None:
        place = _place_of(station)  # asks what it is
        with self._lock:
            if place in self._holders:  # by one of this run, and they measure beside each other from the start
                return
            self._holders[place] = station.name
        station.hold(self._arrivals.if_busy, lambda line: None, ranks=self._ranks)

    def _note(self, code: str, message: str, remedy: str) -> None:
        with self._lock:
            self._notices.append(Notice(code=code, message=message, remedy=remedy))


def prepare_late(
    station: RemoteNode,
    *,
    first: RemoteNode,
    ready: Ready,
    plan: PlanSpec,
    folder: Path,
    left_s: float,
    mixed: bool = False,
) -> None:
    """Prepare a site that comes when the `first` one and others are `ready`. Raises as `prepare_all`, and for one that
    is unlike them, or where sites are `mixed` has other things installed."""
    check_like(first, station, mixed=mixed)
    check_prepared(first.name, ready, station.name, station.prepare(plan, folder, left_s, lambda message: None))


def _place_of(station: RemoteNode) -> tuple[str, str]:
    return station.description.machine, station.description.device_id
