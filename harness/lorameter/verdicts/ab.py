"""The report of an A/B run: candidate against base, paired turn by turn, and the attribution of the effect.

The control compares the base with itself, in the same turns: if it differs, the run does not count; if it is
inconclusive, nothing is called equivalent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import require
from lorameter.machine.provenance import differing_packages
from lorameter.measurements.metrics import METRICS, Phase
from lorameter.records.record import SIDES, Interleaving, Notice, Side
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.verdicts.compare import (
    ComparisonReport,
    Difference,
    comparison_row,
    default_metrics,
    match_patterns,
)
from lorameter.verdicts.notices import collect_notices, join_notices
from lorameter.verdicts.same_training import compare_losses, pair_scripts, versions_by_name
from lorameter.verdicts.series import (
    Key,
    LimitsOf,
    Pair,
    Series,
    at_level,
    compare_series,
    default_limits,
    group_trials,
    is_memory,
    is_mixed,
    judge,
    pairs_against,
    split_sites,
    without_equality,
)
from lorameter.verdicts.validity import run_validity


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEffect(Comparison):
    """One metric of a variant's training, generation or start, which shows where an effect comes from."""

    variant: str
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Differences between the sides, and the distribution of the time. Not corrected for multiple comparisons, so
    without verdicts."""

    packages: dict[str, tuple[str | None, str | None]]
    """Distributions whose versions differ: base, candidate; None if not installed."""
    differing: tuple[Difference, ...]
    """Other facts of the two sides."""
    parts: tuple[PhaseEffect, ...]


def build_report(
    run: Run, *, metrics: Sequence[str] = (), limits_of: LimitsOf = default_limits, losses: bool = False
) -> ComparisonReport:
    """The verdicts of an A/B run; if its sites differ, the verdicts of each site.

    Args:
        run: a run with two sides.
        metrics: names or patterns to judge; empty for the primary metric of each phase and the peaks of memory.
        limits_of: tolerance and margin by variant and metric.
        losses: whether to compare the losses of both sides; the losses of scripts are always compared.

    Raises:
        UsageError: the run has no sides.
    """
    study = _study(run)
    validity = run_validity(run, study)
    if is_mixed(run):
        sites = split_sites(run).items()
        by_site = {
            site: build_report(part, metrics=metrics, limits_of=limits_of, losses=losses) for site, part in sites
        }
        return _join_sites(run, validity.broken, by_site)
    base, candidate = (group_trials(run.records, side) for side in SIDES)
    scripts = pair_scripts(run, study) if losses or study.supports("own training") else {}
    verdicts: dict[Key, Comparison] = {}
    levels: dict[Key, Interleaving] = {}
    pairs: dict[Key, Pair] = {}
    for name in (variant.name for variant in study.variants):
        ours, theirs = base.get((name, "variant")), candidate.get((name, "variant"))
        arms = {"candidate": theirs, "control": base.get((name, "control"))}
        others = {arm: series for arm, series in arms.items() if series is not None}
        found = [series for series in (ours, theirs) if series is not None]
        if not found and not (validity.broken and name in (run.manifest.selection or (name,))):
            continue
        faults = [validity.broken, *(validity.broken_variant(name, side) for side in SIDES)]
        broken = next(filter(None, faults), "")
        per_token = name in scripts and scripts[name].tokens_differ
        for metric in _choose_metrics(run, found, metrics, broken=bool(broken), per_token=per_token):
            key = name, metric
            levels[key] = (found[0].interleaving(metric) if found else None) or "replicates"
            pair = None if broken else pairs_against(ours, others, metric).get("candidate")
            verdicts[key] = Comparison(verdict="invalid", reason=broken or f"no replicate has {metric} on both sides")
            if pair is not None:
                pairs[key] = pair
    judged = judge(pairs, at_level(study.protocol.alpha, limits_of))
    if any(control is None or control.verdict != "equivalent" for control in validity.controls.values()):
        why = "but the base against itself is not equivalent, so the candidate cannot be"
        judged |= without_equality({key: one for key, one in judged.items() if not is_memory(key[1])}, why)
    return ComparisonReport(
        base=str(run.manifest.sides["base"]["label"]),
        candidate=str(run.manifest.sides["candidate"]["label"]),
        comparisons=tuple(
            comparison_row(*key, one, levels[key], limits_of) for key, one in (verdicts | judged).items()
        ),
        control=dict(validity.controls.items()),
        notices=_notices(run, study, validity.controls),
        losses={name: compare_losses(pair) for name, pair in scripts.items()},
    )


def _join_sites(run: Run, broken: str | None, by_site: Mapping[str, ComparisonReport]) -> ComparisonReport:
    """Combine the reports of all sites: the gate passes only if every site passes. If there is no site, the report has
    no row and does not pass."""
    invalid = dataclasses.asdict(Comparison(verdict="invalid", reason=broken)) if broken else {}
    return ComparisonReport(
        base=str(run.manifest.sides["base"]["label"]),
        candidate=str(run.manifest.sides["candidate"]["label"]),
        comparisons=tuple(
            dataclasses.replace(row, site=site, **invalid)
            for site, report in by_site.items()
            for row in report.comparisons
        ),
        control={
            f"{phase} on {site}": found for site, report in by_site.items() for phase, found in report.control.items()
        },
        notices=join_notices(run, {site: report.notices for site, report in by_site.items()}),
        losses={
            f"{name} on {site}": found for site, report in by_site.items() for name, found in report.losses.items()
        },
    )


def _choose_metrics(
    run: Run, sides: Sequence[Series], patterns: Sequence[str], *, broken: bool, per_token: bool
) -> list[str]:
    """The metrics to judge; if steps of the sides hold different numbers of tokens, they include the time per real
    token."""
    measured = {metric for side in sides for metric in side.metrics}
    known = [*(metric for metric in METRICS if metric in measured), *sorted(filter(is_memory, measured))]
    extra = ["time_per_real_token_s"] if per_token and "time_per_real_token_s" in known else []
    if not patterns:
        return default_metrics(run.manifest.phases, known) + extra
    chosen = match_patterns(known, patterns)
    if not chosen and (broken or not sides):  # an empty report would hide the failure
        chosen = default_metrics(run.manifest.phases, ())[:1]
    return chosen


def attribute_difference(run: Run) -> Attribution:
    """Differences between the sides, and the ratio of every common metric, for each site if sites differ."""
    _study(run)  # raises if the run has no sides
    facts = [_facts(run, side) for side in SIDES]
    by_site = split_sites(run) if is_mixed(run) else {"": run}
    return Attribution(
        packages=dict(differing_packages(*facts)),
        differing=tuple(
            Difference(field=name, base=facts[0].get(name), candidate=facts[1].get(name))
            for name in ("python", "cuda", "git")
            if facts[0].get(name) != facts[1].get(name)
        ),
        parts=tuple(
            dataclasses.replace(part, variant=f"{part.variant} on {site}") if site else part
            for site, one in by_site.items()
            for part in _list_effects(one)
        ),
    )


def _list_effects(run: Run) -> Iterator[PhaseEffect]:
    base, candidate = (group_trials(run.records, side) for side in SIDES)
    for name in (variant.name for variant in _study(run).variants):
        ours, theirs = base.get((name, "variant")), candidate.get((name, "variant"))
        if ours is None or theirs is None:
            continue
        for metric in METRICS:
            found = compare_series(ours, theirs, metric)
            if found is not None and found.ratio is not None:
                yield PhaseEffect(variant=name, metric=metric, **dataclasses.asdict(found))


def _facts(run: Run, side: Side) -> dict[str, Any]:
    """The installed packages of a side, as its scripts report them, else those of its interpreter."""
    stated: dict[str, Any] = run.manifest.sides[side].get("facts") or {"packages": {}}
    versions = versions_by_name(run.records, side)
    if not versions:
        return stated
    own = {name: versions.pop(name, None) for name in ("python", "cuda")}
    return stated | own | {"packages": versions}


def _study(run: Run) -> Study:
    require(run.manifest.sides, f"run {run.manifest.run}: it has no sides. Compare two runs with `lorameter compare`.")
    return read_study(run)


def _notices(run: Run, study: Study, controls: Mapping[Phase, Comparison | None]) -> tuple[Notice, ...]:
    """The notices of a run, after one about sides without a known difference."""
    identical = Notice(
        code="sides-identical",
        message="both sides have the same packages, the same harness and the same commit: nothing that lorameter knows "
        "of differs between them.",
        remedy="Read it as an A/A: what it shows is noise. Otherwise look at what the two sides name.",
    )
    return (*([identical] if _has_no_known_difference(run) else []), *collect_notices(run, study, controls))


def _has_no_known_difference(run: Run) -> bool:
    """Whether no difference is known: a mistyped side would otherwise be `equivalent`."""
    base, candidate = (run.manifest.sides[side] for side in SIDES)
    if base.get("kind") == SIDE:  # everything else is equal on purpose
        return bool(base.get("spec") == candidate.get("spec"))
    ours, theirs = (versions_by_name(run.records, side) for side in SIDES)
    if ours and ours == theirs and base.get("kind") != "revision":
        return True
    same_worker = base.get("worker") == candidate.get("worker")
    return same_worker and base.get("facts") is not None and base.get("facts") == candidate.get("facts")
