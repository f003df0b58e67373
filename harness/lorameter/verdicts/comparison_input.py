"""Reads one side of a comparison from a run: the trials of each variant and metric, and why numbers do not count.

A comparison never reads a run or a file itself. This module holds the data of a side, with the facts that must agree
before any ratio is computed, so that run directories and saved benchmark files are judged by the same rules.

Another GPU, another torch or another batch size changes a step time by more than most effects of interest, so a ratio
across them is meaningless. A refusal names each field that differs, with both values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lorameter.errors import require
from lorameter.machine import provenance
from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.studies.variant import AnyVariant
from lorameter.verdicts.same_training import facts_of
from lorameter.verdicts.series import Trials, group_trials
from lorameter.verdicts.sites import refuse_mixed
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
    broken: str | None = None
    """Why no number of this variant counts."""
    no_interval: str | None = None
    """Why these samples give only a ratio."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The measured metrics and kinds of memory."""
        return tuple(self.samples)

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
    whose sites differ."""
    require(
        not run.manifest.sides,
        f"run {run.manifest.run}: an A/B run holds both of its sides and its own comparison. Read it with "
        f"`lorameter report {run.manifest.run}`.",
    )
    refuse_mixed(run, "a side of a comparison")
    study, groups = read_study(run), group_trials(run.records)
    validity = run_validity(run, study)
    known = {variant.name: variant for variant in study.variants}
    variants = {
        name: Measurements(
            name=name,
            id=series.records[0].variant,
            variant=known.get(name),
            samples={metric: series.trials(metric) for metric in series.metrics},
            broken=validity.broken_variant(name),
        )
        for (name, role), series in groups.items()
        if role == "variant"
    }
    return ComparisonInput(
        name=run.manifest.run,
        variants=variants,
        facts=codec.to_json(provenance.fingerprint_fields(facts_of(run.manifest.provenance, run.records))),
        fingerprint=run.manifest.fingerprint,
        study=study.name,
        phases=run.manifest.phases,
        control=dict(validity.controls.items()),
        broken=validity.broken,
    )


def planned_side(study: Study, facts: Mapping[str, Any]) -> ComparisonInput:
    """The variants that a session will measure, as a side without samples."""
    variants = {one.name: Measurements(name=one.name, id=one.id, variant=one) for one in study.variants}
    return ComparisonInput(name="this session", facts=facts, variants=variants)


def machine_differences(base: ComparisonInput, candidate: ComparisonInput) -> list[Difference]:
    """Facts about machine, libraries and workload that must agree but differ; an unknown fact never agrees."""
    if base.absent is not None:
        return []
    ours, theirs = base.facts, candidate.facts
    if ours is None or theirs is None:
        words = ["unknown" if facts is None else "known" for facts in (ours, theirs)]
        return [Difference(field="fingerprint", base=words[0], candidate=words[1])]
    return differences(codec.to_json(ours), codec.to_json(theirs))


def variant_differences(name: str, base: ComparisonInput, candidate: ComparisonInput) -> list[Difference]:
    """Changes of a variant that kept its name."""
    ours, theirs = base.variants.get(name), candidate.variants.get(name)
    if ours is None or theirs is None or ours.id == theirs.id or None in (ours.id, theirs.id):
        return []
    if ours.variant is None or theirs.variant is None or ours.variant == theirs.variant:
        return [Difference(field=f"variant {name}", base=ours.id, candidate=theirs.id)]
    return [
        Difference(
            field=f"variant {name}: {key}",
            base=codec.to_json(ours.variant.setting(key)),
            candidate=codec.to_json(theirs.variant.setting(key)),
        )
        for key in theirs.variant.differences(ours.variant)
    ]


def differences(base: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Fields of two tables that differ, by dotted name; a missing field is None."""
    found: list[Difference] = []
    for key in dict.fromkeys((*base, *candidate)):
        ours, theirs = base.get(key), candidate.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs or (key in base) != (key in candidate):
            found.append(Difference(field=f"{prefix}{key}", base=ours, candidate=theirs))
    return found


def disagreement(found: Sequence[Difference], *, force: bool = True) -> str:
    """The reason of the verdict `not_comparable`; `force`: whether to mention that option."""
    remedy = "Measure the base again under the same conditions" + (", or see a ratio with --force" if force else "")
    return f"{'; '.join(map(str, found))}. {remedy}"
