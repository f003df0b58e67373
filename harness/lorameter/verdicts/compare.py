"""Compares two sides of any kind, such as two runs or files: the rows, their limits and the exit codes.

There is one family, one set of limits and one kind of row, so that `compare`, `gate`, `ab` and the pytest plugin print
the same verdicts and end with the same exit code. Only a finding of "no worse" passes: an empty comparison, a missing
baseline and an inconclusive verdict do not pass.

Two runs that were not measured together have only the machine in common, so their trials are not paired (Welch on the
logs of medians), and times are never called equivalent: the ratio includes changes of the machine between the two
measurements. The standard deviation of the log ratio of two identical builds was 37 % in this case and 2 % with turns
in one run (docs/method.md). If facts that must agree differ, there is no ratio; `force` shows one anyway, but never
calls it equivalent.

A side is read from a run: the trials of each variant and metric, and why numbers do not count. The comparison itself
never reads a run or a file, so that run directories and saved benchmark files are judged by the same rules.

Another GPU, another torch or another batch size changes a step time by more than most effects of interest, so a ratio
across them is meaningless. A refusal names each field that differs, with both values.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lorameter.errors import (
    EXIT_INCONCLUSIVE,
    EXIT_INVALID,
    EXIT_NOT_COMPARABLE,
    EXIT_PASS,
    EXIT_REGRESSION,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    InvalidRunError,
    require,
)
from lorameter.machine import provenance
from lorameter.measurements.metrics import METRICS, PEAKS, PHASES, PRIMARY, is_difference_metric
from lorameter.records import codec
from lorameter.records.record import Interleaving, Notice
from lorameter.records.store import Run
from lorameter.records.units import first_few
from lorameter.stats import Comparison, Verdict, run_wide_shift
from lorameter.studies.form import AnyVariant
from lorameter.studies.study import Study, unknown_word_message
from lorameter.studies.study_file import read_study
from lorameter.verdicts.same_training import LossAgreement, training_facts
from lorameter.verdicts.series import (
    Key,
    LimitsOf,
    Pair,
    Trials,
    default_limits,
    group_trials,
    is_memory,
    judge,
    without_equality,
)
from lorameter.verdicts.validity import run_validity


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A field that should agree between two sides but differs."""

    field: str
    base: Any
    candidate: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.base!r} in the base, {self.candidate!r} in the candidate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The measurements of one variant on one side."""

    name: str
    id: str | None = None
    """Content id of the variant; None if the file does not contain it."""
    variant: AnyVariant | None = None
    samples: Mapping[str, Trials] = field(default_factory=dict)
    """A list of samples for each trial, by metric or kind of memory."""
    untrained: Mapping[str, float] = field(default_factory=dict)
    """The value of a loss before training, by metric."""
    broken: str | None = None
    """Why no number of this variant counts."""
    no_interval: str | None = None
    """Why these samples give only a ratio."""

    def trials(self, metric: str) -> Trials:
        """The samples of a metric, a list for each trial; [] if it was not measured."""
        return self.samples.get(metric, [])


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonInput:
    """One side of a comparison."""

    name: str
    variants: Mapping[str, Measurements] = field(default_factory=dict)
    """Measurements by the name of the variant."""
    facts: Mapping[str, Any] | None = None
    """Facts that must agree with the other side; None if no fact is known."""
    fingerprint: str | None = None
    study: str | None = None
    phases: tuple[str, ...] = ()
    control: Mapping[str, Comparison | None] = field(default_factory=dict)
    """Control comparisons by phase; None if a control should have been measured but was not."""
    broken: str | None = None
    """Why no number of this side counts."""
    absent: str | None = None
    """Why the side does not exist: no baseline was accepted."""

    def without(self, names: frozenset[str]) -> ComparisonInput:
        """This side without the variants that are left out on purpose."""
        return dataclasses.replace(
            self, variants={name: one for name, one in self.variants.items() if name not in names}
        )


def comparison_input(run: Run) -> ComparisonInput:
    """A lorameter run as a side of a comparison. Raises `UsageError` for an A/B run, which has two sides, and for a run
    whose sites are different machines."""
    require(
        not run.manifest.sides,
        f"run {run.manifest.run}: an A/B run holds both of its sides and its own comparison. Read it with "
        f"`lorameter report {run.manifest.run}`.",
    )
    study, groups = read_study(run), group_trials(run.records)
    validity = run_validity(run, study)
    known = {variant.name: variant for variant in study.variants}
    variants = {
        name: Measurements(
            name=name,
            id=series.records[0].variant,
            variant=known.get(name),
            samples={metric: series.trials(metric) for metric in series.metrics},
            untrained={one: loss for one in series.metrics if (loss := series.untrained(one)) is not None},
            broken=validity.broken_variant(name),
        )
        for (name, role), series in groups.items()
        if role == "variant"
    }
    return ComparisonInput(
        name=run.manifest.run,
        variants=variants,
        facts=codec.to_json(provenance.fingerprint_fields(training_facts(run.manifest.provenance, run.records))),
        fingerprint=run.manifest.fingerprint,
        study=study.name,
        phases=run.manifest.phases,
        control=dict(validity.controls.items()),
        broken=validity.broken,
    )


def machine_differences(base: ComparisonInput, candidate: ComparisonInput) -> list[Difference]:
    """Facts about machine, libraries and workload that must agree but differ; an unknown fact never agrees."""
    if base.absent is not None:
        return []
    if base.facts is None or candidate.facts is None:
        words = ["unknown" if side.facts is None else "known" for side in (base, candidate)]
        return [Difference(field="fingerprint", base=words[0], candidate=words[1])]
    return find_differences(codec.to_json(base.facts), codec.to_json(candidate.facts))


def variant_differences(name: str, base: ComparisonInput, candidate: ComparisonInput) -> list[Difference]:
    """Changes of a variant that kept its name."""
    old, new = base.variants.get(name), candidate.variants.get(name)
    if old is None or new is None or old.id == new.id or None in (old.id, new.id):
        return []
    if old.variant is None or new.variant is None or old.variant == new.variant:
        return [Difference(field=f"variant {name}", base=old.id, candidate=new.id)]
    return [
        Difference(
            field=f"variant {name}: {key}",
            base=codec.to_json(old.variant.setting(key)),
            candidate=codec.to_json(new.variant.setting(key)),
        )
        for key in new.variant.differences(old.variant)
    ]


def session_differences(base: ComparisonInput, study: Study, facts: Mapping[str, Any]) -> list[Difference]:
    """The differences between a base and a session that will measure a study; `facts` are those that must agree."""
    variants = {one.name: Measurements(name=one.name, id=one.id, variant=one) for one in study.variants}
    session = ComparisonInput(name="this session", facts=facts, variants=variants)
    found = machine_differences(base, session)
    for name in variants:
        found += variant_differences(name, base, session)
    return found


def find_differences(base: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Fields of two tables that differ, by dotted name; a missing field is None."""
    found: list[Difference] = []
    for key in dict.fromkeys((*base, *candidate)):
        old, new = base.get(key), candidate.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += find_differences(old, new, f"{prefix}{key}.")
        elif old != new or (key in base) != (key in candidate):
            found.append(Difference(field=f"{prefix}{key}", base=old, candidate=new))
    return found


def describe_differences(found: Sequence[Difference], *, force: bool = True) -> str:
    """The reason of the verdict `not_comparable`; `force`: whether to mention that option."""
    remedy = "Measure the base again under the same conditions" + (", or see a ratio with --force" if force else "")
    return f"{'; '.join(map(str, found))}. {remedy}"


MAX_REASONS = 3
"""Maximum reasons of invalid verdicts that are listed."""

PRECEDENCE = (
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    EXIT_INVALID,
    EXIT_REGRESSION,
    EXIT_NOT_COMPARABLE,
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
)
"""If several exit codes apply, the first of these wins."""

EXIT_OF: dict[Verdict, int] = {
    "improved": EXIT_PASS,
    "equivalent": EXIT_PASS,
    "regressed": EXIT_REGRESSION,
    "inconclusive": EXIT_INCONCLUSIVE,
    "invalid": EXIT_INVALID,
    "no_baseline": EXIT_NOT_COMPARABLE,
    "not_comparable": EXIT_NOT_COMPARABLE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow(Comparison):
    """One metric of one variant, candidate against base, with the limits by which it was judged."""

    variant: str
    metric: str
    tolerance: float
    margin: float
    interleaving: Interleaving
    """shared-base, lockstep, replicates, or separate: two runs at different times."""
    site: str = ""
    """The site, if sites differ; empty if the site does not matter."""

    @property
    def name(self) -> str:
        """The variant, and the site if there are several."""
        return f"{self.variant} on {self.site}" if self.site else self.variant


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a comparison of two sides."""

    base: str
    """Name of the base: a run id, a file, a revision."""
    candidate: str
    comparisons: tuple[ComparisonRow, ...]
    control: dict[str, Comparison | None] = {}
    """The candidate's reference compared with itself, by phase; empty if no control is known."""
    differing: tuple[Difference, ...] = ()
    notices: tuple[Notice, ...] = ()
    losses: dict[str, LossAgreement] = {}
    """Whether the losses of both sides agree, by variant; empty if this was not tested."""

    @property
    def why_invalid(self) -> str | None:
        """The first few reasons why verdicts do not count; None if all of them count."""
        reasons = dict.fromkeys(one.reason for one in self.comparisons if one.verdict == "invalid")
        return first_few(list(reasons), MAX_REASONS, "; ") if reasons else None


def comparison_row(
    variant: str, metric: str, found: Comparison, interleaving: Interleaving, limits_of: LimitsOf = default_limits
) -> ComparisonRow:
    """The row of a verdict, with its limits."""
    limits = limits_of(variant, metric)
    return ComparisonRow(
        variant=variant,
        metric=metric,
        **dataclasses.asdict(found),
        tolerance=limits.tolerance,
        margin=limits.margin,
        interleaving=interleaving,
    )


def worst_exit_code(codes: Iterable[int]) -> int:
    """The exit code that takes precedence; without a code, nothing was compared."""
    return min(codes, key=PRECEDENCE.index, default=EXIT_NOT_COMPARABLE)


def exit_code(comparisons: Iterable[ComparisonRow], *, inconclusive: int = EXIT_INCONCLUSIVE) -> int:
    """The combined exit code of all verdicts; an empty comparison is "not comparable" and never passes.

    `inconclusive` is the exit code of an inconclusive verdict: a policy may let it pass.
    """
    codes = EXIT_OF | {"inconclusive": inconclusive}
    return worst_exit_code(codes[compared.verdict] for compared in comparisons)


def comparison_document(report: ComparisonReport) -> dict[str, Any]:
    """The report as JSON data in the documented format, without its `schema`."""
    return {"invalid": report.why_invalid, **codec.to_json(report)}


def default_metrics(phases: Collection[str], known: Collection[str]) -> list[str]:
    """The metrics that are judged by default: for each phase the primary metric, and, if known, its peak and those that
    are compared by differences."""
    wanted: list[str] = []
    for phase in PHASES:
        if phase in phases:
            wanted += [PRIMARY[phase], *[kind for kind in PEAKS[phase] if kind in known][:1]]
            wanted += [name for name in known if is_difference_metric(name) and METRICS[name].phase == phase]
    return wanted


def match_patterns(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns, in order."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def check_patterns(kind: str, names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise `UsageError` for a pattern that matches no name; `kind` is what the names are of."""
    for pattern in patterns:
        require(fnmatch.filter(names, pattern), f"{kind} {pattern!r}: {unknown_word_message(pattern, names)}")


def compare(
    base: ComparisonInput,
    candidate: ComparisonInput,
    *,
    metrics: Sequence[str] = (),
    all_metrics: bool = False,
    limits_of: LimitsOf = default_limits,
    force: bool = False,
) -> ComparisonReport:
    """Compare every metric of every variant, candidate against base.

    Args:
        base: the trusted side.
        candidate: the judged side.
        metrics: names or glob patterns of metrics and kinds of memory; empty for the primary metric of each phase that
            both sides have, and the peaks of memory.
        all_metrics: compare all metrics that either side measured, instead.
        limits_of: tolerance and margin by variant and metric.
        force: also compare sides that are not comparable; then nothing is called equivalent.

    Raises:
        UsageError: a metric neither exists nor was measured.
        InvalidRunError: neither side has a variant, because a run was interrupted.
    """
    broken = base.broken or candidate.broken
    if broken and not base.variants and not candidate.variants:
        raise InvalidRunError(f"{broken}. Nothing was measured; measure again.")
    wanted = _choose_metrics(base, candidate, metrics, all_metrics=all_metrics)
    machine = machine_differences(base, candidate)
    differing = list(machine)
    refused: dict[Key, Comparison | None] = {}
    pairs: dict[Key, Pair] = {}
    for name in dict.fromkeys((*base.variants, *candidate.variants)):
        changed = variant_differences(name, base, candidate)
        differing += changed
        unlike = [] if force else [*machine, *changed]
        for metric in _choose_variant_metrics(wanted, base, candidate, name):
            refused[name, metric] = refusal = _refuse(base, candidate, name, metric, unlike)
            if refusal is None:
                pairs[name, metric] = _pair(base, candidate, name, metric)
    found = judge(pairs, limits_of)
    if not machine:  # across machines (--force) a shift is expected
        found |= _shifted(found)
    if force and differing:
        found = without_equality(found, "but the sides are not comparable")
    return ComparisonReport(
        base=base.name,
        candidate=candidate.name,
        comparisons=tuple(
            comparison_row(*key, one or found[key], "separate", limits_of) for key, one in refused.items()
        ),
        control=dict(candidate.control),
        differing=tuple(differing),
        notices=tuple(_notices(base, candidate, wanted, {metric for _, metric in refused})),
    )


def _choose_metrics(
    base: ComparisonInput, candidate: ComparisonInput, patterns: Sequence[str], *, all_metrics: bool
) -> tuple[str, ...]:
    """Names of metrics and kinds of memory, in phase order."""
    variants = (*base.variants.values(), *candidate.variants.values())
    measured = dict.fromkeys(metric for one in variants for metric in one.samples)
    known = tuple(dict.fromkeys([*(name for name in METRICS if name in measured), *measured]))
    if all_metrics:
        return known
    if patterns:
        check_patterns("metric", tuple(dict.fromkeys([*known, *METRICS])), patterns)
        return tuple(match_patterns(known, patterns))
    phases = [phase for phase in candidate.phases if base.absent is not None or phase in base.phases]
    # Metrics of another project's file have no phase.
    foreign = [metric for metric in known if metric not in METRICS and not is_memory(metric)]
    return (*default_metrics(phases, known), *foreign)


def _choose_variant_metrics(
    wanted: Sequence[str], base: ComparisonInput, candidate: ComparisonInput, name: str
) -> list[str]:
    """The wanted metrics that either side measured for a variant; all times if a failure left no measurements."""
    sides = [side for side in (base.variants.get(name), candidate.variants.get(name)) if side is not None]
    found = [metric for metric in wanted if any(side.trials(metric) for side in sides)]
    if found or not any(side.broken or not side.samples for side in sides):
        return found
    return [metric for metric in wanted if not is_memory(metric)] or list(wanted)[:1] or [PRIMARY["train"]]


def _refuse(
    base: ComparisonInput, candidate: ComparisonInput, name: str, metric: str, unlike: Sequence[Difference]
) -> Comparison | None:
    """The verdict if the numbers do not count, are missing, or come from sides that are not comparable; None if they
    can be compared."""
    ours, theirs = (side.variants.get(name, Measurements(name=name)) for side in (base, candidate))
    faults = [why for why in (base.broken, candidate.broken, ours.broken, theirs.broken) if why]
    refusals: tuple[tuple[object, Verdict, str], ...] = (
        (faults, "invalid", "; ".join(faults)),
        (base.absent, "no_baseline", base.absent or ""),
        (name not in candidate.variants, "not_comparable", f"variant {name!r}: it is not in the candidate"),
        (name not in base.variants, "no_baseline", f"variant {name!r}: it is not in the base"),
        (not theirs.trials(metric), "not_comparable", f"the candidate has no {metric} of variant {name!r}"),
        (not ours.trials(metric), "no_baseline", f"the base has no {metric} of variant {name!r}"),
        (unlike, "not_comparable", describe_differences(unlike)),
    )
    found = (Comparison(verdict=verdict, reason=reason) for applies, verdict, reason in refusals if applies)
    return next(found, None)


def _pair(base: ComparisonInput, candidate: ComparisonInput, name: str, metric: str) -> Pair:
    """One metric of one variant as an unpaired pair."""
    sides = base.variants[name], candidate.variants[name]
    notes = dict.fromkeys(side.no_interval for side in sides if side.no_interval)
    base_trials, candidate_trials = (side.trials(metric) for side in sides)
    return Pair(
        metric=metric, base=base_trials, candidate=candidate_trials, note="; ".join(notes),
        untrained=sides[0].untrained.get(metric),
    )  # fmt: skip


def _shifted(found: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """Mark all times as invalid if nearly all of them shifted by the same factor, which is an effect of the machine.

    Returns {} otherwise.

    One ratio of each variant and phase is used, since metrics that derive from each other would count a shift twice.
    """
    log_ratios = {
        f"{name}, {metric}": math.log(comparison.ratio)
        for (name, metric), comparison in found.items()
        if metric in PRIMARY.values() and comparison.ratio is not None
    }
    reason = run_wide_shift(log_ratios)
    return {
        key: dataclasses.replace(comparison, verdict="invalid", reason=reason)
        for key, comparison in found.items()
        if reason and not is_memory(key[1]) and comparison.verdict != "invalid"
    }


def _notices(
    base: ComparisonInput, candidate: ComparisonInput, wanted: Sequence[str], compared: Collection[str]
) -> Iterator[Notice]:
    for one, other in ((base, candidate), (candidate, base)):
        missing = [phase for phase in one.phases if phase not in other.phases]
        if missing and base.absent is None:
            yield Notice(
                code="phase-only-on-one-side",
                message=f"only {one.name} measured {', '.join(missing)}; that is not compared.",
                remedy="Measure the same phases on both sides.",
            )
    unmeasured = [metric for metric in wanted if metric not in compared]
    if unmeasured or not compared:
        yield Notice(
            code="nothing-compared",
            message=f"neither side measured {', '.join(unmeasured) or 'any requested metric'}.",
            remedy="--all-metrics lists the recorded metrics.",
        )
