"""What the first steps of a group say of its time: of what comes before its rounds, and of the replicates after it.

Nothing is known of the first replicate until its processes have taken a step, and everything after it is counted in
such steps: what a profile, a warm-up and a loss take are a number of them (measured on models of 135 and 270 million
parameters). What has been seen takes the place of what was foreseen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from lorameter.run.budget import Budget
from lorameter.run.costs import HELD_OUT, MERGING, PREPARING, SERVING
from lorameter.run.group_records import GroupRecords
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.trial_setup import RunContext
from lorameter.stats import steady_together

PROFILED_STEPS = 4
"""What a check under the profiler is worth in steps, with the probe of packed records that one trial a base makes."""
SPIED_STEPS = 2
"""What a check under the spy is worth: the step that it watches, and what it looks at."""
WARM_STEPS = 3
"""What a warm-up is worth that has to find out how long it need be."""
FIRST_STEP_SHARE = 1.15
"""The first step of a process over a later one."""
STEP = "build_step_time_s"
REQUEST = {"requests": "foreseen_request_time_s", "merged": "foreseen_merged_request_time_s"}
WARM, CAUGHT_UP = "warmup_step_time_s", "remaining_loss"


class ReplicateCostEstimate:
    """Of one group; tells the budget."""

    def __init__(self, plan: Plan, group: Group, later: Sequence[Group], budget: Budget, site: RunContext) -> None:
        self._plan, self._group, self._later = plan, group, later
        self._budget, self._lanes, self._on_cpu = budget, site.lanes, site.device == "cpu"
        self._trials = len(group.slots)
        self._step_s = 0.0

    def is_natural(self, slot: Slot) -> bool:
        """Whether a trial is checked in steps that it takes anyway: where minutes are limited. Not where code is
        compiled in them, or beside a side that does not know of it."""
        apart = slot.variant.compile or slot.variant.command or slot.workload.ranks > 1 or slot.side
        return self._budget.is_limited and self._on_cpu and not apart and "steps" in slot.measures

    def warm_up_steps(self, slot: Slot) -> int | None:
        """Steps of a trial's warm-up where an earlier replicate has told how many it takes and minutes are short; None
        where the trial has to find out itself."""
        told = slot.replicate > 0 and self.is_natural(slot) and slot.instrument == "spy" and self._budget.is_tight
        return self._budget.warm_up_steps if told else None

    @property
    def waits(self) -> bool:
        """Whether its first steps are to be seen before anything else is done: those of the first group of a run, and
        of any where somebody may find out what is the base's."""
        return self._group.replicate == 0 or not self._budget.costs.has_seen("steps")

    def built(self, sheet: GroupRecords, building_s: float) -> None:
        """Its processes have taken their first step.

        Raises:
            TooShortError: not even one replicate fits into the limit.
        """
        first = [values[STEP] for trial in sheet.live() if STEP in (values := sheet.records[trial].values)]
        if not first or not self._budget.is_limited or not self._group.turns or self._budget.costs.has_seen("steps"):
            return
        step_s = sum(first) / len(first) / FIRST_STEP_SHARE
        beside_s = step_s / self._lanes
        self._budget.expect("steps", step_s)
        self._budget.expect_gap(PREPARING, self._group, building_s / self._trials + beside_s)
        for gap in (HELD_OUT, SERVING, MERGING):
            self._budget.expect_gap(gap, self._group, beside_s)
        groups = (self._group, *self._later)
        slots = [slot for group in groups if group.turns for slot in group.slots]
        steps = (PROFILED_STEPS if slot.instrument == "profile" else SPIED_STEPS for slot in slots)
        self._budget.require_fit(self._plan, groups, ahead_s=(sum(steps) + WARM_STEPS * len(slots)) * beside_s)
        self._budget.judge_tightness(self._plan, groups, self._budget.replicates)

    def warmed(self, sheet: GroupRecords, took_s: Mapping[str, float], *, shared: bool) -> None:
        """They are about to be timed. `shared` says that their warm-up was as long as an earlier replicate had told."""
        last = [times[-1] for trial in sheet.live() if (times := sheet.records[trial].samples.get(WARM))]
        self._step_s = sum(last) / len(last) if last else 0.0
        if not self._step_s:
            return
        counts = warmup_lengths(sheet)
        if counts and not shared:
            known = self._budget.warm_up_steps or 1  # of the trials before these, where each is a group of its own
            self._budget.warm_up_steps = max(known, steady_together(_times(sheet)))
        self._budget.expect("steps", self._step_s)
        beside_s = self._step_s / self._lanes
        self._budget.expect_gap(HELD_OUT, self._group, beside_s)
        alone = 1 + SPIED_STEPS + self._plan.study.protocol.warmup_steps_min
        for solo in (group for group in self._later if not group.turns):
            self._budget.expect_gap(PREPARING, solo, alone * self._step_s)
        if counts and not self._is_short:
            catching = self._plan.study.protocol.warmup_steps_max - sum(counts) / len(counts)
            self._budget.expect_gap("steps", self._group, catching * beside_s)
        if self._is_short and not shared and counts and self._budget.warm_up_steps is not None:
            both_s = took_s["verify"] + took_s["warm_up"]
            self._budget.pay_once(max(0.0, both_s - self._budget.warm_up_steps * len(counts) * beside_s))
        elif any(slot.instrument == "profile" for slot in self._group.slots):
            self._budget.pay_once(max(0.0, took_s["verify"] - SPIED_STEPS * beside_s * len(sheet.live())))

    def served(self, sheet: GroupRecords, kind: Literal["requests", "merged"]) -> None:
        """They have answered a request of two tokens, which says what a whole one takes."""
        records = (sheet.records[trial] for trial in sheet.live(kind))
        foreseen = [one for record in records if (one := record.values.get(REQUEST[kind]))]
        if foreseen:
            self._budget.expect(kind, sum(foreseen) / len(foreseen))

    def ended(self, sheet: GroupRecords, finishing_s: float) -> None:
        """Their training has ended, by the steps with which shorter warm-ups are caught up and, if it was taken, the
        held-out loss. Those steps come only where trials find out themselves how long theirs need be."""
        counts, taken = (
            warmup_lengths(sheet),
            [len(record.samples.get(CAUGHT_UP, ())) for record in sheet.records.values()],
        )
        caught_up_s = min(finishing_s, sum(taken) * self._step_s / self._lanes)
        if self._group.held_out and counts:
            self._budget.note_apart(HELD_OUT, self._group, finishing_s - caught_up_s)
        if self._is_short:
            self._budget.pay_once(caught_up_s)

    @property
    def _is_short(self) -> bool:
        return self._budget.is_tight and not any(slot.side for slot in self._group.slots)

    def further_turns(self) -> Iterator[tuple[str, ...]] | None:
        """Orders of turns beyond those of the plan, for where more are worth their time; none where the learning rate
        would have come to its end."""
        constant = all(slot.variant.schedule == "constant" and not slot.variant.command for slot in self._group.slots)
        if not (self._budget.is_limited and constant and self._group.turns) or self._group.slots[0].side:
            return None
        drawn = random.Random(f"{self._plan.study.protocol.seed} {self._group.replicate}")
        order = self._group.turns[-1]
        return (tuple(drawn.sample(order, len(order))) for _ in iter(int, 1))


def warmup_lengths(sheet: GroupRecords) -> list[int]:
    """How many steps it took each trial to warm up."""
    return [len(times) for times in _times(sheet)]


def _times(sheet: GroupRecords) -> list[tuple[float, ...]]:
    return [sheet.records[trial].samples.get(WARM, ()) for trial in sheet.live("steps")]
