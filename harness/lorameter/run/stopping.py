"""When a run has what it needs: by precision or by time, never by significance.

Looking after every replicate whether the difference is significant raises the rate of false alarms from 5 % to 21 %
over 20 looks. The width of the interval is another matter: it says nothing of the direction, so a run may stop as soon
as it is narrow enough.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from lorameter.records.metrics import primary_metric
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_count
from lorameter.run.budget import MEDIAN_TURNS, Budget
from lorameter.run.plan import Group, Plan
from lorameter.stats import Comparison, VerdictRule, is_precise, optimal_rounds, relative_half_width
from lorameter.verdicts.series import compare_series, effects_against, group_trials

LEAST_TO_STOP = 5
"""Fewer give a standard deviation that is itself too uncertain to stop on."""
MOST_TURNS = 4
"""Times the turns of the plan that a replicate takes at most: where replicates hardly differ the optimum has no bound,
and what is between so few of them is not known well."""


class Stopping:
    """The protocol's stopping rule; is asked after each replicate."""

    def __init__(
        self, plan: Plan, budget: Budget | None = None, *, earlier: Sequence[TrialRecord] = (), sites: int = 1
    ) -> None:
        """`budget` is the clock of this invocation; `earlier` are records that it has not spent its time on; `sites`
        says how many replicates are measured at once."""
        self._plan, self._sites = plan, sites
        self._budget = budget or Budget()
        self._earlier = {record.trial for record in earlier}

    def __call__(self, records: Sequence[TrialRecord]) -> str | None:
        """The reason to stop, or None to go on."""
        protocol = self._plan.study.protocol
        replicates = len({record.replicate for record in records})
        if protocol.precision is not None:
            found = self._comparisons(records)
            if is_precise(found, half_width=protocol.precision, least_replicates=LEAST_TO_STOP):
                widest = max(width for one in found if (width := relative_half_width(one)) is not None)
                return (
                    f"every interval is within ±{100 * widest:.2g} % after "
                    f"{format_count(replicates, 'replicate')}, and ±{100 * protocol.precision:.2g} % were asked for"
                )
        minutes = protocol.max_minutes
        if minutes is None:
            return None
        left_s = 60 * minutes - self._budget.spent_s
        if self._next_s(records) > left_s + self._budget.grace_s:
            return f"another replicate would end after the limit of {minutes:g} minutes"
        self._spend(records)
        return None

    def _spend(self, records: Sequence[TrialRecord]) -> None:
        """Take as many turns in the next replicate as narrow the intervals most in the time that is left: those of the
        variant that takes most, and what a median needs, whatever is best for a mean. They are more than are planned
        where a process costs much more than they do and not all replicates would fit."""
        following, planned = self._following(records), self._plan.study.protocol.turns
        process_s, round_s = self._budget.costs_s(self._plan.study, following)
        best = [
            rounds
            for ratios in turn_ratios(records, self._plan.study.reference)
            if (rounds := optimal_rounds(ratios, process_s=process_s, round_s=round_s)) is not None
        ]
        if best:
            left = self._plan.study.protocol.replicates - following[0].replicate
            fits = left * (process_s + planned * round_s) <= self._budget.left_s
            most = max(best)
            optimum = most if math.isfinite(most) else None
            turns = min(max(most, MEDIAN_TURNS), planned if fits else MOST_TURNS * planned)
            self._budget.allow("steps", math.ceil(turns), optimum=optimum)

    def _next_s(self, records: Sequence[TrialRecord]) -> float:
        """Seconds that another replicate takes at least; before rounds were seen, what those measured took each."""
        least = self._budget.least_s(self._plan.study, self._following(records))
        if least is not None:
            return least
        measured = len({record.replicate for record in records if record.trial not in self._earlier})
        return self._sites * self._budget.spent_s / measured  # on several sites that many are measured meanwhile

    def _following(self, records: Sequence[TrialRecord]) -> list[Group]:
        """The groups of the next replicate."""
        last = max((record.replicate for record in records), default=-1)
        groups = [group for group in self._plan.groups if group.replicate == last + 1]
        return list(self._budget.thin(self._plan, groups))

    def _comparisons(self, records: Sequence[TrialRecord]) -> list[Comparison]:
        """Everything against the reference, and the reference against its twin, in the primary metric of each phase."""
        reference, own = self._plan.study.reference, bool(self._plan.own_workloads)
        metrics = [primary_metric(phase, own_workloads=own) for phase in self._plan.phases]  # type: ignore[arg-type]
        if not any(record.side for record in records):
            groups = group_trials(records)
            if (reference, "variant") not in groups:
                return []
            effects = [effects_against(groups, reference, metric) for metric in metrics]
            return [one.compare(VerdictRule()) for found in effects for one in found.values()]
        bases, found = group_trials(records, "base"), []
        for side in sorted({record.side for record in records}):
            for (name, role), series in group_trials(records, side).items():
                key = (name, "variant")
                if key not in bases or (side == "base" and (name, role) == key):
                    continue
                for metric in metrics:
                    comparison = compare_series(bases[key], series, metric)
                    found += [comparison] if comparison is not None else []
        return found


def turn_ratios(records: Sequence[TrialRecord], reference: str) -> Iterator[list[list[float]]]:
    """For each variant that is compared with the reference, or with its own base: for each replicate the log ratios of
    the turns that they took beside each other."""
    turns = {
        (record.side, record.name, record.role, record.replicate): _turns(record)
        for record in records
        if record.status == "ok" and record.turn_lengths
    }
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for (side, name, role, replicate), ours in turns.items():
        base = ("base", name, "variant") if side else ("", reference, "variant")
        theirs = turns.get((*base, replicate), [])  # type: ignore[arg-type]
        if role == "variant" and (side, name, role) != base and len(ours) == len(theirs):
            ratios = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
            found.setdefault((side, name, role), []).append(ratios)
    yield from found.values()


def _turns(record: TrialRecord) -> list[float]:
    """The median step of each turn."""
    times = iter(record.samples.get("step_time_s", ()))
    return [statistics.median(next(times) for _ in range(length)) for length in record.turn_lengths]
