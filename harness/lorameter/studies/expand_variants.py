"""The rows of a study file: each variant's name and what it differs in from the controls, as listed or combined.

`[axes]` combine every value with every other, `[sweeps]` change one field at a time. A field of the workload is written
`workload.FIELD`, and is part of what the variant is measured on. `[workload]` itself may list values of what a request
is: every row is then there once for each of them, and keeps its name for the first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorameter.errors import UsageError, impossible
from lorameter.records import codec
from lorameter.studies import limits
from lorameter.studies.keys import check_axes, check_keys
from lorameter.studies.peft_experiments import read_config
from lorameter.studies.study import OF_WORKLOAD
from lorameter.studies.variant import AnyVariant, FullVariant, PeftVariant, ScriptVariant, form_keys
from lorameter.studies.workload import LISTED, OF_VARIANTS, Workload

Lists = Mapping[str, Sequence[Any]]
"""Values that [workload] lists of a field, by the name of their axis."""


def _flat(table: Any) -> Any:
    """A table in which `workload.batch_size` is a key, as it is the name of an axis."""
    if not isinstance(table, Mapping) or not isinstance(own := table.get("workload"), Mapping):
        return table
    return {key: value for key, value in table.items() if key != "workload"} | {
        f"{OF_WORKLOAD}{key}": value for key, value in own.items()
    }


def rows_of(where: str, data: Mapping[str, Any]) -> list[Any]:
    """What each variant differs in from the controls, and its name."""
    controls, axes, listed = data.get("controls", {}), _flat(data.get("axes", {})), data.get("variant", [])
    sweeps = _flat(data.get("sweeps", {}))
    given = [name for name, value in (("[axes]", axes), ("[sweeps]", sweeps), ("[[variant]]", listed)) if value]
    if len(given) > 1:
        raise UsageError(f"{where}: both {' and '.join(given)} are given. Keep one.")
    if not isinstance(listed, list):
        raise impossible(where, "variant", listed, "a list of tables is expected", "Write [[variant]].")
    for table, content in (("controls", controls), ("axes", axes), ("sweeps", sweeps)):
        if not isinstance(content, Mapping):
            raise impossible(where, table, content, "a table is expected", f"Write [{table}].")
    check_keys(f"{where}, [controls]", "controls", controls)
    for table, content in (("axes", axes), ("sweeps", sweeps)):
        check_axes(f"{where}, [{table}]", content)
        for key, values in content.items():
            if not isinstance(values, list) or not values:
                raise impossible(
                    f"{where}, [{table}]", key, values, "a list of values is expected", "Write it as [ ... ]."
                )
    if sweeps:
        common = data.get("workload", {})
        defaults = _written(Workload()) | (dict(common) if isinstance(common, Mapping) else {})
        held = {**controls, **{f"{OF_WORKLOAD}{key}": value for key, value in defaults.items()}}
        return _swept(where, held, sweeps, str(data.get("reference", "centre")))
    if math.prod(map(len, axes.values())) > limits.MOST_VARIANTS:
        raise UsageError(
            f"{where}, [axes]: {math.prod(map(len, axes.values()))} combinations. "
            f"Use {limits.MOST_VARIANTS} variants or fewer."
        )
    if axes:
        return [{"name": _name(own)} | own for own in _combined(axes)]
    return [_flat(row) for row in listed]


def split_lists(where: str, data: Mapping[str, Any]) -> tuple[dict[str, Any], Lists]:
    """A study file with the first of the values that `[workload]` lists of a field in their place, and these lists.

    Raises:
        UsageError: a list of a field that takes one value, an impossible one, or a profile that has another.
    """
    workload = data.get("workload", {})
    if not isinstance(workload, Mapping):  # which its reader refuses
        return dict(data), {}
    place, listed = f"{where}, [workload]", ", ".join(LISTED)
    known = {one.name for one in dataclasses.fields(Workload)}  # any other key its reader refuses
    lists = {key: value for key, value in workload.items() if key in known and isinstance(value, list)}
    for key, values in lists.items():
        if key not in LISTED:
            remedy = f"Write workload.{key} = [ ... ] in [axes]" if key in OF_VARIANTS else "Write one of them"
            why = "one value is expected" if key in OF_VARIANTS else "one value is expected, equal for all variants"
            raise impossible(place, key, values, why, f"{remedy}: lists in [workload] are those of {listed}.")
        if not values:
            raise impossible(place, key, values, "no value in it", "Write one, or a list of several.")
        if len(values) > limits.MOST_VARIANTS:
            remedy = f"Use {limits.MOST_VARIANTS} or fewer."
            raise impossible(place, key, values, f"{len(values)} values, and each is a variant", remedy)
        for value in values:
            codec.from_json(Workload, {key: value}, place, strict=True)
        if len(set(values)) < len(values):
            twice = max(values, key=values.count)
            raise impossible(place, key, values, f"{twice} is listed twice", "Take one of them out.")
    _check_profiles(where, data.get("profile"), lists)
    first = {key: values[0] for key, values in lists.items()}
    axes = {f"{OF_WORKLOAD}{key}": lists[key] for key in lists}
    return {**data, "workload": {**workload, **first}}, axes


def _check_profiles(where: str, profiles: Any, lists: Mapping[str, Any]) -> None:
    """A profile changes no variants, and a list makes some."""
    for name, table in profiles.items() if isinstance(profiles, Mapping) else ():
        workload = table.get("workload") if isinstance(table, Mapping) else None
        if not isinstance(workload, Mapping):
            continue
        for key in LISTED:
            value = workload.get(key)
            if isinstance(value, list) or (key in workload and key in lists):
                raise impossible(
                    f"{where}, [profile.{name}]", f"workload.{key}", value,
                    "listed values are variants, and a profile has those of its study",
                    f"Write {'one value' if isinstance(value, list) else f'{key} in one of the two places'}.",
                )  # fmt: skip


def spread(where: str, rows: Sequence[Any], lists: Lists) -> list[Any]:
    """Every row once for each combination of listed values, under its own name for the first values and with what
    differs from them behind it else; the combinations themselves where there are no rows."""
    if not lists:
        return list(rows)
    count = max(1, len(rows)) * math.prod(map(len, lists.values()))
    if count > limits.MOST_VARIANTS:
        raise UsageError(
            f"{where}, [workload]: {' and '.join(lists)} make {count} variants. Use {limits.MOST_VARIANTS} or fewer."
        )
    if not rows:
        return [{"name": _name(own)} | own for own in _combined(lists)]
    found: list[Any] = []
    for row in rows:
        if not isinstance(row, Mapping):  # which its reader refuses
            return list(rows)
        for axis in lists:
            if axis in row:
                raise UsageError(
                    f"{where}, variant {row.get('name')!r}: {axis}: [workload] lists its values, for every variant. "
                    "Keep one of the two."
                )
        for own in _combined(lists):
            other = {axis: value for axis, value in own.items() if value != lists[axis][0]}
            named = {"name": f"{row['name']}-{_name(other)}"} if other and row.get("name") else {}
            found.append({**row, **named, **other})
    return found


def _combined(axes: Lists) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _name(own: Mapping[str, Any]) -> str:
    """What a variant is called by its place on the axes."""
    return "-".join(f"{axis}={_label(value)}" for axis, value in own.items())


def _written(workload: Workload) -> dict[str, Any]:
    """All fields of a workload, also those that no record holds while they have their default."""
    return {one.name: codec.to_json(getattr(workload, one.name)) for one in dataclasses.fields(workload)}


def variants_of(where: str, data: Mapping[str, Any], rows: Sequence[Any]) -> tuple[AnyVariant, ...]:
    """The controls with what each row changes. Raises `UsageError` for a row without a name, or an impossible value."""
    variants = []
    for index, row in enumerate(rows):
        label = row.get("name", f"number {index + 1}") if isinstance(row, Mapping) else f"number {index + 1}"
        place = f"{where}, variant {label!r}"
        if not isinstance(row, Mapping) or not isinstance(row.get("name", ""), str) or not row.get("name"):
            raise UsageError(f'{place}: name is missing. Add name = "...".')
        check_axes(place, row)
        own = {key: value for key, value in row.items() if not key.startswith(OF_WORKLOAD)}
        variants.append(_variant(place, data.get("controls", {}), own))
    return tuple(variants)


def _variant(where: str, controls: Mapping[str, Any], own: Mapping[str, Any]) -> AnyVariant:
    """A variant of the form that its keys ask for. Of the controls it takes those that its form has."""
    form = AnyVariant.class_for({**controls, **own})
    known = form_keys(form)
    for key, value in {**controls, **own}.items():
        if key in known:
            continue
        if form is ScriptVariant:
            why = "the variant is a command, and its script says what is trained"
            raise impossible(where, key, value, why, "Give it to the script as an argument, and take it out here.")
        if key in form_keys(ScriptVariant):
            why = "only a variant that is a command has it"
            raise impossible(where, key, value, why, 'Add command = "python train.py", or take it out.')
        if key in own and form is PeftVariant:
            why = "the variant has a configuration of PEFT"
            raise impossible(where, key, value, why, f"Write it there, as peft.{key}, or take it out.")
        if key in own and form is FullVariant:
            raise impossible(where, key, value, "full fine-tuning has no adapter", "Take it out.")
    if form is PeftVariant and isinstance(path := {**controls, **own}["peft"], str):
        own = {**own, "peft": read_config(where, path)}
    content = {key: value for key, value in {**controls, **own}.items() if key in known}
    return codec.from_json(form, content, where, strict=True)


def workloads_of(rows: Sequence[Mapping[str, Any]], workload: Workload) -> dict[str, dict[str, Any]]:
    """What variants are measured on in place of the study's workload, as far as it is something else."""
    common, found = _written(workload), dict[str, dict[str, Any]]()
    for row in rows:
        own = {key.removeprefix(OF_WORKLOAD): value for key, value in row.items() if key.startswith(OF_WORKLOAD)}
        own = {key: value for key, value in own.items() if key not in common or common[key] != value}
        if own:
            found[row["name"]] = own
    return found


def _swept(where: str, controls: Mapping[str, Any], sweeps: Mapping[str, Any], centre: str) -> list[dict[str, Any]]:
    """The controls under the name `centre`, and each value of each field in turn; a value of the controls is them."""
    rows: list[dict[str, Any]] = [{"name": centre}]
    for key, values in sweeps.items():
        if controls.get(key) not in values:
            raise impossible(
                f"{where}, [sweeps]", key, values, f"the controls' {key} = {controls.get(key)!r} is not among them",
                "Every sweep goes through the controls: add the value to one of the two.",
            )  # fmt: skip
        rows += [{"name": f"{key}={_label(value)}", key: value} for value in values if value != controls[key]]
    return rows


def _label(value: Any) -> str:
    """A value as part of a name: the items of a list joined."""
    return "+".join(map(str, value)) or "default" if isinstance(value, list) else str(value)
