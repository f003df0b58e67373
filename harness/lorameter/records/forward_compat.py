"""What can be read of a run that a newer version wrote: all that this version knows by name, and the names of the rest.

A newer schema adds fields, and words to those that are there. A field that is not known is left out; of a list that
stands by itself (notices, variants, claims) an item that does not fit is left out whole. Nothing is guessed: a value
that does not fit anywhere else, and a key that is missing, are errors as ever, since a default in their place would be
a statement that nobody made. Whatever is shown of such a run is shown with what was left out, and judges nothing
(`lorameter.verdicts.run_validity`): what a newer version means by a known name is not known either.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lorameter.errors import UsageError, shorten
from lorameter.records import codec

T = TypeVar("T")
Left = dict[str, None]
"""Names of what was left out, each once, in the order met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewerSchema:
    """That a run was written by a newer schema than this version reads whole."""

    schema: int
    """The newest in it."""
    unread: tuple[str, ...]
    """What was left out, by dotted names."""


def read_known(cls: type[T], data: Any, where: str, left: Left) -> T:
    """An instance of what is known of the data; the names of what is not are added to `left`.

    Raises:
        UsageError: as `codec.from_json`, but for an unknown key and for an item of a list of the dataclass's own.
    """
    known = _known(cls, data, where, left)
    if isinstance(known, dict):
        for name, hint in typing.get_type_hints(cls).items():
            if name in known and isinstance(known[name], list) and _is_list_of_tables(hint):
                known[name] = _fitting(typing.get_args(hint)[0], known[name], f"{where}, {name}", left)
    return codec.from_json(cls, known, where)


def _is_list_of_tables(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


def _fitting(cls: Any, items: list[Any], where: str, left: Left) -> list[Any]:
    kept = []
    for item in items:
        try:
            codec.from_json(cls, item, where)
        except UsageError as error:
            left[str(error).rstrip(".")] = None
        else:
            kept.append(item)
    return kept


def _known(hint: Any, data: Any, path: str, left: Left) -> Any:
    """The data without the keys of tables that their dataclass has no field for."""
    if dataclasses.is_dataclass(hint) and isinstance(data, Mapping):
        hints = typing.get_type_hints(hint)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(hint)}
        left.update((f"{path}, {shorten(str(key), 60)}", None) for key in data if key not in fields)
        return {key: _known(fields[key], item, f"{path}, {key}", left) for key, item in data.items() if key in fields}
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and isinstance(data, list):
        return [_known(args[0], item, path, left) for item in data]
    if typing.get_origin(hint) is dict and isinstance(data, Mapping):
        return {key: _known(args[1], item, f"{path}, {shorten(str(key), 60)}", left) for key, item in data.items()}
    tables = [arg for arg in args if dataclasses.is_dataclass(arg)]
    return _known(tables[0], data, path, left) if len(tables) == 1 else data
