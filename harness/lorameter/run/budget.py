"""Fits a run into its time limit by one rule.

A replicate has two rounds of each measurement, after the watched warm-up step and one more. After each replicate
another one starts if the longest so far still fits, up to the planned number. Time left after the last replicate raises
the rounds of all replicates alike, if three replicates fit. Before replicate 1, when the cost of a replicate is known,
cold starts, merged requests and requests are dropped, in this order, until three replicates fit; if training alone does
not fit, its turns take one step each from then on. Peaks are measured once per variant. If three training replicates do
not fit even so, the run reports the minutes that it needs, and continues.

A part that would be dropped after the first replicate is not measured in it either, since one replicate gives no
interval. So each part is judged just before it starts in the first replicate, by the time of one request or one load.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import UsageError
from lorameter.measurements.metrics import MEASUREMENTS, Measure
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import TimeBreakdown
from lorameter.records.units import format_count, format_duration
from lorameter.run.plan import Group, Plan, measured_groups

MIN_ROUNDS = 2
"""Minimum rounds of a replicate: a single round has no spread."""
TARGET_REPLICATES = 3
"""Other measurements are dropped until this many training replicates fit: fewer give too wide intervals."""

SKIPPED = "measurements-skipped"
"""Code of the notice about parts dropped because of a limit."""
DROPPABLE: dict[Measure, str] = {
    one.name: one.title
    for one in sorted(MEASUREMENTS.values(), key=lambda one: -(one.drop_rank or 0))
    if one.drop_rank is not None
}
"""The parts that can be dropped, with their names in a notice. The last is dropped first."""


class TimeLimitTooShortError(UsageError):
    """Raised if not one replicate fits into the limit."""


@dataclass(slots=True)
class Cost:
    """Seconds of one part of a replicate, summed over its trials."""

    fixed_s: float = 0.0
    """Independent of the number of rounds: building, checking, first requests, held-out loss."""
    round_s: float = 0.0
    """One round: a turn or a request of every trial."""


class Budget:
    """The clock of one invocation, the costs of its replicates, and the remaining time.

    Time is booked by laps: `lap` assigns the time since the last lap to a part of the current replicate.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        *,
        replicates: int = 1,
        skipped: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit_s` None means no limit: everything is measured. `replicates` is the planned number, the parts in
        `skipped` were dropped by an earlier invocation, and only differences of `clock` count."""
        self.clock = clock
        self.limit_s = limit_s
        self.replicates = replicates
        self._target = min(TARGET_REPLICATES, replicates)
        self.import_s = self.load_s = 0.0
        """Seconds in which a cold start imports the libraries and loads a base, as far as known."""
        self.skipped: set[Measure] = {part for part in DROPPABLE if part in skipped}
        """Parts that are not measured."""
        self.needed_s = 0.0
        """Seconds of the required replicates with all planned parts, if they do not fit."""
        self.training_s = 0.0
        """Seconds of the required replicates with training only, if not even that fits."""
        self._begin = self._lap = self._entered = self.clock()
        self._once_s = self._dropped_s = 0.0
        self._admitted: set[Measure] = set()
        self._kept: Measure = "steps"
        """The part that is never dropped."""
        self._trials = self._begun = 1
        self._costs: dict[Measure, Cost] = {}
        self._past: list[dict[Measure, Cost]] = []
        """The costs of the completed replicates."""
        self._rounds = MIN_ROUNDS
        self._steps: int | None = None
        """Maximum steps of a turn."""
        self._measured_s: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since the budget was opened."""
        return self.clock() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds left of the limit; infinite without a limit."""
        return math.inf if self.limit_s is None else self.limit_s - self.elapsed_s

    @property
    def longest_s(self) -> float | None:
        """The minimum time of another replicate, from the longest so far; None before one has ended."""
        return max(map(self._replicate_s, self._past), default=None)

    @property
    def is_judging(self) -> bool:
        """Whether the first replicate is running, in which the budget decides which parts are measured."""
        return self.limit_s is not None and not self._past

    def _replicate_s(self, costs: Mapping[Measure, Cost], rounds: int = MIN_ROUNDS) -> float:
        """Seconds of a replicate with this many rounds of each measured part."""
        return sum(cost.fixed_s + rounds * cost.round_s for part, cost in costs.items() if part not in self.skipped)

    # --- a replicate --------------------------------------------------------------------------------------------------

    def open_replicate(self, plan: Plan, groups: Sequence[Group], *, on_cpu: bool) -> tuple[Group, ...]:
        """Begin a replicate of these groups; returns the groups with the parts that are measured."""
        self._costs, self._entered, self._lap, self._once_s = {}, self.clock(), self.clock(), 0.0
        self._trials = sum(len(group.slots) for group in groups if not group.isolated) or 1
        self._begun = 0
        self._kept = "steps" if plan.study.form.trains() else "requests"
        if self.limit_s is None:
            return tuple(groups)
        if len(self._past) == 1:
            self._raise_rounds()
        return measured_groups(plan, groups, self.skipped, on_cpu=on_cpu)

    def _raise_rounds(self) -> None:
        """Use the time left after the last replicate for more rounds, equally in all replicates after the first, so
        that their trainings are equally long. If fewer replicates fit than required, the time is kept for another
        replicate."""
        (first,) = self._past
        each = self._replicate_s(first)
        fitting = min(max(1, self.replicates - 1), int(self.left_s / each)) if each else 0
        round_s = self._replicate_s(first, MIN_ROUNDS + 1) - each
        if fitting and round_s and 1 + fitting >= self._target:
            self._rounds = MIN_ROUNDS + int((self.left_s / fitting - each) / round_s)

    def enter(self, group: Group) -> None:
        """Begin a group of the replicate."""
        self._begun += 0 if group.isolated else len(group.slots)
        self._lap = self.clock()

    def lap(self, part: Measure | None, *, rounds: int = 0, once_s: float = 0.0) -> None:
        """Book the time since the last lap to a part of the replicate: to `rounds` rounds if there were any, else to
        the fixed part. Later replicates do not need `once_s` of it, or any of it if that is None."""
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
        if rounds or not MEASUREMENTS[part].rounds:
            self._measured_s[part] = self._measured_s.get(part, 0.0) + seconds

    def rounds(self, planned: int) -> int:
        """The number of planned rounds that the current replicate runs."""
        return planned if self.limit_s is None else min(planned, self._rounds)

    def steps(self, planned: int) -> int:
        """The number of planned steps that each turn of the current replicate takes."""
        return planned if self._steps is None else self._steps

    def admits(self, part: Measure, seconds: float, *, once_s: float = 0.0) -> bool:
        """Whether a part is measured. In the first replicate it is measured if three replicates with it fit, which is
        decided once; `seconds` is its time for all trials of the current group, `once_s` its additional time in the
        first replicate."""
        if self.limit_s is None or part == self._kept or part in self._admitted:
            return True
        if part in self.skipped or self._past:
            return part not in self.skipped
        share = self._begun / self._trials
        each = (self._replicate_s(self._costs) + seconds + self._dropped_s) / share
        needed_s = self._entered - self._begin + self._once_s + once_s + self._target * each
        if self._dropped_s or needed_s > self.limit_s:
            self._dropped_s += seconds
            self._skip(part, needed_s)
            return False
        self._admitted.add(part)
        return True

    def require_one(self, ahead_s: float) -> None:
        """Refuse a limit into which not one replicate fits; `ahead_s` is the remaining time of the first group.

        Raises:
            TimeLimitTooShortError: the message has the minutes that are needed.
        """
        if not self.is_judging or self.limit_s is None:
            return
        needed_s = self.elapsed_s + ahead_s * self._trials / self._begun
        if needed_s > self.limit_s:
            raise TimeLimitTooShortError(
                f"max_minutes = {self.limit_s / 60:g}: by the first steps of this run a replicate of "
                f"{format_count(self._trials, 'trial')} takes about {format_duration(needed_s)}, so not even one fits. "
                f"Give {math.ceil(needed_s / 60)} minutes or more, fewer variants (--variant) or a smaller model."
            )

    def close_replicate(self, steps_per_turn: int) -> None:
        """End a replicate after all its groups, whose turns were planned with `steps_per_turn`. After the first one,
        parts are dropped, and steps of turns, until three replicates fit."""
        self._past.append(self._costs)
        self._costs = {}  # a group that is measured again is not part of a replicate
        if self.limit_s is None or len(self._past) > 1:
            return
        (first,), later = self._past, self._target - 1
        needed_s = self.elapsed_s + later * self._replicate_s(first)
        for part in reversed(DROPPABLE):
            if part in first and part != self._kept and later * self._replicate_s(first) > self.left_s:
                self._skip(part, needed_s)
        if "steps" in first and later * self._replicate_s(first) > self.left_s:
            self._steps = 1
            first["steps"].round_s /= steps_per_turn
        training_s = later * self._replicate_s(first)
        if training_s > self.left_s:
            self.training_s = self.elapsed_s + training_s

    def _skip(self, part: Measure, needed_s: float) -> None:
        self.skipped.add(part)
        self.needed_s = max(self.needed_s, needed_s)

    # --- what is reported ---------------------------------------------------------------------------------------------

    def breakdown(self, records: Iterable[TrialRecord]) -> TimeBreakdown:
        """The time spent so far, by part, on a run with these records."""
        turns = {one.replicate: len(one.turn_lengths) for one in records if one.status == "ok" and one.turn_lengths}
        return TimeBreakdown(
            limit_s=self.limit_s,
            wall_s=self.elapsed_s,
            measured_s=dict(self._measured_s),
            turns=tuple(turns.values()) if self.limit_s is not None else (),
        )


def skipped_notice(
    skipped: Iterable[str], replicates: int, planned: int, needed_s: float, training_s: float = 0.0
) -> tuple[Notice, ...]:
    """The notice about parts dropped because of a limit, and about too few replicates for a useful interval; None if
    neither applies. `needed_s` is the time of the required replicates with all planned parts, `training_s` with
    training only; 0 if unknown."""
    dropped = [DROPPABLE[part] for part in DROPPABLE if part in set(skipped)]
    target = min(TARGET_REPLICATES, planned)
    few = replicates < target
    if not dropped and not few:
        return ()

    def minutes(seconds: float, words: str) -> str:
        return f" ({target} replicates{words} take about {math.ceil(seconds / 60)} min)" if seconds else ""

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
