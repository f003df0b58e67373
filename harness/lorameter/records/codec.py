"""Frozen dataclasses to JSON and back, strict in both directions.

Whatever crosses a process or reaches a disk is JSON of a dataclass. A reader that ignores unknown fields would let
two sides of a comparison disagree silently, so an unknown or missing key, or a value of the wrong type, is an error
that names the place. The standard library writes (`dataclasses.asdict`) but does not read; this module reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lorameter.errors import UsageError, impossible, shorten

T = TypeVar("T")
MOST_DEPTH = 64
"""Lists and tables in one another. What is read is copied, compared and printed by functions that call themselves."""
MOST_PARTS = 2_000_000
"""Lists and tables in one text: an empty one takes thirty times the memory of its text."""
MOST_INTEGER = 2**63 - 1
"""Beyond it no count, size, seed or time lies."""
_MANY_DIGITS = re.compile(r"\d{19}", re.ASCII)
NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""What is no number in JSON, as it is written."""
LATER: Mapping[str, bool] = types.MappingProxyType({"later": True})
"""Metadata of a field that came when there was already something written: it is left out where it has its default. So
what was written before keeps its hashes, and a revision that does not know the field reads what does without it."""


class NotJsonError(ValueError):
    """A text that is no JSON, or none that can be held: cut short, nested too deeply, a number without end."""


def parse(text: str | bytes, *, once: bool = False) -> Any:
    """Plain data of JSON text, within bounds; `once` refuses a table that says a key twice, of which readers of JSON
    take one or the other. Raises `NotJsonError`, and nothing else, whatever the text is."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        parts = text.count("[") + text.count("{")
        if parts > MOST_PARTS:
            raise NotJsonError(f"it has more than {MOST_PARTS} lists and tables")
        numbers = _number if _MANY_DIGITS.search(text) else None
        data = json.loads(text, parse_int=numbers, object_pairs_hook=_table if once else None)
        if parts > MOST_DEPTH:
            check_depth(data)
        return data
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except ValueError as error:  # of a text cut short, of bytes that are no text, of thousands of digits
        raise NotJsonError(str(error).partition(";")[0]) from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise NotJsonError(f"it says {shorten(repr(max(keys, key=keys.count)), 60)} twice")
    return table


def _number(digits: str) -> int | float:
    """A whole number; beyond the bound as the float that it is to most readers of JSON (RFC 8259, section 6)."""
    value = int(digits)
    return value if abs(value) <= MOST_INTEGER else float(digits)


def check_depth(data: Any) -> None:
    """Raises `NotJsonError` for plain data that is nested more deeply than `MOST_DEPTH`."""
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise NotJsonError("it is nested too deeply")


def to_json(value: Any) -> Any:
    """Plain JSON data of a dataclass instance (tuples become lists); non-finite floats become their names, and a field
    marked `LATER` is left out where it has its default.

    JSON has no NaN or infinity, and a diverged loss must not make a record unreadable, so they are written as the
    strings "NaN", "Infinity" and "-Infinity", which `from_json` turns back into floats where a float is due.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if "later" not in field.metadata or getattr(value, field.name) != _default_of(field)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Canonical JSON text: sorted keys, so that equal content has an equal hash.

    Raises:
        NotJsonError: it is nested too deeply.
    """
    try:
        return json.dumps(to_json(value), sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build `cls` from JSON or TOML data; `where` names the file or message in errors.

    Raises:
        UsageError: an unknown key (with the nearest known one), a missing key, or a value of the wrong type.
    """
    try:
        return typing.cast(T, _convert(cls, data, where, ""))
    except RecursionError:
        raise UsageError(f"{where}: it is nested too deeply. Write it as a table of keys.") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, data: Any, where: str, path: str) -> Any:
    if hint is Any:
        return data
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(typing.cast(type, hint), data, where, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if data not in args:
            raise impossible(
                where, path, data, "not one of the known values", f"Use one of {', '.join(map(str, args))}."
            )
        return data
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, data, where, path)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise impossible(where, path, data, "a list is expected", "Write it as [ ... ].")
        return tuple(_convert(args[0], item, where, f"{path}[{index}]") for index, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise impossible(where, path, data, "a table is expected", "Write it as { key = value }.")
        return {str(key): _convert(args[1], item, where, f"{path}.{key}") for key, item in data.items()}
    return _convert_scalar(hint, data, where, path)


def _convert_dataclass(cls: type, data: Any, where: str, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise impossible(where, path or cls.__name__, data, "a table is expected", "Write it as a table of keys.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Take it out."
            raise impossible(where, f"{path}.{key}".lstrip("."), data[key], "unknown key", remedy)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise UsageError(f"{where}: {f'{path}.{name}'.lstrip('.')} is missing. Add it.")
    hints = _hints(cls)
    values = {key: _convert(hints[key], item, where, f"{path}.{key}".lstrip(".")) for key, item in data.items()}
    try:
        return cls(**values)
    except UsageError as error:  # the dataclass knows its own limits, this place knows the file
        named = where.rpartition(", ")[2].strip("[]")  # a part of the file that the message may begin with as well
        raise UsageError(f"{where}: {str(error).removeprefix(f'{named}: ')}") from None


def _convert_union(args: tuple[Any, ...], data: Any, where: str, path: str) -> Any:
    if data is None and type(None) in args:
        return None
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, data, where, path)
        except UsageError as error:
            errors.append(error)
    raise errors[0]


def _convert_scalar(hint: Any, data: Any, where: str, path: str) -> Any:
    if hint is float:
        if isinstance(data, str) and data in NAMED:
            return NAMED[data]
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            with contextlib.suppress(OverflowError):  # of a whole number beyond all floats
                return float(data)
    elif hint is int:
        if isinstance(data, int) and not isinstance(data, bool) and abs(data) <= MOST_INTEGER:
            return data
    elif isinstance(hint, type) and isinstance(data, hint):
        return data
    expected = getattr(hint, "__name__", str(hint))
    raise impossible(where, path, data, f"{expected} is expected", f"Write a value of type {expected}.")
