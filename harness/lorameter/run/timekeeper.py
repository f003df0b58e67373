"""The clock of one invocation: what its limit leaves, and what each part of its time went to.

Time passes in rounds and in what lies between them. The gap before, between and behind rounds is on the account of what
it follows, or of what it is for, so that it can be foreseen for the replicates to come (`lorameter.run.costs`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.run.costs import PREPARING, Costs, name_of
from lorameter.run.plan import Group
from lorameter.run.spending import Ledger
from lorameter.studies.study import Study


class TimeLedger:
    """Where the time goes; `limit_s` is what there is of it, None without a limit."""

    def __init__(self, limit_s: float | None, cold_s: float, clock: Callable[[], float] | None) -> None:
        self.clock = clock or time.monotonic
        """Seconds; only differences count."""
        self._limit_s = limit_s
        self._begin = self.clock()
        self.costs = Costs()
        self.costs.cold_s = cold_s
        self.ledger = Ledger()
        """What the time went to."""
        self._replicate: int | None = None
        self._study: Study | None = None
        self._group: Group | None = None
        self._later_groups: Sequence[Group] = ()
        self._groups: tuple[Group, ...] = ()
        """All groups of the replicate under way."""
        self._gap = PREPARING
        self._gap_begin = self._begin
        self._once_s = 0.0
        """Of the gap under way what is no part of it in other replicates."""

    @property
    def cold_s(self) -> float:
        """What a cold start may be expected to take."""
        return self.costs.cold_s

    @cold_s.setter
    def cold_s(self, seconds: float) -> None:
        self.costs.cold_s = seconds

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit_s is not None

    @property
    def spent_s(self) -> float:
        """Seconds since the budget was opened."""
        return self.clock() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds that are left of the limit; infinite without one."""
        return math.inf if self._limit_s is None else self._limit_s - self.spent_s

    def enter(self, study: Study, group: Group, later: Sequence[Group]) -> None:
        """A group begins; `later` are those of its replicate that come after it."""
        if group.replicate != self._replicate:
            self._replicate, self._groups = group.replicate, (group, *later)
        self._study, self._group, self._later_groups = study, group, later
        self._gap, self._gap_begin = PREPARING, self.clock()

    def spending(self) -> TimeBreakdown:
        """What the time went to until now."""
        return self.ledger.sum(limit_s=self._limit_s, wall_s=self.spent_s)

    def leave(self) -> None:
        """The group has ended."""
        self._close_gap()

    def pay_once(self, seconds: float, what: str = "") -> None:
        """So much of the time that has just gone comes once a run, and in no other replicate; `what` is noted, to be
        foreseen where it comes again after all."""
        self._once_s += seconds
        if what:
            self.costs.note(what, seconds, 1)

    def note_apart(self, what: str, group: Group, seconds: float) -> None:
        """So much of the time that has just gone went to a part of it that some replicates do without."""
        self._once_s += seconds
        self.costs.note(name_of(what, group), seconds, len(group.slots))

    def pass_to(self, what: str) -> None:
        """What is done from now to the next round is done for that round (`costs.BEFORE`)."""
        self._close_gap()
        self._gap, self._gap_begin = what, self.clock()

    def _close_gap(self) -> None:
        if self._group is not None:
            seconds = max(0.0, self.clock() - self._gap_begin - self._once_s)
            self.costs.note(name_of(self._gap, self._group), seconds, len(self._group.slots))
        self._once_s = 0.0
