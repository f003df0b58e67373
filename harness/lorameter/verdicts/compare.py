"""Two runs of different times, compared: what their fingerprints allow, and not a word more.

Sides that were not measured together share nothing but the machine, so their trials are not paired (Welch on the logs
of medians), and times are never called equivalent: what the machine did between the two measurements is in the ratio.
The standard deviation of the log ratio of two identical builds was 37 % that way and 2 % with turns in one run
(docs/method.md). Where anything that must agree does not, there is no ratio at all; `force` shows one all the same and
takes nothing it says for equality.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.metrics import METRICS, PRIMARY
from lorameter.records.record import Interleaving, Notice
from lorameter.stats import Comparison, run_wide_shift
from lorameter.verdicts.compare_pairs import (
    TOLERANCE,
    Key,
    LimitsOf,
    MetricPair,
    default_limits,
    default_metrics,
    judge_pairs,
    matching,
    rows_of,
)
from lorameter.verdicts.comparison_input import (
    BYTES_SUFFIX,
    ComparisonInput,
    Difference,
    disagreement,
    is_memory,
    machine_differences,
    unknown_power_limit,
    variant_differences,
)
from lorameter.verdicts.comparison_report import ComparisonReport
from lorameter.verdicts.series import downgrade_equivalent, verdict_only

INTERLEAVING: Interleaving = "separate"
FEWEST_FOR_SHIFT = 6
"""Fewer than 6 of 6 on one side can be chance at 5 % (two-sided sign test)."""


def compare(
    base: ComparisonInput,
    candidate: ComparisonInput,
    *,
    metrics: Sequence[str] = (),
    all_metrics: bool = False,
    limits_of: LimitsOf = default_limits,
    force: bool = False,
) -> ComparisonReport:
    """Every metric of every variant, candidate against base.

    Args:
        base: the side that is trusted.
        candidate: the side that is judged.
        metrics: names or glob patterns of metrics and kinds of memory; empty for the primary metric of each phase that
            both sides have, and the peaks of memory.
        all_metrics: everything that either side measured, instead.
        limits_of: tolerance and margin by variant and metric.
        force: compare what is not comparable; then nothing is called equivalent.

    Raises:
        UsageError: a metric that neither exists nor was measured.
        InvalidRunError: no variant on either side, because a run was interrupted.
    """
    broken = base.broken or candidate.broken
    if broken and not base.sides and not candidate.sides:
        raise InvalidRunError(f"{broken}. Nothing was measured; measure again.")
    wanted = _wanted(base, candidate, metrics, all_metrics=all_metrics)
    machine = machine_differences(base, candidate)
    names = dict.fromkeys((*base.sides, *candidate.sides))
    changed = {name: variant_differences(name, base, candidate) for name in names}
    pairs = [
        _pair(name, metric, base, candidate, () if force else (*machine, *changed[name]))
        for name in names
        for metric in _metrics_of(wanted, base, candidate, name)
    ]
    verdicts = judge_pairs(pairs, limits_of)
    if not machine:  # with --force across machines a shift is what one asked to see
        verdicts |= _shifted({pair.key: verdicts[pair.key] for pair in pairs if pair.refusal is None})
    differing = (*machine, *(difference for name in names for difference in changed[name]))
    if force and differing:
        verdicts = {
            key: downgrade_equivalent(comparison, f"{comparison.reason}; but the sides are not comparable")
            for key, comparison in verdicts.items()
        }
    return ComparisonReport(
        base=base.name,
        candidate=candidate.name,
        comparisons=rows_of(pairs, verdicts, limits_of),
        control=dict(candidate.control),
        differing=differing,
        notices=(*base.notices, *candidate.notices, *_notices(base, candidate, wanted, verdicts)),
    )


def _wanted(
    base: ComparisonInput, candidate: ComparisonInput, patterns: Sequence[str], *, all_metrics: bool
) -> tuple[str, ...]:
    """Names of metrics and kinds of memory, in the order of the phases."""
    measured = [
        metric for side in (*base.sides.values(), *candidate.sides.values()) for metric in (*side.trials, *side.peaks)
    ]
    known = tuple(dict.fromkeys([*(name for name in METRICS if name in measured), *measured]))
    if all_metrics:
        return known
    if patterns:
        for pattern in patterns:
            if not fnmatch.filter([*known, *METRICS], pattern):
                near = difflib.get_close_matches(pattern, [*known, *METRICS], n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Measured: {', '.join(known) or 'nothing'}."
                raise UsageError(f"metric {pattern!r}: neither known nor measured on either side. {hint}")
        return tuple(matching(known, patterns))
    phases = [phase for phase in candidate.phases if base.absent is not None or phase in base.phases]
    # What another project's file measured has no phase.
    foreign = [metric for metric in known if metric not in METRICS and not is_memory(metric)]
    return (*default_metrics(phases, known), *foreign)


def _metrics_of(wanted: Sequence[str], base: ComparisonInput, candidate: ComparisonInput, name: str) -> list[str]:
    """Those that either side of a variant measured; all times where a failure left nothing."""
    sides = [side for side in (base.sides.get(name), candidate.sides.get(name)) if side is not None]
    found = [metric for metric in wanted if any(side.has(metric) for side in sides)]
    if found or not any(side.broken or not (side.trials or side.peaks) for side in sides):
        return found
    return [metric for metric in wanted if not is_memory(metric)] or list(wanted)[:1] or [PRIMARY["train"]]


def _pair(
    name: str, metric: str, base: ComparisonInput, candidate: ComparisonInput, differing: Sequence[Difference]
) -> MetricPair:
    """One metric of one variant, unpaired; `differing` forbids a ratio."""
    ours, theirs = base.sides.get(name), candidate.sides.get(name)
    refusal = _forbidden(base, candidate, name, metric)
    if refusal is None and differing:
        refusal = verdict_only("not_comparable", disagreement(differing))
    sides = None if refusal is not None or ours is None or theirs is None else (ours, theirs)
    return MetricPair(variant=name, metric=metric, interleaving=INTERLEAVING, sides=sides, refusal=refusal)


def _forbidden(base: ComparisonInput, candidate: ComparisonInput, name: str, metric: str) -> Comparison | None:
    """The verdict where the numbers do not count or are not there."""
    ours, theirs = base.sides.get(name), candidate.sides.get(name)
    faults = [base.broken, candidate.broken, *(side.broken for side in (ours, theirs) if side is not None)]
    if said := [fault for fault in faults if fault]:
        return verdict_only("invalid", "; ".join(said))
    if base.absent is not None:
        return verdict_only("no_baseline", base.absent)
    if theirs is None:
        return verdict_only("not_comparable", f"variant {name!r}: it is in the base and not in the candidate")
    if ours is None:
        return verdict_only("no_baseline", f"variant {name!r}: it is in the candidate and not in the base")
    if not theirs.has(metric):
        return verdict_only("not_comparable", f"the candidate has no {metric} of variant {name!r}")
    if not ours.has(metric):
        return verdict_only("no_baseline", f"the base has no {metric} of variant {name!r}")
    return None


def _shifted(found: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """Every time as invalid, if nearly all moved alike: then it was the machine. {} if it was not.

    One ratio a variant and phase is asked, since metrics that follow from each other would count one movement twice.
    """
    times = {key: comparison for key, comparison in found.items() if not key[1].endswith(BYTES_SUFFIX)}
    log_ratios = {
        f"{name}, {metric}": math.log(comparison.ratio)
        for (name, metric), comparison in times.items()
        if metric in PRIMARY.values() and comparison.ratio is not None
    }
    if len(log_ratios) < FEWEST_FOR_SHIFT:
        return {}
    shift = run_wide_shift(log_ratios, tolerance=TOLERANCE)
    if not shift.shifted:
        return {}
    return {
        key: dataclasses.replace(comparison, verdict="invalid", reason=shift.reason)
        for key, comparison in times.items()
        if comparison.verdict != "invalid"
    }


def _notices(
    base: ComparisonInput, candidate: ComparisonInput, wanted: Sequence[str], verdicts: Mapping[Key, Comparison]
) -> list[Notice]:
    limit = unknown_power_limit(base, candidate)
    notices = [] if limit is None else [limit]
    for one, other in ((base, candidate), (candidate, base)):
        missing = [phase for phase in one.phases if phase not in other.phases]
        if missing and base.absent is None:
            notices.append(
                Notice(
                    code="phase-only-on-one-side",
                    message=f"only {one.name} measured {', '.join(missing)}; that is not compared.",
                    remedy="Measure the same phases on both sides.",
                )
            )
    unmeasured = [metric for metric in wanted if metric not in {key[1] for key in verdicts}]
    if unmeasured or not verdicts:
        notices.append(
            Notice(
                code="nothing-compared",
                message=f"neither side measured {', '.join(unmeasured) or 'anything that was asked for'}.",
                remedy="Look at what there is with --all-metrics.",
            )
        )
    return notices
