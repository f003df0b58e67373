"""The time that a run may take, and who gets how much of it where it does not suffice.

A limit that cut off whatever comes last would measure the first variants well, the last ones not at all, and leave a
phase without a number. So what is dropped are whole rounds, for all trials that take turns alike. Two rounds of each
kind are measured in any case, or one of requests that other replicates may do without; what is left of the limit after
that least of everything that is still to come is the surplus. It is shared among the replicates to come and, in each of
them, among its kinds of round in proportion to what their planned rounds take. Costs are those that the run has seen
(`lorameter.run.costs`), so a replicate that turns out slower takes from its own surplus.

Processes differ more from each other than steps in one of them do, and one replicate has no interval. So the time is
spread over as many replicates as give one to rest on; what is paid once a run (the profile for the evidence, a warm-up
that shows how long the others need be, cold starts) is in none of their parts. Another replicate begins as long as its
least fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, TypeVar

from lorameter.errors import UsageError
from lorameter.records.units import format_duration
from lorameter.run.costs import BEFORE, LEAST_ROUNDS, PREPARING, ROUND_KINDS, Work, name_of, work_in
from lorameter.run.plan import Group, Plan
from lorameter.run.thinning import SOUGHT_REPLICATES, may_leave_out, parts_in, reduce_to_fit
from lorameter.run.timekeeper import TimeLedger
from lorameter.studies.command import RoundKind
from lorameter.studies.study import Study

T = TypeVar("T")
OVERRUN_TOLERANCE = 0.1
"""A limit is kept within this share of it."""
OVERRUN_TOLERANCE_FOR_FIVE = 0.05
"""The share of a limit by which a replicate may be late without which there would be too few for an interval."""
ROUNDED_SHARE = 0.02
"""The share of a limit by which a round may be late of which more than half fits."""
MEDIAN_TURNS = 3
"""Timed turns of which a disturbed one is no part of their median; of two it is half."""
MEDIAN_SHARE = 0.025
"""The share of a limit by which a turn may be late without which there would be fewer than those."""
FULL_TURNS = 4
"""Timed turns that are worth something else: where so many of several steps do not fit they are of one, as pairs count
for more than steps, and where so many of one do not fit a replicate leaves out what it can do without."""


class TimeLimitTooShortError(UsageError):
    """A limit that not one replicate keeps."""


class Budget(TimeLedger):
    """The clock of one invocation and what it has seen. `limit_s` None: no limit, every round is measured.

    `replicates` are those that are planned; `cold_s` is how long a cold start may be expected to take, where that is
    known.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        *,
        replicates: int = 1,
        cold_s: float = 0.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(limit_s, cold_s, clock)
        self._caps: dict[tuple[int, RoundKind], int] = {}
        """Rounds of a replicate's first group that was cut: its later ones get no more."""
        self._turn_steps: dict[int, int] = {}
        """Steps of a timed turn in a replicate, all of whose trials take the same."""
        self._allowed: dict[RoundKind, int] = {}
        self._left = min(replicates, SOUGHT_REPLICATES)
        """Replicates that the time is still spread over, the one under way among them."""
        self.peaks_live = False
        """Whether trials that take turns can measure their own peaks of memory, which are isolated trials' else."""
        self._following: tuple[Group, ...] = ()
        """The next replicate, less all that can be left out."""
        self._has_replicates = False
        """Whether one has been seen to its end."""
        self._warm_up = 0
        self.warm_up_steps: int | None = None
        """After how many steps the trials of an earlier replicate were steady, all of them."""
        self.is_tight = False
        """Whether the limit is short of what is planned, so that what is not timed is to be short."""
        self.optimum: float | None = None
        """Turns of a replicate that narrow the intervals most."""

    @property
    def replicates(self) -> int:
        """Replicates that the time is still spread over, the one under way among them."""
        return self._left

    @property
    def grace_s(self) -> float:
        """By how much a replicate may be late that is needed for an interval."""
        needed = self._limit_s is not None and self._left > 1
        return OVERRUN_TOLERANCE_FOR_FIVE * (self._limit_s or 0.0) if needed else 0.0

    def beside(self, replicates: int) -> Budget:
        """One from now on for a site that measures so many of the replicates while others measure theirs: it may take
        what is left of this one's limit."""
        limit_s = None if self._limit_s is None else self.left_s
        return Budget(limit_s, replicates=replicates, cold_s=self.cold_s, clock=self.clock)

    def enter(self, study: Study, group: Group, later: Sequence[Group]) -> None:
        """A group begins; `later` are those of its replicate that come after it."""
        if group.replicate != self._replicate:
            self._has_replicates = self._replicate is not None
            self._left = max(1, self._left - self._has_replicates)
        super().enter(study, group, later)

    def settle_warm_up(self, steps: int) -> int:
        """The longest warm-up so far, in steps: where a training is cut, it ends after the same step in all replicates,
        as far as can be."""
        self._warm_up = max(self._warm_up, steps)
        return self._warm_up

    # --- what is foreseen ---------------------------------------------------------------------------------------------

    def expect(self, name: str, seconds: float) -> None:
        """What one command of a kind will take, until that has been seen."""
        self.costs.expect(name, seconds)

    def expect_gap(self, gap: str, group: Group, seconds: float) -> None:
        """The same of what lies between the rounds of a trial in such a group."""
        self.costs.expect(name_of(gap, group), seconds)

    def least_s(self, study: Study, groups: Sequence[Group]) -> float | None:
        """Seconds that a replicate of these groups takes at least, by what has been seen; None before anything was."""
        if not self.costs.has_seen_any:
            return None
        return self.costs.of_groups(groups, work_in(study, groups, most=LEAST_ROUNDS))

    def costs_s(self, study: Study, groups: Sequence[Group]) -> tuple[float, float]:
        """Seconds of a replicate of these groups beside its timed turns, and of one round of those."""
        work = work_in(study, groups) | {"steps": 0.0, "epochs": 0.0}
        turning = sum("steps" in slot.measures for group in groups for slot in group.slots)
        steps = self._turn_steps.get(self._replicate or 0, study.protocol.steps_per_turn)
        return self.costs.of_groups(groups, work), turning * steps * (self.costs.of_round("steps") or 0.0)

    def allow(self, kind: RoundKind, rounds: int, *, optimum: float | None = None) -> None:
        """From the next replicate on so many rounds of a kind at most, more or fewer than are planned; the `optimum`
        would narrow an interval most, and is noted if there is one."""
        self._allowed[kind] = max(LEAST_ROUNDS, rounds)
        self.optimum = optimum

    def thin(self, plan: Plan, groups: Sequence[Group]) -> tuple[Group, ...]:
        """What is measured of the groups of a replicate: all, or as much as lets as many be measured as are sought. Of
        the first one, of which nothing is known, all."""
        if self._limit_s is None or not groups:
            return tuple(groups)
        following = [group for group in plan.groups if group.replicate == groups[0].replicate + 1]
        self._following = self._thinned(plan, following, lambda thinner: False)
        if not self.costs.has_seen("steps"):
            return tuple(groups)
        left = max(1, self._left - (self._replicate is not None))
        self.judge_tightness(plan, groups, left)

        def fits(some: Sequence[Group]) -> bool:
            needless = self._takes_peaks_live and any(not group.turns for group in some)
            return not needless and left * self._decent_s(plan.study, some) <= self.left_s

        return self._thinned(plan, groups, fits)

    def _decent_s(self, study: Study, groups: Sequence[Group]) -> float:
        """Seconds of a replicate with as many turns of one step as other things are left out for."""
        steps = work_in(study, groups, most=FULL_TURNS)["steps"] - work_in(study, groups, most=LEAST_ROUNDS)["steps"]
        return (self.least_s(study, groups) or 0.0) + self.costs.of_work({"steps": steps})

    @property
    def _takes_peaks_live(self) -> bool:
        """Whether time is too short for isolated trials, as those that take turns in another replicate can do without
        them: in the first they are profiled."""
        return self.is_tight and self.peaks_live and self._left > 1

    def has_room(self, plan: Plan, kind: Literal["requests", "open_ended", "merged"]) -> bool:
        """Whether the least of the requests of a kind that come next fits, with the cold starts after them; where they
        may be left out."""
        if self._limit_s is None or self._group is None or not may_leave_out(plan, [self._group], kind):
            return True
        before = sum(self.costs.of_gap(what, self._group) for what, one in BEFORE.items() if one == kind)
        least = work_in(plan.study, [self._group], most=LEAST_ROUNDS)[kind]
        needed_s = before + self.costs.of_work({kind: least}) + self.costs.of_colds([self._group, *self._later_groups])
        return needed_s <= self.left_s + OVERRUN_TOLERANCE * self._limit_s

    def _thinned(
        self, plan: Plan, groups: Sequence[Group], fits: Callable[[Sequence[Group]], bool]
    ) -> tuple[Group, ...]:
        return reduce_to_fit(plan, groups, fits, peaks_live=self.peaks_live)

    def affords(self, plan: Plan, group: Group) -> bool:
        """Whether a group of isolated trials fits beside the replicates that are sought; where it may be left out."""
        if self._limit_s is None or self._thinned(plan, [group], lambda thinner: False):
            return True
        if self._takes_peaks_live:
            return False
        after = (self._left - 1) * self._following_s(plan.study)
        return (self.least_s(plan.study, [group]) or 0.0) + after <= self.left_s

    def judge_tightness(self, plan: Plan, groups: Sequence[Group], replicates: int) -> None:
        """Settle whether the limit is short of what is planned, so many replicates of these groups; once it is, it
        stays so, and all replicates after that are alike."""
        whole_s = self.costs.of_groups(groups, work_in(plan.study, groups))
        self.is_tight |= self._limit_s is not None and replicates * whole_s > self.left_s

    def require_fit(self, plan: Plan, groups: Sequence[Group], *, ahead_s: float) -> None:
        """Refuse a limit that not one replicate keeps, the groups of which lie before their rounds.

        Args:
            plan: of the run.
            groups: of its first replicate.
            ahead_s: what is still to be done before their first round.

        Raises:
            TooShortError: says how many minutes it takes.
        """
        if self._limit_s is None:
            return
        least = self._thinned(plan, groups, lambda thinner: False)
        done_s = self.costs.of_gap(PREPARING, least[0])
        trials = sum(len(group.slots) for group in least)
        needed_s = self.spent_s + ahead_s + (self.least_s(plan.study, least) or 0.0) - done_s
        if needed_s > (1 + OVERRUN_TOLERANCE) * self._limit_s:
            raise TimeLimitTooShortError(
                f"max_minutes = {self._limit_s / 60:g}: by the first steps of this run a replicate of {trials} trials "
                f"takes {format_duration(needed_s)} at least, so not even one fits. Give {math.ceil(needed_s / 60)} "
                "minutes or more, fewer variants (--variant) or a smaller model."
            )

    def _following_s(self, study: Study) -> float:
        """Seconds that a replicate after this one takes at least; as this one, where none is planned here."""
        return self.least_s(study, self._following or self._groups) or 0.0

    # --- rounds -------------------------------------------------------------------------------------------------------

    def turn_steps(self, planned: int, trials: int) -> int:
        """Steps of each timed turn of the group under way, of which so many are `planned`: as the protocol says, or one
        where a round is so dear that only few would be taken."""
        if self._group is None or self._study is None:
            return 1
        each = self._study.protocol.steps_per_turn
        if self._limit_s is None:
            return each
        replicate = self._group.replicate
        if replicate not in self._turn_steps:
            step_s = trials * (self.costs.of_round("steps") or 0.0)
            share_s = LEAST_ROUNDS * step_s + self._surplus_of("steps", planned * trials * each)
            self._turn_steps[replicate] = each if share_s >= min(planned, FULL_TURNS) * each * step_s else 1
        return self._turn_steps[replicate]

    def rounds(
        self, kind: RoundKind, planned: Sequence[T], trials: int, *, each: int = 1, more: Iterator[T] | None = None
    ) -> Iterator[T]:
        """The planned rounds of the group under way, each by `trials` trials, as far as their share of time goes.

        Args:
            kind: of round.
            planned: of which the first are taken.
            trials: that are asked in each.
            each: what a command counts for: the steps of a turn.
            more: further rounds, for where more are worth their time than are planned.
        """
        self._close_gap()
        begin, limit_s = self.clock(), self._limit_s or 0.0
        rounded_s = ROUNDED_SHARE * limit_s
        surplus_s = self._surplus_of(kind, len(planned) * trials * each)
        least = self._least(kind)
        # What was set aside for the least is of turns of one step, and nothing where no round was known.
        apart = least / each if self.costs.of_round(kind) is not None else 0.0
        done = 0
        for one in islice(chain(planned, more or ()), self._limit_rounds(kind, len(planned), more is not None)):
            a_round = (self.clock() - begin) / done if done else trials * each * (self.costs.of_round(kind) or 0.0)
            late_s = (done + 1 - apart) * a_round - surplus_s
            needed = kind == "steps" and done < MEDIAN_TURNS
            if done >= least and late_s > (MEDIAN_SHARE * limit_s if needed else min(a_round / 2, rounded_s)):
                break
            yield one
            done += 1
        self._gap, self._gap_begin = kind, self.clock()
        if done * trials:
            self.costs.note(kind, self._gap_begin - begin, done * trials * each)
        if done < len(planned) and self._group is not None:
            self._caps[self._group.replicate, kind] = done

    def _least(self, kind: RoundKind) -> int:
        """Rounds that are taken whatever the time. One request is enough where other replicates may do without any: no
        number of them in one replicate has an interval, and the time is worth more to what has one."""
        if kind == "epochs":
            return 0
        spare = self.is_tight and bool(self._following) and kind not in ("steps", *parts_in(self._following))
        return 1 if spare else LEAST_ROUNDS

    def _limit_rounds(self, kind: RoundKind, planned: int, extends: bool) -> int:
        """Rounds that are taken at most: as allowed, but no more than the trials of this replicate before this one."""
        allowed = self._allowed.get(kind, planned)
        most = allowed if extends else min(planned, allowed)
        return most if self._group is None else min(most, self._caps.get((self._group.replicate, kind), most))

    def _surplus_of(self, kind: RoundKind, planned: float) -> float:
        """Seconds for a kind of round beyond its least, of which so many commands are planned: its part of the surplus
        of this replicate."""
        if self._limit_s is None or self._study is None or self._group is None:
            return math.inf
        least, whole = (self._ahead(kind, most=most) for most in (LEAST_ROUNDS, math.inf))
        own = work_in(self._study, [self._group], most=LEAST_ROUNDS)[kind]
        least_s = self.costs.of_work(least) + self.costs.of_work({kind: own}) + self._between_s(kind)
        if not self._judged_s({**whole, kind: whole[kind] + planned}):
            return 0.0
        share = self._judged_s({kind: planned}, beside=whole) / self._judged_s({**whole, kind: whole[kind] + planned})
        return share * self._surplus_s(least_s, unseen=self._has_unseen(whole))

    def _surplus_s(self, least_s: float, *, unseen: bool) -> float:
        """Of what is left after the least of all that is to come, the part of this replicate."""
        assert self._study is not None
        left, following = self.left_s - least_s, self._following_s(self._study)
        later = self._left - 1
        if following > 0 and self._has_replicates:  # the first does not know how many will fit
            later = max(0, min(later, int((left + self.grace_s) / following)))
        surplus = max(0.0, left - later * following)
        # What was never seen is judged by what takes longer as a rule: of two parts the first would be cut for it.
        return surplus if unseen and later <= 1 else surplus / (later + 1)

    def _ahead(self, kind: RoundKind, *, most: float) -> dict[RoundKind, float]:
        """What is to come after the rounds of this kind of this group, in its replicate."""
        assert self._study is not None
        assert self._group is not None
        after = ROUND_KINDS[ROUND_KINDS.index(kind) + 1 :]
        own = work_in(self._study, [self._group], most=most)
        later = work_in(self._study, self._later_groups, most=most)
        return {other: own[other] * (other in after) + later[other] for other in ROUND_KINDS}

    def _between_s(self, kind: RoundKind) -> float:
        """Seconds of what lies between the rounds that are still to come in this replicate."""
        assert self._group is not None
        later = sum(self.costs.of_gap(PREPARING, one) + self.costs.of_gaps(one) for one in self._later_groups)
        own = self.costs.of_gaps(self._group, ROUND_KINDS[ROUND_KINDS.index(kind) :])
        return own + later + self.costs.of_colds([self._group, *self._later_groups])

    def _has_unseen(self, work: Work) -> bool:
        return any(count and not self.costs.has_seen(kind) for kind, count in work.items())

    def _judged_s(self, work: Work, beside: Work | None = None) -> float:
        """Seconds of some rounds as they are judged beside others: one like another where one is not known at all."""
        kinds = [kind for part in (work, beside or {}) for kind, count in part.items() if count]
        known = all(self.costs.of_round(kind) is not None for kind in kinds)
        return self.costs.of_work(work) if known else sum(work.values())
