"""Fits a run into the minutes that it may take, by one rule.

A replicate takes two rounds of what is measured, after the watched warm-up step and one more. After each replicate
another one starts as long as the longest so far still fits, up to the number planned; what time is left after the last
raises the rounds of all alike, if three replicates fit. Before replicate 1, when the cost of a replicate is known, cold
starts, merged requests and requests are dropped, in this order, until three replicates fit. Peaks are measured once a
variant. If three training replicates do not fit, the run reports the minutes that it needs, and continues.

What would be dropped after the first replicate is not measured in it either: one replicate gives no interval. So each
part is judged just before the first replicate comes to it, by what one request or one load has taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.errors import UsageError
from lorameter.records.record import Notice
from lorameter.records.store import TimeBreakdown
from lorameter.records.units import format_count, format_duration
from lorameter.run.plan import Group, Plan, measured_groups

LEAST_ROUNDS = 2
"""Rounds of a replicate whatever the time: one has no spread."""
SOUGHT_REPLICATES = 3
"""Other measurements are dropped until so many replicates of training fit: fewer give intervals that are too wide."""

SKIPPED = "measurements-skipped"
"""Code of the notice of what a limit has dropped."""
Part = Literal["training", "requests", "open_ended", "merged", "cold"]
"""The parts of a replicate; all but the training can be dropped."""
DROPPABLE: dict[Part, str] = {
    "requests": "requests",
    "open_ended": "requests until EOS",
    "merged": "requests with the adapter merged",
    "cold": "cold starts",
}
"""The parts that can be dropped with their names in a notice, in the order in which a replicate measures them. The last
is dropped first."""


class TimeLimitTooShortError(UsageError):
    """Not one replicate fits into the limit."""


@dataclass(slots=True)
class Cost:
    """Seconds of one part of a replicate, for all of its trials together."""

    fixed_s: float = 0.0
    """Whatever the number of rounds: building, checking, first requests, held-out loss."""
    round_s: float = 0.0
    """One round: a turn, or a request, of every trial."""


class Budget:
    """The clock of one invocation, what its replicates have cost, and what fits into the rest of its limit.

    Time is booked by laps: `lap` assigns what has passed since the last one to a part of the replicate under way.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        *,
        replicates: int = 1,
        skipped: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit_s` None: no limit, everything is measured. `replicates` are planned, the parts in `skipped` have been
        dropped by an earlier invocation, and of `clock` only differences count."""
        self.clock = clock
        self.limit_s = limit_s
        self.replicates = replicates
        self.import_s = self.load_s = 0.0
        """Seconds in which a cold start imports, and loads a base, as far as they are known."""
        self.skipped: set[Part] = {part for part in DROPPABLE if part in skipped}
        """Parts that are not measured."""
        self.needed_s = 0.0
        """Seconds that the sought replicates would take with everything that is planned, where they do not fit."""
        self.training_s = 0.0
        """Seconds that they would take of training alone, where not even that fits."""
        self._begin = self._lap = self._entered = self.clock()
        self._once_s = self._dropped_s = 0.0
        self._admitted: set[Part] = set()
        self._trials = self._begun = 1
        self._costs: dict[Part, Cost] = {}
        self._past: list[dict[Part, Cost]] = []
        """The costs of the replicates that have ended."""
        self._rounds = LEAST_ROUNDS
        self._turns: dict[int, int] = {}
        """Turns by replicate; the fewest of several groups."""
        self._measured_s: dict[str, float] = {}

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit_s is not None

    @property
    def spent_s(self) -> float:
        """Seconds since the budget was opened."""
        return self.clock() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds that are left of the limit; infinite without one."""
        return math.inf if self.limit_s is None else self.limit_s - self.spent_s

    @property
    def longest_s(self) -> float | None:
        """The least that another replicate takes, by the longest so far; None before one has ended."""
        return max(map(self._replicate_s, self._past), default=None)

    @property
    def is_judging(self) -> bool:
        """Whether the first replicate is under way, in which the budget decides what is measured."""
        return self.is_limited and not self._past

    @property
    def _sought(self) -> int:
        return min(SOUGHT_REPLICATES, self.replicates)

    def _replicate_s(self, costs: Mapping[Part, Cost], rounds: int = LEAST_ROUNDS) -> float:
        """Seconds of a replicate with so many rounds of each part that is measured."""
        return sum(cost.fixed_s + rounds * cost.round_s for part, cost in costs.items() if part not in self.skipped)

    # --- a replicate --------------------------------------------------------------------------------------------------

    def open_replicate(self, plan: Plan, groups: Sequence[Group], *, on_cpu: bool) -> tuple[Group, ...]:
        """A replicate of these groups begins. Returns what is measured of them."""
        self._costs, self._entered, self._lap, self._once_s = {}, self.clock(), self.clock(), 0.0
        self._trials = sum(len(group.slots) for group in groups if group.turns) or 1
        self._begun = 0
        if self.limit_s is None:
            return tuple(groups)
        if len(self._past) == 1:
            self._raise_rounds()
        return measured_groups(plan, groups, self.skipped, on_cpu=on_cpu)

    def _raise_rounds(self) -> None:
        """Spend what time is left after the last replicate on rounds, of all replicates after the first alike, so that
        their trainings are equally long. Where fewer replicates fit than are sought, it is kept for a further one."""
        (first,) = self._past
        each = self._replicate_s(first)
        fitting = min(max(1, self.replicates - 1), int(self.left_s / each)) if each else 0
        round_s = self._replicate_s(first, LEAST_ROUNDS + 1) - each
        if fitting and round_s and 1 + fitting >= self._sought:
            self._rounds = LEAST_ROUNDS + int((self.left_s / fitting - each) / round_s)

    def enter(self, group: Group) -> None:
        """A group of the replicate begins."""
        self._begun += len(group.slots) if group.turns else 0
        self._lap = self.clock()

    def lap(self, part: Part | None, *, rounds: int = 0, once_s: float = 0.0) -> None:
        """Book the time since the last lap to a part of the replicate: to so many rounds of it if there were any, else
        to the fixed part. Later replicates do without `once_s` of it; None: without all of it."""
        now = self.clock()
        seconds, self._lap = now - self._lap, now
        once_s = seconds if part is None else min(once_s, seconds)
        self._once_s += once_s
        if part is None:
            return
        cost = self._costs.setdefault(part, Cost())
        if rounds:
            cost.round_s += seconds / rounds
        else:
            cost.fixed_s += seconds - once_s
        if rounds or part == "cold":
            kind = "steps" if part == "training" else part
            self._measured_s[kind] = self._measured_s.get(kind, 0.0) + seconds

    def rounds(self, planned: int) -> int:
        """The number of planned rounds that the current replicate takes."""
        return planned if self.limit_s is None else min(planned, self._rounds)

    def note_turns(self, group: Group, turns: int) -> None:
        """So many turns were taken by all trials of a group."""
        self._turns[group.replicate] = min(turns, self._turns.get(group.replicate, turns))

    def admits(self, part: Part, seconds: float, *, once_s: float = 0.0) -> bool:
        """Whether a part is measured. In the first replicate it is if three replicates with it fit, which is decided
        once; `seconds` is what it takes of all trials of the group under way, `once_s` in the first replicate alone."""
        if self.limit_s is None or part in self._admitted:
            return True
        if part in self.skipped or self._past:
            return part not in self.skipped
        share = self._begun / self._trials
        each = (self._replicate_s(self._costs) + seconds + self._dropped_s) / share
        needed_s = self._entered - self._begin + self._once_s + once_s + self._sought * each
        if self._dropped_s or needed_s > self.limit_s:
            self._dropped_s += seconds
            self._skip(part, needed_s)
            return False
        self._admitted.add(part)
        return True

    def require_one(self, ahead_s: float) -> None:
        """Refuse a limit into which not one replicate fits, where `ahead_s` is what the first group still takes.

        Raises:
            TimeLimitTooShortError: with the minutes that it takes.
        """
        if not self.is_judging or self.limit_s is None:
            return
        needed_s = self.spent_s + ahead_s * self._trials / self._begun
        if needed_s > self.limit_s:
            raise TimeLimitTooShortError(
                f"max_minutes = {self.limit_s / 60:g}: by the first steps of this run a replicate of "
                f"{format_count(self._trials, 'trial')} takes {format_duration(needed_s)} at least, so not even one "
                f"fits. Give {math.ceil(needed_s / 60)} minutes or more, fewer variants (--variant) or a smaller model."
            )

    def close_replicate(self) -> None:
        """All groups of the replicate have been measured. After the first one parts are dropped until three fit."""
        self._past.append(self._costs)
        self._costs = {}  # a group that is measured again is no part of a replicate
        if self.limit_s is None or len(self._past) > 1:
            return
        (first,), later = self._past, self._sought - 1
        needed_s = self.spent_s + later * self._replicate_s(first)
        for part in reversed(DROPPABLE):
            if part in first and later * self._replicate_s(first) > self.left_s:
                self._skip(part, needed_s)
        training_s = later * self._replicate_s(first)
        if training_s > self.left_s:
            self.training_s = self.spent_s + training_s

    def _skip(self, part: Part, needed_s: float) -> None:
        self.skipped.add(part)
        self.needed_s = max(self.needed_s, needed_s)

    # --- what is reported ---------------------------------------------------------------------------------------------

    def breakdown(self) -> TimeBreakdown:
        """The time spent so far, by parts."""
        return TimeBreakdown(
            limit_s=self.limit_s,
            wall_s=self.spent_s,
            measured_s=dict(self._measured_s),
            turns=tuple(self._turns.values()) if self.is_limited else (),
        )


def skipped_notice(
    skipped: Iterable[str], replicates: int, planned: int, needed_s: float, training_s: float = 0.0
) -> tuple[Notice, ...]:
    """The notice of what a limit has dropped, and of fewer replicates than give a useful interval; none where neither
    is so. `needed_s` is what the sought replicates take with everything that is planned, `training_s` what they take
    of training alone; 0 where that is not known."""
    dropped = [DROPPABLE[part] for part in DROPPABLE if part in set(skipped)]
    sought = min(SOUGHT_REPLICATES, planned)
    few = replicates < sought
    if not dropped and not few:
        return ()

    def minutes(seconds: float, words: str) -> str:
        return f" ({sought} replicates{words} take about {math.ceil(seconds / 60)} min)" if seconds else ""

    parts = [f"skipped {', '.join(dropped)}{minutes(needed_s, ' with them')}"] if dropped else []
    parts += [f"{format_count(replicates, 'replicate')} of training{minutes(training_s, '')}"] if few else []
    aim = math.ceil((training_s if few else needed_s) / 60)
    return (
        Notice(
            code=SKIPPED,
            message=f"because of the time limit: {'; '.join(parts)}.",
            remedy=f"Raise --max-minutes{f' to {aim}' if aim else ''}, or measure fewer variants (--variant) or phases "
            "(--phase).",
        ),
    )
