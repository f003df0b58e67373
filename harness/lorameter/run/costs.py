"""What the parts of a replicate take, as this run has seen them, else as may be expected.

A replicate is rounds (timed turns, requests) and what lies between them: building and checking, held-out losses, first
calls, merging, cold starts. Each has a name, seconds and how often they were spent, so that what is still to come is a
sum. What has not been seen is judged by what was foreseen of it, or by what it resembles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lorameter.run.plan import Group
from lorameter.studies.command import ROUNDS, RoundKind
from lorameter.studies.study import Study

ROUND_KINDS = tuple(ROUNDS)
"""Rounds in the order in which a group has them."""
STANDS_FOR: dict[RoundKind, RoundKind] = {
    "epochs": "steps",
    "requests": "steps",
    "open_ended": "requests",
    "merged": "requests",
}
"""By what a kind is judged that was not seen yet."""
LEAST_ROUNDS = 2
"""Rounds that are measured whatever the time: one has no spread. What is not timed has no least."""
PREPARING = "preparing"
"""From the launch of a process to its first round."""
COLD, HELD_OUT = "cold starts", "held-out losses"
SERVING, MERGING = "serving", "merging"
BEFORE: dict[str, RoundKind] = {SERVING: "requests", MERGING: "merged"}
"""What a trial does before the first round of a kind, and only for it."""
Work = Mapping[RoundKind, float]
"""Commands by kind of round; of timed turns their steps, as a turn may be of one or of several."""


class Costs:
    """Seconds by name."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}
        self._expected: dict[str, float] = {}
        self.cold_s = 0.0
        """What a cold start may be expected to take before its first token, where that is known."""

    def note(self, name: str, seconds: float, count: float) -> None:
        """So many seconds were spent on so many of these."""
        before, counted = self._seen.get(name, (0.0, 0.0))
        self._seen[name] = before + seconds, counted + count

    def expect(self, name: str, seconds: float) -> None:
        """What one of these will take, until it has been seen."""
        self._expected[name] = seconds

    def has_seen(self, name: str) -> bool:
        """Whether any of these was seen."""
        return name in self._seen

    @property
    def has_seen_any(self) -> bool:
        """Whether anything was seen or foreseen."""
        return bool(self._seen or self._expected)

    def of_one(self, name: str) -> float | None:
        """Seconds of one of these, as seen, else as expected."""
        if name in self._seen:
            seconds, count = self._seen[name]
            return seconds / count if count else 0.0
        return self._expected.get(name)

    def of_round(self, kind: RoundKind) -> float | None:
        """Seconds of one command of this kind, or of what stands for it; None where neither is known."""
        known = self.of_one(kind)
        if known is not None or kind not in STANDS_FOR:
            return known
        return self.of_round(STANDS_FOR[kind])

    def of_work(self, work: Work) -> float:
        """Seconds of some rounds."""
        return sum(count * (self.of_round(kind) or 0.0) for kind, count in work.items() if count)

    def of_gap(self, gap: str, group: Group) -> float:
        """Seconds of what lies between the rounds of a group, under the name of what it follows."""
        known = self.of_one(name_of(gap, group))
        if known is None and gap == PREPARING:  # both kinds of trial are built and checked
            known = self.of_one(f"{gap} of turns")
        return (known or 0.0) * len(group.slots)

    def of_gaps(self, group: Group, after: Sequence[RoundKind] = ROUND_KINDS) -> float:
        """Seconds of all that lies between these kinds of rounds and behind them."""
        first = ROUND_KINDS.index(after[0]) if after else len(ROUND_KINDS)
        ahead = [what for what, kind in BEFORE.items() if first < ROUND_KINDS.index(kind) and _measures(group, kind)]
        ahead += [HELD_OUT] if "steps" in after and group.turns and group.held_out else []
        return sum(self.of_gap(gap, group) for gap in (*after, *ahead))

    def of_colds(self, groups: Iterable[Group]) -> float:
        """Seconds of the cold starts of some groups: as seen, else of a load and a request."""
        count = sum("cold" in slot.measures for group in groups for slot in group.slots)
        if not count:
            return 0.0
        seen = self.of_one(COLD)
        answer = self.of_one("requests") or 0.0
        return count * (self.cold_s + answer if seen is None else seen)

    def of_groups(self, groups: Sequence[Group], work: Work) -> float:
        """Seconds of some groups of which so many rounds are measured."""
        between = sum(self.of_gap(PREPARING, group) + self.of_gaps(group) for group in groups)
        return self.of_work(work) + between + self.of_colds(groups)


def name_of(gap: str, group: Group) -> str:
    """Trials that take turns and isolated ones do different things between their rounds."""
    return f"{gap} of {'turns' if group.turns else 'solo'}"


def work_in(study: Study, groups: Iterable[Group], *, most: float = math.inf) -> dict[RoundKind, float]:
    """What is planned in some groups; of each kind `most` rounds, whose turns are of one step then, and no epochs."""
    work: dict[RoundKind, float] = dict.fromkeys(ROUND_KINDS, 0.0)
    cut = math.isfinite(most)
    steps = 1 if cut else study.protocol.steps_per_turn
    for group in groups:
        rounds: dict[RoundKind, float] = {
            "steps": steps * min(len(group.turns), most),
            **dict.fromkeys(("requests", "merged"), min(len(group.requests), most)),
            "open_ended": min(len(group.open_ended), most),
        }
        for slot in group.slots:
            for kind, count in rounds.items():
                if kind in slot.measures:
                    work[kind] += count
            if "steps" in slot.measures and not cut:
                work["epochs"] += steps * slot.contender.rounds_after_turns(study.protocol)
    return work


def _measures(group: Group, kind: RoundKind) -> bool:
    return any(kind in slot.measures for slot in group.slots)
