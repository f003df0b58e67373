"""What an A/B run says: the candidate against the base, paired turn by turn, and what the effect can be laid to.

The base against itself, measured in the same turns, is the control: if it differs, nothing of the run counts; if it
leaves the question open, nothing is called equivalent.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.provenance import differing_packages
from lorameter.records.metrics import METRICS
from lorameter.records.record import Interleaving, Notice
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.from_run import read_study
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.verdicts.compare import (
    LimitsOf,
    MetricPair,
    default_limits,
    default_metrics,
    judge_pairs,
    matching,
    rows_of,
)
from lorameter.verdicts.comparison_input import Difference, Measurements, is_memory, measurements_of
from lorameter.verdicts.comparison_report import ComparisonReport, fields_of
from lorameter.verdicts.notices import run_notices
from lorameter.verdicts.same_training import losses_of_run, sides_of_run
from lorameter.verdicts.series import (
    Series,
    compare_series,
    downgrade_equivalent,
    group_trials,
    pairing_of,
    pairs_of,
    verdict_only,
)
from lorameter.verdicts.sites import is_mixed, join_notices, runs_of_sites
from lorameter.verdicts.software import say_versions, versions_by_name
from lorameter.verdicts.validity import RunValidity, run_validity


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEffect(Comparison):
    """One metric of the training, generation or start of a variant, to see where an effect comes from."""

    variant: str
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What differs between the sides, and where the time went. Not corrected for the number of looks: no verdicts."""

    packages: dict[str, tuple[str | None, str | None]]
    """Distributions whose versions differ: base, candidate; None where it is not installed."""
    differing: tuple[Difference, ...]
    """Other facts of the two sides."""
    parts: tuple[PhaseEffect, ...]


def report_of(
    run: Run, *, metrics: Sequence[str] = (), limits_of: LimitsOf = default_limits, losses: bool = False
) -> ComparisonReport:
    """The verdicts of an A/B run.

    Args:
        run: a run with two sides.
        metrics: names or patterns to judge; empty for the primary metric of each phase and the peaks of memory.
        limits_of: tolerance and margin by variant and metric.
        losses: whether those of both sides are to be compared; those of scripts always are.

    Raises:
        UsageError: a run without sides.
    """
    study = _study(run)
    validity = run_validity(run, study)
    if is_mixed(run):
        sites = runs_of_sites(run).items()
        by_site = {site: report_of(part, metrics=metrics, limits_of=limits_of, losses=losses) for site, part in sites}
        return _report_of_sites(run, validity.broken, by_site)
    control: dict[str, Comparison | None] = dict(validity.controls.items())
    pairs = _pairs(run, study, validity, metrics)
    verdicts = judge_pairs(pairs, limits_of)
    if any(result is None or result.verdict != "equivalent" for result in control.values()):
        why = "the base against itself is not equivalent, so the candidate cannot be"
        verdicts |= {pair.key: downgrade_equivalent(verdicts[pair.key], why) for pair in pairs if not pair.of_memory}
    sides = run.manifest.sides
    return ComparisonReport(
        base=str(sides["base"]["label"]),
        candidate=str(sides["candidate"]["label"]),
        comparisons=rows_of(pairs, verdicts, limits_of),
        control=control,
        notices=tuple(dict.fromkeys(_notices(run, study, control))),
        losses=losses_of_run(run, study) if losses or study.of_scripts else {},
    )


def _report_of_sites(run: Run, broken: str | None, by_site: Mapping[str, ComparisonReport]) -> ComparisonReport:
    """What each site says, side by side: a gate lets pass what all of them let pass. Without a site there is no row,
    which is no pass either."""
    sides = run.manifest.sides
    rows = [
        dataclasses.replace(row, site=site, **(fields_of(verdict_only("invalid", broken)) if broken else {}))
        for site, report in by_site.items()
        for row in report.comparisons
    ]
    return ComparisonReport(
        base=str(sides["base"]["label"]),
        candidate=str(sides["candidate"]["label"]),
        comparisons=tuple(rows),
        control={
            _on(phase, site): found for site, report in by_site.items() for phase, found in report.control.items()
        },
        notices=join_notices(run, {site: report.notices for site, report in by_site.items()}),
        losses={_on(name, site): found for site, report in by_site.items() for name, found in report.losses.items()},
    )


def _on(what: str, site: str) -> str:
    return f"{what} on {site}"


def _pairs(run: Run, study: Study, validity: RunValidity, metrics: Sequence[str]) -> list[MetricPair]:
    """Every metric that is wanted of every variant; in a run that does not count also of what has no number."""
    broken = validity.broken
    groups = [group_trials(run.records, side) for side in ("base", "candidate")]
    pairs: list[MetricPair] = []
    compared = sides_of_run(run, study) if study.of_scripts else {}
    for variant in study.variants:
        series = [side[variant.name, "variant"] for side in groups if (variant.name, "variant") in side]
        if not series and not (broken and variant.name in (run.manifest.selection or (variant.name,))):
            continue
        sides = [
            measurements_of(one, study, validity.broken_variant(variant.name, one.records[0].side)) for one in series
        ]
        said = [fault for fault in (broken, *(side.broken for side in sides)) if fault]
        differ = variant.name in compared and compared[variant.name].tokens_differ
        for metric in _wanted(run, sides, metrics, tokens_differ=differ):
            if said or len(sides) < 2 or not all(side.has(metric) for side in sides):
                refusal = verdict_only("invalid", said[0] if said else f"one side has no {metric}")
                level = _level(series, metric)
                pairs.append(MetricPair(variant=variant.name, metric=metric, interleaving=level, refusal=refusal))
            else:
                control = groups[0].get((variant.name, "control"))
                pairs.append(_pair(metric, (sides[0], sides[1]), (series[0], series[1]), control))
    return pairs


def _pair(
    metric: str, sides: tuple[Measurements, Measurements], series: tuple[Series, Series], control: Series | None
) -> MetricPair:
    """Both sides with the trials of the replicates that both have undisturbed; peaks need no pairs."""
    name, level = sides[0].name, _level(series, metric)
    if is_memory(metric):
        return MetricPair(variant=name, metric=metric, interleaving=level, sides=sides)
    found = pairs_of(*series, metric)
    base, candidate = (found.base, found.candidate) if found else ([], [])
    again = None if control is None else pairs_of(series[0], control, metric)
    return MetricPair(
        variant=name,
        metric=metric,
        interleaving=level,
        sides=(
            dataclasses.replace(sides[0], trials={metric: base}),
            dataclasses.replace(sides[1], trials={metric: candidate}),
        ),
        pairing=pairing_of(series[0], metric),
        drops=found.drops if found else None,
        control=None if again is None else (again.base, again.candidate),
    )


def attribution_of(run: Run) -> Attribution:
    """What differs between the sides, and the ratio of every metric that both have; on each of several unlike sites."""
    _study(run)  # which has sides
    facts = [_facts(run, side) for side in ("base", "candidate")]
    if is_mixed(run):
        sites = runs_of_sites(run).items()
        parts = [
            dataclasses.replace(part, variant=_on(part.variant, site)) for site, one in sites for part in _parts_of(one)
        ]
    else:
        parts = _parts_of(run)
    return Attribution(
        packages=dict(differing_packages(*facts)),
        differing=tuple(
            Difference(field=name, base=facts[0].get(name), candidate=facts[1].get(name))
            for name in ("python", "cuda", "git")
            if facts[0].get(name) != facts[1].get(name)
        ),
        parts=tuple(parts),
    )


def _parts_of(run: Run) -> list[PhaseEffect]:
    study = _study(run)
    base, candidate = group_trials(run.records, "base"), group_trials(run.records, "candidate")
    parts = []
    for variant in study.variants:
        ours, theirs = base.get((variant.name, "variant")), candidate.get((variant.name, "variant"))
        for metric in METRICS if ours and theirs else ():
            comparison = None
            with contextlib.suppress(InvalidRunError):  # samples without a ratio, as a loss of zero, cost no verdict
                comparison = compare_series(ours, theirs, metric)  # type: ignore[arg-type]
            if comparison is not None:
                parts.append(PhaseEffect(variant=variant.name, metric=metric, **fields_of(comparison)))
    return parts


def _facts(run: Run, side: str) -> dict[str, Any]:
    """What a side has installed, as its scripts tell it, else as its interpreter did."""
    stated: dict[str, Any] = run.manifest.sides[side].get("facts") or {"packages": {}}
    versions = {name: say_versions(seen) for name, seen in _reported_versions(run, side).items()}
    if not versions:
        return stated
    return stated | {name: versions.pop(name, None) for name in ("python", "cuda")} | {"packages": versions}


def _reported_versions(run: Run, side: str) -> dict[str, tuple[str, ...]]:
    return versions_by_name(record for record in run.records if record.side == side)


def _study(run: Run) -> Study:
    if not run.manifest.sides:
        raise UsageError(f"run {run.manifest.run}: it has no sides. Compare two runs with `lorameter compare`.")
    return read_study(run)


def _level(series: Sequence[Series], metric: str) -> Interleaving:
    """How the trials that measured it alternated; peaks come from isolated trials."""
    level = series[0].interleaving(metric) if series and not is_memory(metric) else None
    return level or "replicates"


def _wanted(run: Run, sides: Sequence[Measurements], patterns: Sequence[str], *, tokens_differ: bool) -> list[str]:
    """The metrics to judge; where a step of one side holds more tokens than one of the other, the time per real token
    is one of them."""
    known = [metric for metric in METRICS if any(side.has(metric) for side in sides)]
    known += sorted({kind for side in sides for kind in side.peaks})
    per_token = ["time_per_real_token_s"] if tokens_differ and "time_per_real_token_s" in known else []
    if not patterns:
        return default_metrics(run.manifest.phases, known) + per_token
    found = matching(known, patterns)
    if found or (sides and not any(side.broken for side in sides)):
        return found
    primary = default_metrics(run.manifest.phases, ())
    return matching(primary, patterns) or primary[:1]  # a failure left nothing; it must not read as no row at all


def _notices(run: Run, study: Study, control: Mapping[str, Comparison | None]) -> Iterator[Notice]:
    yield from run.manifest.notices
    if _alike(run):
        yield Notice(
            code="sides-identical",
            message="both sides have the same packages, the same harness and the same commit: nothing that lorameter "
            "knows of differs between them.",
            remedy="Read it as an A/A: what it shows is noise. Otherwise look at what the two sides name.",
        )
    for record in run.records:
        yield from record.notices
    yield from run_notices(run, study, {phase: result for phase, result in control.items() if result is not None})


def _alike(run: Run) -> bool:
    """Whether nothing is known to differ: a mistyped side would come out as `equivalent`."""
    sides = [run.manifest.sides[side] for side in ("base", "candidate")]
    if sides[0].get("kind") == SIDE:  # whatever else there is, is the same on purpose
        return bool(sides[0].get("spec") == sides[1].get("spec"))
    facts = [side.get("facts") for side in sides]
    versions = [_reported_versions(run, side) for side in ("base", "candidate")]
    if versions[0] and versions[0] == versions[1] and sides[0].get("kind") != "revision":
        return True
    return facts[0] == facts[1] and sides[0].get("worker") == sides[1].get("worker") and facts[0] is not None
