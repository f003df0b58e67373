"""A study: a named set of variants, what is held constant, and how it is measured. Read from TOML.

title = "..."
reference = "lora-r16"          # the variant that ratios are taken against; the first one if left out

[workload]                      # fields of Workload
[protocol]                      # fields of Protocol
[controls]                      # fields of Variant, equal for all
[axes]                          # field = [values]: every combination is a variant
[[variant]]                     # or variants one by one: name and what differs from the controls
[requirements]                  # paths of kernels_check that the study demands beside what the variants imply
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from harness import codec
from harness.errors import UsageError, impossible
from harness.protocol import PRECISION_REPLICATES, Protocol
from harness.variant import Variant
from harness.workload import Workload

_KEYS = ("title", "reference", "allow_fallback", "requirements", "workload", "protocol", "controls", "axes", "variant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Variants that meet on one workload under one protocol."""

    name: str
    title: str
    workload: Workload
    protocol: Protocol
    variants: tuple[Variant, ...]
    reference: str
    allow_fallback: bool = False
    requirements: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names:
            raise UsageError(f"study {self.name}: no variants. Add [axes] or [[variant]].")
        for name in names:
            if name.endswith("-control"):
                raise UsageError(
                    f"study {self.name}: variant name {name!r}: the A/A control is named so. Choose another."
                )
            if not name or any(character in name for character in " /\\[]:"):
                raise UsageError(
                    f"study {self.name}: variant name {name!r}: a name is part of test ids and file names. "
                    "Use letters, digits, '-', '_', '.', '='."
                )
        doubles = {name for name in names if names.count(name) > 1}
        if doubles:
            raise UsageError(f"study {self.name}: variant name {min(doubles)!r} is used twice. Rename one.")
        by_id: dict[str, str] = {}
        for variant in self.variants:
            if variant.id in by_id:
                raise UsageError(
                    f"study {self.name}: variants {by_id[variant.id]!r} and {variant.name!r} are the same "
                    "configuration. Remove one; the harness adds an A/A control by itself."
                )
            by_id[variant.id] = variant.name
        if self.reference not in names:
            raise UsageError(f"study {self.name}: reference = {self.reference!r}: {_unknown(self.reference, names)}")

    def variant(self, name: str) -> Variant:
        """The variant of that name; `UsageError` with the nearest names otherwise."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = [variant.name for variant in self.variants]
        raise UsageError(f"study {self.name}: variant {name!r}: {_unknown(name, names)}")

    def with_overrides(
        self,
        *,
        model: str | None = None,
        data: str | None = None,
        effort: str | None = None,
        replicates: int | None = None,
        precision: float | None = None,
        max_minutes: float | None = None,
    ) -> Study:
        """The same study on another model or data, at another effort or with limits; what is None stays.

        With a precision and no number of replicates their cap is raised, so that the precision can be reached.
        """
        workload, protocol = self.workload, self.protocol
        if model is not None:
            workload = dataclasses.replace(workload, model=model)
        if data is not None:
            workload = dataclasses.replace(workload, data=data)
        if effort is not None:
            protocol = protocol.with_effort(effort)
        if precision is not None:
            cap = protocol.replicates if effort is not None else PRECISION_REPLICATES
            protocol = dataclasses.replace(protocol, precision=precision, replicates=cap)
        if replicates is not None:
            protocol = dataclasses.replace(protocol, replicates=replicates)
        if max_minutes is not None:
            protocol = dataclasses.replace(protocol, max_minutes=max_minutes)
        return dataclasses.replace(self, workload=workload, protocol=protocol)


def builtin_studies() -> dict[str, Path]:
    """Names and files of the studies that ship with the package."""
    folder = Path(str(resources.files("harness") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_study(name_or_path: str) -> Study:
    """A built-in study by name, or any TOML file.

    Raises:
        UsageError: no such study, not TOML, or anything in it that cannot be: file, key, value and remedy are named.
    """
    known = builtin_studies()
    path = known.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise UsageError(
            f"study {name_or_path!r}: {_unknown(name_or_path, list(known))} A path to a .toml file works too."
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name}: not a TOML file: {error}. Mend the line named.") from None
    return _parse(path.stem, path.name, data)


def _parse(name: str, where: str, data: Mapping[str, Any]) -> Study:
    for key in data:
        if key not in _KEYS:
            raise impossible(where, key, data[key], "unknown key", _unknown(key, list(_KEYS)))
    variants = _variants(where, data)
    reference = data.get("reference", variants[0].name if variants else "")
    fields: dict[str, Any] = {"title": data.get("title", name), "reference": reference}
    for key, kind in (("title", str), ("reference", str), ("allow_fallback", bool), ("requirements", dict)):
        if key in data:
            if not isinstance(data[key], kind):
                raise impossible(where, key, data[key], f"{kind.__name__} is expected", "Mend the value.")
            fields[key] = data[key]
    try:
        return Study(
            name=name,
            workload=codec.from_json(Workload, data.get("workload", {}), f"{where}, [workload]"),
            protocol=codec.from_json(Protocol, data.get("protocol", {}), f"{where}, [protocol]"),
            variants=variants,
            **fields,
        )
    except UsageError as error:
        raise error if str(error).startswith(where) else UsageError(f"{where}: {error}") from None


def _variants(where: str, data: Mapping[str, Any]) -> tuple[Variant, ...]:
    controls, axes, listed = data.get("controls", {}), data.get("axes", {}), data.get("variant", [])
    if axes and listed:
        raise UsageError(f"{where}: both [axes] and [[variant]] are given. Keep one.")
    if not isinstance(listed, list):
        raise impossible(where, "variant", listed, "a list of tables is expected", "Write [[variant]].")
    for table, content in (("controls", controls), ("axes", axes)):
        if not isinstance(content, Mapping):
            raise impossible(where, table, content, "a table is expected", f"Write [{table}].")
    rows = listed
    if axes:
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise impossible(
                    f"{where}, [axes]", key, values, "a list of values is expected", "Write it as [ ... ]."
                )
        rows = [
            {"name": "-".join(f"{key}={_label(value)}" for key, value in zip(axes, values, strict=True))}
            | dict(zip(axes, values, strict=True))
            for values in itertools.product(*axes.values())
        ]
    variants = []
    for index, row in enumerate(rows):
        label = row.get("name", f"number {index + 1}") if isinstance(row, Mapping) else f"number {index + 1}"
        place = f"{where}, variant {label!r}"
        if not isinstance(row, Mapping) or not isinstance(row.get("name", ""), str) or not row.get("name"):
            raise UsageError(f'{place}: name is missing. Add name = "...".')
        variants.append(codec.from_json(Variant, {**controls, **row}, place))
    return tuple(variants)


def _label(value: Any) -> str:
    """A value as part of a name: the items of a list joined."""
    return "+".join(map(str, value)) or "default" if isinstance(value, list) else str(value)


def _unknown(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"not known. Did you mean {near[0]!r}?" if near else f"not known. Known: {', '.join(known)}."
