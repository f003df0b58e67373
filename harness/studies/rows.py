"""The rows of a study file: each variant's name and what it differs in from the controls, as listed or combined.

`[axes]` combine every value with every other, `[sweeps]` change one field at a time. A field of the workload is written
`workload.FIELD`, and is part of what the variant is measured on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import UsageError, impossible
from harness.records import codec
from harness.studies import limits
from harness.studies.study import OF_WORKLOAD
from harness.studies.variant import Variant
from harness.studies.workload import Workload


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
    for table, content in (("axes", axes), ("sweeps", sweeps)):
        for key, values in content.items():
            if not isinstance(values, list) or not values:
                raise impossible(
                    f"{where}, [{table}]", key, values, "a list of values is expected", "Write it as [ ... ]."
                )
    if sweeps:
        common = data.get("workload", {})
        defaults = codec.to_json(Workload()) | (dict(common) if isinstance(common, Mapping) else {})
        held = {**controls, **{f"{OF_WORKLOAD}{key}": value for key, value in defaults.items()}}
        return _swept(where, held, sweeps, str(data.get("reference", "centre")))
    if math.prod(map(len, axes.values())) > limits.MOST_VARIANTS:
        raise UsageError(
            f"{where}, [axes]: {math.prod(map(len, axes.values()))} combinations. "
            f"Use {limits.MOST_VARIANTS} variants or fewer."
        )
    if axes:
        return [
            {"name": "-".join(f"{key}={_label(value)}" for key, value in zip(axes, values, strict=True))}
            | dict(zip(axes, values, strict=True))
            for values in itertools.product(*axes.values())
        ]
    return [_flat(row) for row in listed]


def variants_of(where: str, data: Mapping[str, Any], rows: Sequence[Any]) -> tuple[Variant, ...]:
    """The controls with what each row changes. Raises `UsageError` for a row without a name, or an impossible value."""
    variants = []
    for index, row in enumerate(rows):
        label = row.get("name", f"number {index + 1}") if isinstance(row, Mapping) else f"number {index + 1}"
        place = f"{where}, variant {label!r}"
        if not isinstance(row, Mapping) or not isinstance(row.get("name", ""), str) or not row.get("name"):
            raise UsageError(f'{place}: name is missing. Add name = "...".')
        own = {key: value for key, value in row.items() if not key.startswith(OF_WORKLOAD)}
        variants.append(codec.from_json(Variant, {**data.get("controls", {}), **own}, place))
    return tuple(variants)


def workloads_of(rows: Sequence[Mapping[str, Any]], workload: Workload) -> dict[str, dict[str, Any]]:
    """What variants are measured on in place of the study's workload, as far as it is something else."""
    common, found = codec.to_json(workload), dict[str, dict[str, Any]]()
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
