"""When a run has what it needs: by precision or by time, never by significance.

Looking after every replicate whether the difference is significant raises the rate of false alarms from 5 % to 21 %
over 20 looks. The width of the interval is another matter: it says nothing of the direction, so a run may stop as soon
as it is narrow enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.records.metrics import primary_metric
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_count
from lorameter.run.budget import Budget
from lorameter.run.plan import Plan
from lorameter.stats import Comparison, VerdictRule, is_precise, relative_half_width
from lorameter.verdicts.series import compare_series, effects_against, group_trials

LEAST_TO_STOP = 5
"""Fewer give a standard deviation that is itself too uncertain to stop on."""


class Stopping:
    """The protocol's stopping rule; is asked after each replicate."""

    def __init__(self, plan: Plan, budget: Budget | None = None, *, earlier: Sequence[TrialRecord] = ()) -> None:
        """`budget` is the clock of this invocation; `earlier` are records that it has not spent its time on."""
        self._plan = plan
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
        if self._next_s(records) > self._budget.left_s:
            return f"another replicate would end after the limit of {minutes:g} minutes"
        return None

    def _next_s(self, records: Sequence[TrialRecord]) -> float:
        """Seconds that another replicate takes: the longest so far, or where other clocks have timed them the mean."""
        longest = self._budget.longest_s
        if longest is not None:
            return longest
        measured = len({record.replicate for record in records if record.trial not in self._earlier})
        return self._budget.spent_s / measured

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
