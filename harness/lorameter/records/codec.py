"""Reads and writes JSON of records, studies and messages with msgspec; an error names file, key, value and remedy.

Unknown or missing keys and values of the wrong type are errors: if they were ignored, two sides of a comparison could
differ silently.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from lorameter.errors import UsageError, refused_value

T = TypeVar("T")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_WORDS = {"object": ("a table", "Write it as { key = value }."), "array": ("a list", "Write it as [ ... ].")}


class NotReadableError(ValueError):
    """Raised for a file that cannot be used; the message says why, and the caller adds the expected content."""


def parse(text: str | bytes) -> Any:
    """Parse JSON text into plain data. Raises `NotReadableError`, also for half a character (a lone surrogate), which
    no text can hold."""
    try:
        data = json.loads(text)
        if _ESCAPED_HALF.search(text if isinstance(text, str) else text.decode()):
            json.dumps(data, ensure_ascii=False).encode()  # raises for a half
    except RecursionError:
        raise NotReadableError("it is nested too deeply") from None
    except ValueError as error:  # truncated text, binary data, numbers with thousands of digits
        raise NotReadableError(str(error).partition(";")[0]) from None
    return data


def to_json(value: Any) -> Any:
    """Convert a Struct, a dataclass or a collection of them to plain data.

    JSON has no NaN or infinity, and a loss that diverged must not make a record unreadable: they become the strings
    "NaN", "Infinity" and "-Infinity", which `from_json` turns back into floats where a float is expected.
    """
    return _name_floats(msgspec.to_builtins(value, str_keys=True, enc_hook=to_plain))


def to_plain(value: object) -> object:
    """Convert a value of a subclass (numpy's floats, torch's version, a read-only mapping) to the plain type."""
    kinds: tuple[tuple[type, Any], ...] = ((str, str), (int, int), (float, float), (Mapping, dict), (Sequence, list))
    for kind, plain in kinds:
        if isinstance(value, kind):
            return plain(value)
    raise TypeError(f"JSON with a {type(value).__name__}")


def _name_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _name_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_name_floats(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Write canonical JSON text: sorted keys, so that equal content has an equal hash. Raises `NotReadableError` for a
    value that is nested too deeply."""
    try:
        return json.dumps(to_json(value), sort_keys=True, indent=indent, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise NotReadableError("it is nested too deeply") from None


def from_json(cls: type[T], data: Any, where: str, *, strict: bool = False) -> T:
    """Build `cls` from plain data.

    Args:
        cls: a Struct, a dataclass, or a type made of them.
        data: plain data of JSON or TOML.
        where: name of the file or message, for errors.
        strict: refuse text in place of numbers. In JSON, "NaN" counts as a number.

    Raises:
        UsageError: a key is unknown (the message suggests the nearest one) or missing, or a value has the wrong type.
    """

    def decode(kind: type, item: Any) -> Any:
        return from_json(kind, item, where, strict=strict)

    try:
        cls = _form(cls, data)
        for path, key, value, known in _unknown_keys(cls, data, ""):
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Remove it."
            raise refused_value(where, f"{path}.{key}".lstrip("."), value, "unknown key", remedy)
        return msgspec.convert(data, cls, strict=strict, str_keys=True, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), cls, data, where, strict=strict) from None
    except RecursionError:
        raise UsageError(f"{where}: it is nested too deeply. Write it as a table of keys.") from None
    except UsageError as error:  # a class knows its own limits, this function knows the file
        message = str(error)
        if message.startswith(where):
            raise
        named = where.rpartition(", ")[2].strip("[]")  # the message may already begin with a part of the file
        raise UsageError(f"{where}: {message.removeprefix(f'{named}: ')}") from None


@functools.cache
def _fields_of(cls: Any) -> dict[str, Any]:
    """The type of each field of a Struct or a dataclass; {} for any other type."""
    return typing.get_type_hints(cls, include_extras=True) if hasattr(cls, "__match_args__") else {}


def _form(cls: Any, data: Any) -> Any:
    """The class for an object that has several forms (`class_for` of its base); any other class unchanged."""
    if not hasattr(cls, "class_for") or hasattr(cls, "__dataclass_fields__"):
        return cls
    if not isinstance(data, Mapping):
        raise msgspec.ValidationError("Expected `object`, got another type")
    return cls.class_for(data)


def _inner(hint: Any) -> list[Any]:
    """The types of a union, or the type itself, without None."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [one for one in typing.get_args(hint) if one is not type(None)] if union else [hint]


def _unknown_keys(hint: Any, data: Any, path: str) -> Iterator[tuple[str, str, Any, list[str]]]:
    """Keys of tables that are not fields of their class: path, key, value, and the fields of the class."""
    hint = _form(_inner(hint)[0], data)
    fields, origin = _fields_of(hint), typing.get_origin(hint)
    if fields and isinstance(data, Mapping):
        for key, value in data.items():
            if key in fields:
                yield from _unknown_keys(fields[key], value, f"{path}.{key}")
            elif getattr(hint, "__struct_config__", None) is None or hint.__struct_config__.forbid_unknown_fields:
                yield path, str(key), value, list(fields)
    elif origin is tuple and isinstance(data, (list, tuple)):
        for index, item in enumerate(data):
            yield from _unknown_keys(typing.get_args(hint)[0], item, f"{path}[{index}]")
    elif origin is dict and isinstance(data, Mapping):
        for key, item in data.items():
            yield from _unknown_keys(typing.get_args(hint)[1], item, f"{path}.{key}")


def _refusal(message: str, hint: Any, data: Any, where: str, *, strict: bool) -> UsageError:
    """The error for an invalid value, from msgspec's message ("Expected `int`, got `str` - at `$.a[0]`"), with a
    remedy."""
    what, _, place = message.partition(" - at `")
    place, path = place.removeprefix("key` in `").rstrip("`"), ""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place):
        inner = _form(next((one for one in _inner(hint) if typing.get_args(one) or _fields_of(one)), hint), data)
        if name:
            hint, key = _fields_of(inner)[name], name
        else:
            hint = typing.get_args(inner)[-1 if typing.get_origin(inner) is dict else 0]
            key = int(index) if index != "..." else _first_invalid_key(hint, data, strict=strict)
        data, path = data[key], f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        return UsageError(f"{where}: {f'{path}.{missing[1]}'.lstrip('.')} is missing. Add it.")
    if what.startswith("Invalid enum value"):
        known = [word for one in _inner(hint) for word in typing.get_args(one)]
        remedy = f"Use one of {', '.join(map(str, known))}."
        return refused_value(where, path, data, "not one of the known values", remedy)
    expected = re.match(r"Expected `(.*?)(?: \| null)?`(?! (?:matching|of|[<>]))", what)
    if "matching regex" in what:
        return refused_value(where, path, data, "one line is expected", "Write it in one line.")
    if not expected:
        return refused_value(where, path, data, f"{what[0].lower()}{what[1:]}", "Write another value.")
    word, remedy = _WORDS.get(expected[1], (expected[1], f"Write a value of type {expected[1]}."))
    return refused_value(where, path, data, f"{word} is expected", remedy)


def _first_invalid_key(hint: Any, data: Mapping[str, Any], *, strict: bool) -> str:
    """The key of the first value that does not convert, which msgspec does not name."""
    for key, value in data.items():
        try:
            msgspec.convert(value, hint, strict=strict, str_keys=True)
        except msgspec.ValidationError:
            return key
    return next(iter(data))
