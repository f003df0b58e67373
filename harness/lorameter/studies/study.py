"""A study: a named set of variants, their common settings, the protocol of the measurement, and the claims.

`lorameter.studies.study_file` reads it from TOML. A study of commands can also be made of one command line.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from lorameter.errors import UsageError, require, suggest
from lorameter.measurements.metrics import Measure, Phase, common_measures, phases_of
from lorameter.records import codec
from lorameter.records.record import Line
from lorameter.studies import protocol
from lorameter.studies.claim import ENGINE, LINEAR, UNSET, Claim, Engine, Level, format_level, is_number
from lorameter.studies.form import AnyVariant, Support
from lorameter.studies.protocol import (
    EFFORT_REPLICATES,
    JUDGED_REPLICATES,
    LIMITED_REPLICATES,
    PRECISION_REPLICATES,
    Protocol,
)
from lorameter.studies.script import check_own_workload
from lorameter.studies.variant import DType, Variant
from lorameter.studies.workload import OF_TOKENS, OF_VARIANTS, Workload

WORKLOAD_PREFIX = "workload."
"""Prefix of an axis that is a field of the workload: `workload.batch_size`."""
RESERVED = ("-control", "-isolated")
"""Suffixes that distinguish the trials of one variant in a run; trials of the same name would overwrite each other."""


def is_of_tokens(axis: str) -> bool:
    """Whether the levels of this axis have losses over different tokens."""
    return axis.startswith(WORKLOAD_PREFIX) and axis.removeprefix(WORKLOAD_PREFIX) in OF_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a study takes from the machine that measures it."""

    kind: str
    """"cpu", or the name of the GPU, which selects the profile."""
    dtype: DType
    """The dtype in place of "auto"."""
    why: str
    """The reason for the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Variants that are measured on one workload under one protocol."""

    name: str
    title: Line
    workload: Workload
    protocol: Protocol
    variants: tuple[AnyVariant, ...]
    reference: str
    allow_fallback: bool = False
    requirements: dict[str, Any] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    """Further facts for readers of the results."""
    profile: str = ""
    """Name of the profile that adapted the study to a machine."""
    needs: Literal["", "cuda"] = ""
    """The device that the profile needs."""
    replaced: dict[str, Any] = field(default_factory=dict)
    """Original values of the study that a profile or an option has replaced, by field: `workload.batch_size`."""
    engine: Engine | None = None
    """The engine whose claims it tests, if any."""
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of the workload for which variants have their own value, by variant name."""
    dtype: str = ""
    """The dtype that stands for "auto" on this machine, with the reason; empty if no variant leaves it open."""

    def __post_init__(self) -> None:
        protocol.check_name("study", self.name)
        where, names = f"study {self.name}", [variant.name for variant in self.variants]
        require(
            len(names) <= protocol.MAX_VARIANTS,
            f"{where}: {len(names)} variants. Use {protocol.MAX_VARIANTS} or fewer.",
        )
        require(names, f"{where}: no variants. Add [axes] or [[variant]].")
        for name in names:
            require(
                not name.endswith(RESERVED),
                f"{where}: variant name {name!r}: -control is reserved for the A/A control, and -isolated for isolated "
                "trials. Choose another ending.",
            )
            protocol.check_name(f"{where}: variant name", name, " /\\[]:")
            require(names.count(name) == 1, f"{where}: variant name {name!r} is used twice. Rename one.")
        require_known(f"{where}: reference = {self.reference!r}", self.reference, names)
        for key in self.replaced:
            self._value_of_field(key)
        for variant in self.variants:
            require(
                variant.executor == self.form.executor,
                f"{where}: variant {variant.name!r} is {variant.form}, and others are {self.form.form}, which runs in "
                "other processes: they have no common step. Write a separate study for it.",
            )
        if not self.supports("workload"):
            check_own_workload(self)
        if self.engine is not None:
            engine = f"{where}, [engine]: variant = {self.engine.variant!r}"
            require_known(engine, self.engine.variant, names)
            require(self.engine.variant != self.reference, f"{engine}: the reference. Name the one with the engine.")
        self._check_workloads(names)
        self._check_claims()

    @property
    def claims_peaks(self) -> bool:
        """Whether a claim is about peak memory."""
        return any(part.of_memory for claim in self.claims for part in claim.parts)

    @property
    def form(self) -> type[AnyVariant]:
        """The form of its first variant, whose executor all have."""
        return type(self.variants[0])

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What can be measured of every variant."""
        return common_measures([one.measures for one in self.variants], ranks=self.workload.ranks)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in which every variant can be measured."""
        return phases_of(self.measures)

    def supports(self, what: Support) -> bool:
        """Whether every variant supports this."""
        return all(what in variant.supports for variant in self.variants)

    @property
    def built(self) -> tuple[Variant, ...]:
        """The variants that lorameter builds."""
        return tuple(variant for variant in self.variants if isinstance(variant, Variant))

    @property
    def own_workloads(self) -> dict[str, Workload]:
        """Workloads of variants that do not use the study's, by name."""
        common, where = codec.to_json(self.workload), f"study {self.name}, workload of"
        return {
            name: codec.from_json(Workload, {**common, **fields}, f"{where} {name!r}", strict=True)
            for name, fields in self.workloads.items()
        }

    def obstacle(self, device: str) -> str:
        """Why nothing can be measured on a device ("cpu" or "cuda"); empty if it can."""
        what = f"profile {self.profile!r}" if self.needs else self.engine.title if self.engine else ""
        if device == "cuda" or not (self.needs or (self.engine and self.engine.needs)):
            return ""
        return f"{what} runs on a GPU only and this machine measures on the CPU; measure it on a machine with one"

    def check_distinct(self) -> None:
        """Raise `UsageError` if two variants are the same configuration on the same workload."""
        own = self.own_workloads
        by_content = dict[tuple[str, Workload], str]()
        for variant in self.variants:
            content = (variant.id, own.get(variant.name, self.workload))
            same = by_content.setdefault(content, variant.name)
            require(
                same == variant.name,
                f"study {self.name}: variants {same!r} and {variant.name!r} are the same configuration. Remove one; "
                "the harness adds an A/A control by itself.",
            )

    def _check_workloads(self, names: Sequence[str]) -> None:
        for name, fields in self.workloads.items():
            where = f"study {self.name}, workload of {name!r}"
            require_known(where, name, names)
            require(
                name != self.reference,
                f"{where}: it is the reference, whose workload is the study's. Write its values in [workload], or name "
                "another reference.",
            )
            require(
                self.supports("workload") and self.workload.ranks == 1,
                f"{where}: commands and variants of several ranks cannot have their own workload. Remove it.",
            )
            for key in fields:
                require_known(f"{where}: {key}: equal for all variants, or", key, OF_VARIANTS)
        self.own_workloads  # noqa: B018 # raises for an invalid workload

    def _check_claims(self) -> None:
        ids = Counter(claim.id for claim in self.claims)
        levels = {
            axis: self.levels(axis) for axis in dict.fromkeys(axis for claim in self.claims for axis in claim.axes)
        }
        for claim in self.claims:
            where = f"study {self.name}, claim {claim.id!r}"
            require(ids[claim.id] == 1, f"{where}: the id is used twice. Rename one.")
            for axis in claim.axes:
                require(
                    axis != ENGINE or self.engine is not None,
                    f"{where}: axis = {axis!r}: the study names no engine. Add [engine].",
                )
                require(
                    len(levels[axis]) > 1,
                    f"{where}: axis = {axis!r}: fewer than two variants differ from {self.reference!r} in this alone. "
                    "Name a field of the variants that the study sweeps.",
                )
            for part in claim.parts:
                known = [level for level, _ in levels[part.axis]]
                numbers = [float(level) for level in known if is_number(level)]
                require(
                    part.rule not in LINEAR or part.rule == "equal" or len(numbers) == len(known),
                    f"{where}: axis = {part.axis!r}: its levels are not numbers, and {part.rule!r} fits a line through "
                    'them. Use "differs", "equal", "highest", "lowest", "lowers" or "costs-at-most".',
                )
                least = min(numbers, default=1.0)
                require(
                    part.rule not in LINEAR or part.scale != "log" or least > 0,
                    f'{where}: axis = {part.axis!r}: level {least:g} has no logarithm. Write scale = "linear".',
                )
                for level in part.levels:
                    require(
                        level in known,
                        f"{where}: level {format_level(level)} of {part.axis}: not in the study. It has "
                        f"{', '.join(map(format_level, known))}.",
                    )

    def levels(self, axis: str) -> tuple[tuple[Level, str], ...]:
        """The values of one field of the variants (or of their workload, as `workload.batch_size`), each with the
        variant that has this value and otherwise equals the reference. Numbers are ascending, other values in study
        order with the reference's first; the engine has the values 0 and 1."""
        if axis == ENGINE:
            return () if self.engine is None else ((0.0, self.reference), (1.0, self.engine.variant))
        centre, own = self.variant(self.reference), self.own_workloads
        of_workload, name = axis.startswith(WORKLOAD_PREFIX), axis.removeprefix(WORKLOAD_PREFIX)
        if name not in (
            {one.name for one in dataclasses.fields(Workload)} if of_workload else {"method", *centre.settings}
        ):
            return ()

        def value_of(variant: AnyVariant) -> Any:
            if of_workload:
                return getattr(own.get(variant.name, self.workload), name)
            return variant.setting(name)

        found = [
            (_level(value_of(variant)), variant.name)
            for variant in (centre, *(variant for variant in self.variants if variant is not centre))
            if set(self._differences(variant, own)) <= {axis}
        ]
        return tuple(sorted(found)) if all(is_number(level) for level, _ in found) else tuple(found)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes in which variants differ from the reference, in the order of their first occurrence."""
        own = self.own_workloads
        return tuple(dict.fromkeys(axis for variant in self.variants for axis in self._differences(variant, own)))

    def _differences(self, variant: AnyVariant, workloads: Mapping[str, Workload]) -> tuple[str, ...]:
        """The fields in which a variant, or its workload, differs from the reference."""
        own = workloads.get(variant.name, self.workload)
        others = (
            f"{WORKLOAD_PREFIX}{one.name}"
            for one in dataclasses.fields(own)
            if getattr(own, one.name) != getattr(self.workload, one.name)
        )
        return (*variant.differences(self.variant(self.reference)), *others)

    @property
    def headline(self) -> str:
        """The title, with the measured model where a profile or an option has replaced that of the study."""
        model = self.workload.model
        return self.title if self.replaced.get("workload.model", model) == model else f"{self.title}, on {model}"

    @property
    def deviations(self) -> tuple[str, ...]:
        """The differences from the original study, one line each."""
        current = {key: self._value_of_field(key) for key in self.replaced}
        return tuple(
            f"{key} = {_format_value(current[key])} in place of {_format_value(original)}"
            for key, original in self.replaced.items()
            if current[key] != original
        )

    def _value_of_field(self, key: str) -> Any:
        """The value of a field that is given with its part of the study, as in `workload.batch_size`. Raises
        `UsageError` if there is no such field."""
        section, _, name = key.partition(".")
        owners: dict[str, Any] = {
            "workload": self.workload,
            "protocol": self.protocol,
            "controls": self.variant(self.reference),
        }
        fields = [one.name for one in dataclasses.fields(owners[section])] if section in owners else []
        require(name in fields, f"study {self.name}: replaced = {key!r}: not a field of the study. Remove it.")
        return getattr(owners[section], name)

    def variant(self, name: str) -> AnyVariant:
        """The variant with that name. Raises `UsageError` with the nearest names if there is none."""
        variants = {variant.name: variant for variant in self.variants}
        require_known(f"study {self.name}: variant {name!r}", name, list(variants))
        return variants[name]

    def fit(self, target: Target) -> Study:
        """The same study with the machine's dtype where a variant leaves it open."""
        if not any("auto" in variant.dtypes for variant in self.built):
            return self
        variants = tuple(one.with_dtype(target.dtype) if isinstance(one, Variant) else one for one in self.variants)
        return dataclasses.replace(self, variants=variants, dtype=f"{target.dtype}: {target.why}")

    def with_protocol(self, **changes: Any) -> Study:
        """The same study with other values of its protocol."""
        return dataclasses.replace(self, protocol=dataclasses.replace(self.protocol, **changes))

    def with_overrides(
        self,
        *,
        model: str | None = None,
        data: str | None = None,
        effort: str | None = None,
        replicates: int | None = None,
        precision: float | None = None,
        until_decided: bool | None = None,
        max_minutes: float | None = None,
        allow_disturbed: bool = False,
        on: str | None = None,
        sites: str | None = None,
        mixed: bool = False,
    ) -> Study:
        """The same study on another model or data, with another effort, other limits or another place; None leaves a
        value unchanged.

        The study's own time limit is for the study as it is: another model, and a number of replicates, an effort or a
        precision, lift it. With a precision, a time limit or `until_decided`, and no number of replicates, the maximum
        of the replicates is raised, so that the goal can be reached or the time be used. `sites` are names with commas
        between them; they and `mixed` belong to one value of `on`, so another `on` clears those of the study.
        """
        workload, replaced = self.workload, dict(self.replaced)
        for key, value in (("model", model), ("data", data)):
            if value is not None:
                replaced.setdefault(f"workload.{key}", getattr(workload, key))
                workload = dataclasses.replace(workload, **{key: value})  # type: ignore[arg-type]
        protocol = self.protocol if on is None else dataclasses.replace(self.protocol, on=on, sites=(), mixed=False)
        changed = any(one is not None for one in (model, effort, replicates, precision))
        if replicates is not None:
            cap = replicates
        elif effort is not None:
            cap = EFFORT_REPLICATES[effort]
        elif precision is not None:
            cap = PRECISION_REPLICATES
        elif until_decided:
            cap = JUDGED_REPLICATES
        else:
            cap = protocol.replicates if max_minutes is None else max(protocol.replicates, LIMITED_REPLICATES)
        protocol = dataclasses.replace(
            protocol,
            replicates=cap,
            precision=protocol.precision if precision is None else precision,
            until_decided=protocol.until_decided and precision is None if until_decided is None else until_decided,
            max_minutes=max_minutes or (None if changed else protocol.max_minutes),
            allow_disturbed=protocol.allow_disturbed or allow_disturbed,
            sites=protocol.sites if sites is None else tuple(part.strip() for part in sites.split(",")),
            mixed=protocol.mixed or mixed,
        )
        return dataclasses.replace(self, workload=workload, protocol=protocol, replaced=replaced)


def _level(value: Any) -> Level:
    """A field's value as a level of its axis."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if value is None:
        return UNSET
    words = [f"{key}={item}" for key, item in value.items()] if isinstance(value, Mapping) else map(str, value)
    return "+".join(words)


def _format_value(value: Any) -> str:
    """A value as text; for a file its name, since its folder is specific to one machine."""
    return repr(PurePath(value).name) if isinstance(value, str) and PurePath(value).is_absolute() else repr(value)


def require_known(where: str, name: str, known: Sequence[str]) -> None:
    """Raise `UsageError`, with the nearest known name, for an unknown name."""
    if name not in known:
        raise UsageError(f"{where}: {unknown_word_message(name, known)}")


def unknown_word_message(word: str, known: Sequence[str]) -> str:
    """The message about an unknown word, with the nearest known one."""
    return f"not known. {suggest(word, known)}"
