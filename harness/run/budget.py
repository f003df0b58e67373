"""The time that a run may take, and who gets how much of it where it does not suffice.

A limit that cut off whatever comes last would measure the first variants well, the last ones not at all, and leave a
phase without a number. So what is dropped are whole rounds, for all trials that take turns alike, and every kind of
round has its share of the time that is left in its replicate: in proportion to what its planned rounds take, by what
this run has seen of them; before anything is seen a request counts as much as a turn. What lies between the rounds
(building, checking, cold starts) is set aside, as it was seen or, in the first replicate, as building and the making of
the bases suggest. Two rounds of each kind are measured whatever the time, so a run can be late by that least, and never
leaves half of its variants out.

Processes differ more from each other than steps in one of them do, and one replicate has no interval. So the time is
spread over as many replicates as give one to rest on, and the first does not take it all; what is paid once a run (the
profile for the evidence, cold starts) is in none of their parts. Another replicate begins as long as its least fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from harness.run.plan import Group, Plan
from harness.run.thinning import SOUGHT_REPLICATES, thinned
from harness.studies.command import ROUNDS, RoundKind
from harness.studies.study import Study

T = TypeVar("T")
ROUND_KINDS = tuple(ROUNDS)
"""Rounds in the order in which a group has them."""
STANDS_FOR: dict[RoundKind, RoundKind] = {
    "epochs": "steps",
    "requests": "steps",
    "natural": "requests",
    "merged": "requests",
}
"""By what a kind is judged that was not seen yet."""
LEAST_ROUNDS = 2
"""Rounds that are measured whatever the time: one has no spread. What is not timed has no least."""
PREPARING = "preparing"
"""From the launch of a process to its first round."""
COLD = "cold starts"
ENDING = "ending"
"""What is foreseen of all that follows its rounds (`Budget.foresee`)."""
SERVING, MERGING = "serving", "merging"
BEFORE: dict[str, RoundKind] = {SERVING: "requests", MERGING: "merged"}
"""What a trial does before the first round of a kind, and only for it."""


class Budget:
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
        self.clock = clock or time.monotonic
        """Seconds; only differences count."""
        self._limit_s = limit_s
        self._begin = self.clock()
        self._seen: dict[str, tuple[float, float]] = {}
        """Seconds and commands, by kind of round; seconds and trials, by what lies between the rounds."""
        self._ended: set[str] = set()
        """Kinds of group of which one has been seen to its end."""
        self._caps: dict[tuple[int, RoundKind], int] = {}
        """Rounds of a replicate's first group that was cut: its later ones get no more."""
        self._group: Group | None = None
        self._own: dict[RoundKind, float] = {}
        self._later: dict[RoundKind, float] = {}
        self._later_groups: Sequence[Group] = ()
        self._gap = PREPARING
        self._gap_begin = self._begin
        self._once_s = 0.0
        """Of the gap under way what is paid once a run."""
        self._left = min(replicates, SOUGHT_REPLICATES)
        """Replicates that the time is still spread over, the one under way among them."""
        self._replicate: int | None = None
        self._until: float | None = None
        """When the part of the replicate under way ends, in seconds since the budget was opened."""
        self._replicate_begin_s = self._paid_once_s = 0.0
        self._study: Study | None = None
        self._groups: tuple[Group, ...] = ()
        """All groups of the replicate under way."""
        self._expected: dict[RoundKind, float] = {}
        self._allowed: dict[RoundKind, int] = {}
        self._warm_up = 0
        self._thinnest: tuple[Group, ...] = ()
        """The next replicate, less all that can be left out."""
        self.cold_s = cold_s

    @property
    def spent_s(self) -> float:
        """Seconds since the budget was opened."""
        return self.clock() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds that are left of the limit; infinite without one."""
        return math.inf if self._limit_s is None else self._limit_s - self.spent_s

    @property
    def replicates(self) -> int:
        """Replicates that the time is still spread over, the one under way among them."""
        return self._left

    def beside(self, replicates: int) -> Budget:
        """One from now on for a site that measures so many of the replicates while others measure theirs: it may take
        what is left of this one's limit."""
        limit_s = None if self._limit_s is None else self.left_s
        return Budget(limit_s, replicates=replicates, cold_s=self.cold_s, clock=self.clock)

    def enter(self, study: Study, group: Group, later: Sequence[Group]) -> None:
        """A group begins; `later` are those of its replicate that come after it."""
        if group.replicate != self._replicate:
            self._left = max(1, self._left - (self._replicate is not None))
            self._replicate, self._until = group.replicate, None
            self._replicate_begin_s, self._paid_once_s = self.spent_s, 0.0
            self._study, self._groups = study, (group, *later)
        self._group, self._later_groups = group, later
        self._own = self._work(study, [group])
        self._later = self._work(study, later)
        self._gap, self._gap_begin = PREPARING, self.clock()

    def leave(self) -> None:
        """The group has ended."""
        self._close_gap()
        if self._group is not None:
            self._ended.add(_kind_of(self._group))

    def pay_once(self, seconds: float, what: str = "") -> None:
        """So much of the time that has just gone comes once a run, and in no other replicate. It is on the account of
        all of them; `what` is noted, to be foreseen where it comes again after all."""
        self._once_s += seconds
        if what:
            self._note(what, seconds, 1)
        else:
            self._paid_once_s += seconds

    def expect(self, kind: RoundKind, seconds: float) -> None:
        """What one command of this kind will take, until it has been seen."""
        self._expected[kind] = seconds

    def least_s(self, study: Study, groups: Sequence[Group]) -> float | None:
        """Seconds that a replicate of these groups takes at least, by what has been seen; None before anything was."""
        if not self._seen:
            return None
        work = self._work(study, groups, most=LEAST_ROUNDS) | {"epochs": 0.0}
        least = sum(count * (self._each(kind) or 0.0) for kind, count in work.items() if count)
        return least + self._between_s(groups)

    def costs_s(self, study: Study, groups: Sequence[Group]) -> tuple[float, float]:
        """Seconds of a replicate of these groups beside its timed turns, and of one round of those."""
        work = self._work(study, groups) | {"epochs": 0.0}
        others = sum(count * (self._each(kind) or 0.0) for kind, count in work.items() if count and kind != "steps")
        turning = sum("steps" in slot.measures for group in groups for slot in group.slots)
        return others + self._between_s(groups), turning * (self._each("steps") or 0.0)

    def allow(self, kind: RoundKind, rounds: int) -> None:
        """From the next replicate on no more rounds of a kind than these: others are worth more of the time."""
        self._allowed[kind] = max(LEAST_ROUNDS, rounds)

    def _between_s(self, groups: Sequence[Group]) -> float:
        between = sum(self._preparing_s(group) + self._ending_s(group, ROUND_KINDS) for group in groups)
        return between + self._colds_s(groups)

    def thin(self, plan: Plan, groups: Sequence[Group]) -> tuple[Group, ...]:
        """What is measured of the groups of a replicate: all, or as much as lets as many be measured as are sought."""
        if self._limit_s is None or not groups:
            return tuple(groups)
        following = [group for group in plan.groups if group.replicate == groups[0].replicate + 1]
        self._thinnest = thinned(plan, following, lambda thinner: False)
        if not self._ended:
            return tuple(groups)
        left = max(1, self._left - (self._replicate is not None))
        return thinned(plan, groups, lambda some: left * (self.least_s(plan.study, some) or 0.0) <= self.left_s)

    def settle_warm_up(self, steps: int) -> int:
        """The longest warm-up so far, in steps: where a training is cut, it ends after the same step in all replicates,
        as far as can be."""
        self._warm_up = max(self._warm_up, steps)
        return self._warm_up

    def pass_to(self, what: str) -> None:
        """What is done from now to the next round is done for that round (`BEFORE`)."""
        self._close_gap()
        self._gap, self._gap_begin = what, self.clock()

    def foresee(self, ending_s: float, trials: int) -> None:
        """What will follow the rounds of so many trials, until it has been seen: losses, untimed steps, cold starts."""
        self._note(ENDING, ending_s, trials)

    def rounds(self, kind: RoundKind, planned: Sequence[T], trials: int) -> Iterator[T]:
        """The planned rounds of the group under way, each by `trials` trials, as far as their share of time goes."""
        begin, deadline = self._open(kind, len(planned) * trials)
        allowed = self._limit_rounds(kind, len(planned))
        least = 0 if kind == "epochs" else LEAST_ROUNDS
        done = 0
        for one in planned[:allowed]:
            each = (self.clock() - begin) / done if done else trials * (self._each(kind) or 0.0)
            if done >= least and self.clock() + each > deadline:
                break
            yield one
            done += 1
        self._close(kind, begin, done * trials, done if done < len(planned) else None)

    def _open(self, kind: RoundKind, commands: float) -> tuple[float, float]:
        self._close_gap()
        now = self.clock()
        return now, now + self._share(kind, commands)

    def _close(self, kind: RoundKind, begin: float, commands: float, cut: int | None) -> None:
        self._gap, self._gap_begin = kind, self.clock()
        if commands:
            self._note(kind, self._gap_begin - begin, commands)
        if cut is not None and self._group is not None:
            self._caps[self._group.replicate, kind] = cut

    def _close_gap(self) -> None:
        if self._group is not None:
            seconds = max(0.0, self.clock() - self._gap_begin - self._once_s)
            self._note(_name(self._gap, self._group), seconds, len(self._group.slots))
        self._once_s = 0.0

    def _share(self, kind: RoundKind, commands: float) -> float:
        """Seconds for a kind of round, of what is left of the limit."""
        if self._limit_s is None:
            return math.inf
        after = ROUND_KINDS[ROUND_KINDS.index(kind) + 1 :]
        rest = {
            other: self._own.get(other, 0.0) * (other in after) + self._later.get(other, 0.0) for other in ROUND_KINDS
        }
        each = {other: self._each(other) for other in (kind, *(name for name, count in rest.items() if count))}
        known = {other: seconds for other, seconds in each.items() if seconds is not None}
        if len(known) < len(each):
            known = dict.fromkeys(each, 1.0)
        own = commands * known[kind]
        others = sum(count * known[other] for other, count in rest.items() if count)
        left = max(0.0, self._part_end_s() - self.spent_s - self._aside(kind))
        return left * own / (own + others) if own else 0.0

    def _part_end_s(self) -> float:
        """When the part of the replicate under way ends, settled when it comes to its first round: by then what lies
        between the rounds has been seen. The time goes to as many replicates as are sought, or as their least fits."""
        if self._until is None and self._study is not None:
            once_s = self._paid_once_s + self._colds_s(self._groups)
            left = max(0.0, (self._limit_s or 0.0) - self._replicate_begin_s - once_s)
            least = (self.least_s(self._study, self._groups) or 0.0) - self._colds_s(self._groups)
            parts = max(1, min(self._left, int(left / least) if least > 0 else self._left))
            later = self._thin_parts(left - least) if parts < self._left else (0, 0.0)
            unseen = any(count and kind not in self._seen for kind, count in self._own.items() if kind != "steps")
            # What was never seen is judged by what takes longer as a rule: of two parts the first would be cut for it.
            part = left if unseen and parts <= 2 else left / parts
            if later[0]:  # which leave out what keeps them from being as many as are sought
                part = left - later[0] * later[1]
            self._until = min(self._limit_s or math.inf, self._replicate_begin_s + once_s + part)
        return math.inf if self._until is None else self._until

    def _thin_parts(self, left_s: float) -> tuple[int, float]:
        """How many replicates that leave out all they can will fit, and the seconds of each."""
        each = (self.least_s(self._study, self._thinnest) or 0.0) if self._study and self._thinnest else 0.0
        return (max(0, min(self._left - 1, int(left_s / each))), each) if each else (0, 0.0)

    def _aside(self, kind: RoundKind) -> float:
        """Seconds of what lies between the rounds that are still to come."""
        if self._group is None:
            return 0.0
        own = self._ending_s(self._group, ROUND_KINDS[ROUND_KINDS.index(kind) :])
        own += self._colds_s([self._group, *self._later_groups])
        return own + sum(self._preparing_s(group) + self._ending_s(group, ROUND_KINDS) for group in self._later_groups)

    def _colds_s(self, groups: Sequence[Group]) -> float:
        """Cold starts of these groups, as seen, else as expected."""
        seconds, count = self._seen.get(COLD, (self.cold_s, 1.0))
        return seconds / count * sum("cold" in slot.measures for group in groups for slot in group.slots)

    def _preparing_s(self, group: Group) -> float:
        """As seen of this kind of trial, else of the other: both are built and checked."""
        seen = self._seen.get(_name(PREPARING, group)) or next(
            (one for name, one in self._seen.items() if name.startswith(PREPARING)), None
        )
        return 0.0 if seen is None else seen[0] / seen[1] * len(group.slots)

    def _ending_s(self, group: Group, after: Sequence[RoundKind]) -> float:
        """What follows these kinds of rounds, as seen, else as foreseen."""
        seen: dict[str, tuple[float, float]] = {
            kind: one for kind in after if (one := self._seen.get(_name(kind, group)))
        }
        if not seen and _kind_of(group) not in self._ended and ENDING in self._seen:
            seen = {after[0]: self._seen[ENDING]}
        begun = ROUND_KINDS.index(after[0])
        for what, kind in BEFORE.items():
            is_ahead = begun < ROUND_KINDS.index(kind) and any(kind in slot.measures for slot in group.slots)
            if is_ahead and (one := self._seen.get(_name(what, group))):
                seen[what] = one
        return sum(seconds / trials for seconds, trials in seen.values()) * len(group.slots)

    def _each(self, kind: RoundKind) -> float | None:
        """Seconds of one command of this kind, or of what stands for it; None where neither was seen."""
        if kind in self._seen:
            seconds, commands = self._seen[kind]
            return seconds / commands
        if kind in self._expected:
            return self._expected[kind]
        return self._each(STANDS_FOR[kind]) if kind in STANDS_FOR else None

    def _note(self, name: str, seconds: float, count: float) -> None:
        before, counted = self._seen.get(name, (0.0, 0.0))
        self._seen[name] = before + seconds, counted + count

    def _limit_rounds(self, kind: RoundKind, planned: int) -> int:
        """Rounds that the trials of this replicate before this one have left to be taken."""
        if self._group is None:
            return planned
        caps = self._caps.get((self._group.replicate, kind), planned), self._allowed.get(kind, planned)
        return min(planned, *caps)

    def _work(self, study: Study, groups: Sequence[Group], *, most: float = math.inf) -> dict[RoundKind, float]:
        """Commands that are planned in some groups, by kind, of so many rounds of each at most."""
        work: dict[RoundKind, float] = dict.fromkeys(ROUND_KINDS, 0.0)
        for group in groups:
            rounds: dict[RoundKind, int] = {
                "steps": len(group.turns),
                **dict.fromkeys(("requests", "merged"), len(group.requests)),
                "natural": len(group.natural),
            }
            for slot in group.slots:
                for kind, count in rounds.items():
                    if kind in slot.measures:
                        work[kind] += min(count, most, self._caps.get((group.replicate, kind), count))
                if "steps" in slot.measures:
                    work["epochs"] += slot.contender.rounds_after_turns(study.protocol)
        return work


def _kind_of(group: Group) -> str:
    """Trials that take turns and solo ones do different things between their rounds."""
    return "turns" if group.turns else "solo"


def _name(gap: str, group: Group) -> str:
    return f"{gap} of {_kind_of(group)}"
