"""A site that measures replicates, and others that come while it does, as whoever spreads a run sees them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from lorameter.records.record import Notice, TrialRecord
from lorameter.run.budget import Budget, Part
from lorameter.run.group_runner import ProgressListener
from lorameter.run.plan import Plan


class Node(Protocol):
    """A site that is ready to measure replicates, on this machine or on another."""

    @property
    def name(self) -> str:
        """For the records and messages."""

    @property
    def machine(self) -> str:
        """The kind of it, for a reader."""

    def measure(
        self, part: Plan, *, save: Callable[[TrialRecord], None], watcher: ProgressListener, budget: Budget
    ) -> frozenset[Part]:
        """Measure one replicate there, from its beginning to its end; each record is saved as soon as its trial ends.
        Returns what there was no time for.

        Raises `InvalidRunError` where the site is lost, or too slow for its minutes, and nothing more can be measured
        on it.
        """

    def end(self) -> None:
        """End what is under way there; is called by another thread than the one that measures."""


class LateArrivals(Protocol):
    """Stations that come while others measure."""

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What became of those who came."""

    def looking(self, add: Callable[[Any], object]) -> AbstractContextManager[None]:
        """Meanwhile those who come are given to `add` when they can measure."""

    def is_expected(self) -> bool:
        """Whether one may come."""

    def lost(self, name: str) -> None:
        """A site is lost."""
