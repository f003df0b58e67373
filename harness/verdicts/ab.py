"""What an A/B run says: the candidate against the base, paired turn by turn, and what the effect can be laid to.

The base against itself, measured in the same turns, is the control: if it differs, nothing of the run counts; if it
leaves the question open, nothing is called equivalent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError
from harness.machine.provenance import differing_packages
from harness.records import codec
from harness.records.metrics import METRICS, PEAKS, PHASES, PRIMARY
from harness.records.record import Interleaving, Notice
from harness.records.store import Run
from harness.stats import Comparison, Pairing
from harness.studies.study import Study
from harness.verdicts.comparand import (
    BYTES_SUFFIX,
    Difference,
    Measured,
    control_faults,
    listed,
    measured_of,
    run_faults,
)
from harness.verdicts.notices import run_notices
from harness.verdicts.outcome import (
    Compared,
    ComparisonReport,
    LimitsOf,
    compare_measured,
    default_limits,
    without_numbers,
)
from harness.verdicts.series import Series, compare_series, series_of, undisturbed, with_drops, without_equivalent

Key = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One metric of the training, generation or start of a variant, to see where an effect comes from."""

    variant: str
    metric: str
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What differs between the sides, and where the time went. Not corrected for the number of looks: no verdicts."""

    packages: Mapping[str, tuple[str | None, str | None]]
    """Distributions whose versions differ: base, candidate; None where it is not installed."""
    differing: tuple[Difference, ...]
    """Other facts of the two sides."""
    parts: tuple[Part, ...]


def report_of(run: Run, *, metrics: Sequence[str] = (), limits_of: LimitsOf = default_limits) -> ComparisonReport:
    """The verdicts of an A/B run.

    Args:
        run: a run with two sides.
        metrics: names or patterns to judge; empty for the primary metric of each phase and the peaks of memory.
        limits_of: tolerance and margin by variant and metric.

    Raises:
        UsageError: a run without sides.
    """
    study = _study(run)
    base, candidate = series_of(run.records, "base"), series_of(run.records, "candidate")
    control = control_of(run)
    faults = [*run_faults(run), *control_faults(control)]
    broken = f"run {run.manifest.run}: {listed(faults)}" if faults else None
    verdicts: dict[Key, Comparison] = {}
    pairs: dict[Key, tuple[Measured, Measured]] = {}
    levels: dict[Key, Interleaving] = {}
    pairings: dict[Key, Pairing] = {}
    for variant in study.variants:
        sides = [groups.get((variant.name, "variant")) for groups in (base, candidate)]
        if sides == [None, None]:
            continue
        ours, theirs = (measured_of(side, study, run.manifest.run) if side else None for side in sides)
        for metric in _wanted(run, [side for side in (ours, theirs) if side], metrics):
            key = variant.name, metric
            levels[key] = _level(sides[0] or sides[1], metric)
            said = [fault for fault in (broken, ours and ours.broken, theirs and theirs.broken) if fault]
            if said or ours is None or theirs is None or not (ours.has(metric) and theirs.has(metric)):
                verdicts[key] = without_numbers("invalid", said[0] if said else f"one side has no {metric}")
                continue
            verdicts[key] = without_numbers("invalid", "not compared")  # overwritten; keeps the order
            pairs[key] = _in_pairs(ours, theirs, sides[0], sides[1], metric)  # type: ignore[arg-type]
            pairings[key] = "turn" if levels[key] == "lockstep" else "replicate"
    found = compare_measured(pairs, limits_of, lambda key: pairings[key])
    doubted = any(result is None or result.verdict != "equivalent" for result in control.values())
    if doubted:
        why = "the base against itself is not equivalent, so the candidate cannot be"
        found = {
            key: result if key[1].endswith(BYTES_SUFFIX) else without_equivalent(result, why)
            for key, result in found.items()
        }
    for (name, metric), result in found.items():
        pair = base[name, "variant"], candidate[name, "variant"]
        drops = None if metric.endswith(BYTES_SUFFIX) else undisturbed(*pair, metric)
        verdicts[name, metric] = with_drops(result, drops)
    sides_said = run.manifest.sides
    return ComparisonReport(
        base=str(sides_said["base"]["label"]),
        candidate=str(sides_said["candidate"]["label"]),
        comparisons=tuple(
            Compared(
                variant=name,
                metric=metric,
                comparison=comparison,
                tolerance=limits_of(name, metric).tolerance,
                margin=limits_of(name, metric).margin,
                interleaving=levels[name, metric],
            )
            for (name, metric), comparison in verdicts.items()
        ),
        control=control,
        notices=tuple(dict.fromkeys(_notices(run, study, control))),
    )


def control_of(run: Run) -> dict[str, Comparison | None]:
    """The base against itself, by phase; None where it was not measured."""
    groups = series_of(run.records, "base")
    found: dict[str, Comparison | None] = {}
    for phase in PHASES:
        if phase not in run.manifest.phases:
            continue
        found[phase] = None
        for (name, role), twin in groups.items():
            if role == "control" and (name, "variant") in groups:
                family = len(run.manifest.phases)
                found[phase] = compare_series(groups[name, "variant"], twin, PRIMARY[phase], family=family)
    return found


def attribution_of(run: Run) -> Attribution:
    """What differs between the sides, and the ratio of every metric that both have."""
    study = _study(run)
    facts = [run.manifest.sides[side].get("facts") or {"packages": {}} for side in ("base", "candidate")]
    base, candidate = series_of(run.records, "base"), series_of(run.records, "candidate")
    parts = []
    for variant in study.variants:
        ours, theirs = base.get((variant.name, "variant")), candidate.get((variant.name, "variant"))
        for metric in METRICS if ours and theirs else ():
            comparison = None
            with contextlib.suppress(ValueError):  # samples without a ratio, such as a loss of zero, cost no verdict
                comparison = compare_series(ours, theirs, metric)  # type: ignore[arg-type]
            if comparison is not None:
                parts.append(Part(variant=variant.name, metric=metric, comparison=comparison))
    return Attribution(
        packages=differing_packages(*facts),
        differing=tuple(
            Difference(field=name, base=facts[0].get(name), candidate=facts[1].get(name))
            for name in ("python", "cuda", "git")
            if facts[0].get(name) != facts[1].get(name)
        ),
        parts=tuple(parts),
    )


def _study(run: Run) -> Study:
    if not run.manifest.sides:
        raise UsageError(f"run {run.manifest.run}: it has no sides. Compare two runs with `lorameter compare`.")
    return codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")


def _level(series: Series | None, metric: str) -> Interleaving:
    """How the trials that measured it alternated; peaks come from solo trials."""
    level = None if series is None or metric.endswith(BYTES_SUFFIX) else series.interleaving(metric)
    return level or "replicates"


def _wanted(run: Run, sides: Sequence[Measured], patterns: Sequence[str]) -> list[str]:
    known = [metric for metric in METRICS if any(side.has(metric) for side in sides)]
    known += sorted({kind for side in sides for kind in side.peaks})
    if patterns:
        found = _matching(known, patterns)
        if found or not any(side.broken for side in sides):
            return found
        primary = [PRIMARY[phase] for phase in PHASES if phase in run.manifest.phases]
        return _matching(primary, patterns) or primary[:1]  # a failure left nothing; it must not read as no row at all
    wanted: list[str] = []
    for phase in PHASES:
        if phase in run.manifest.phases:
            wanted += [PRIMARY[phase], *[kind for kind in PEAKS[phase] if kind in known][:1]]
    return wanted


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _in_pairs(
    ours: Measured, theirs: Measured, base: Series, candidate: Series, metric: str
) -> tuple[Measured, Measured]:
    """Both sides with the trials of the replicates that both have undisturbed; peaks need no pairs."""
    if metric.endswith(BYTES_SUFFIX):
        return ours, theirs
    replicates = [{record.replicate for record in side.measuring(metric)} for side in (base, candidate)]
    both = sorted(replicates[0] & replicates[1])
    drops = undisturbed(base, candidate, metric)
    if drops is not None and drops.balanced:
        both = [both[index] for index in drops.kept]

    def kept(measured: Measured, side: Series) -> Measured:
        chosen = [
            trial
            for trial, record in zip(side.trials(metric), side.measuring(metric), strict=True)
            if record.replicate in both
        ]
        return dataclasses.replace(measured, trials={metric: chosen})

    return kept(ours, base), kept(theirs, candidate)


def _notices(run: Run, study: Study, control: Mapping[str, Comparison | None]) -> Iterator[Notice]:
    yield from run.manifest.notices
    if _alike(run):
        yield Notice(
            code="sides-alike",
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
    facts = [side.get("facts") for side in sides]
    return facts[0] == facts[1] and sides[0].get("worker") == sides[1].get("worker") and facts[0] is not None


def attribution_document(run: Run) -> dict[str, Any]:
    """What differs and where the time went, as JSON data."""
    attribution = attribution_of(run)
    return {
        "packages": {name: list(versions) for name, versions in attribution.packages.items()},
        "differing": [codec.to_json(difference) for difference in attribution.differing],
        "parts": [
            {"variant": part.variant, "metric": part.metric, **codec.to_json(part.comparison)}
            for part in attribution.parts
        ],
    }
