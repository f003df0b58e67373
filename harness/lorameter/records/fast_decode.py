"""Texts that machines wrote, read fast: msgspec fills a mirror of the dataclass, and in any doubt the codec reads.

A run of many trials is hundreds of megabytes of numbers, and walking them in Python takes a hundred times as long as
parsing them. So of each dataclass a struct is made that has its fields and refuses unknown ones. It holds what is
numbers and words; what is nested or of any type stays text, is read by the codec, and is read once where it comes
again: the evidence of checks is most of a record and nearly the same in all of them. What msgspec refuses is read from
its beginning by the codec, which gives the value or the better error.

What the codec does not ask (`lorameter.records.validation`) is held on the same way: numbers by the struct, which
refuses what is beyond all that is measured, and what is left as text when it is read. Only what the codec had to read,
or a text in which a number has a name, is looked at once more as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.validation import LARGEST

T = TypeVar("T")
MOST_SHARED = 4096
"""Different texts of a field that are kept to be found again; what never comes again must not be held twice."""
SCALARS = (str, int, float, bool)
Integer = Annotated[int, msgspec.Meta(ge=-codec.MOST_INTEGER, le=codec.MOST_INTEGER)]
Number = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)] | Literal["NaN", "Infinity", "-Infinity"]
"""A float as it may be written (`codec.NAMED`), as far as it may be one that was measured."""
Whole = Callable[[T, str, bool], None]
"""Holds an instance against its form, with a name of its source; whether its numbers are within `LARGEST` and its parts
were held already."""


class Reader(Generic[T]):
    """Reads texts of one dataclass as `codec.from_json` would. Equal parts are one object, which nobody may change.

    Args:
        cls: the dataclass.
        whole: raises `UsageError` for an instance that has not its form.
        parts: the same for a part that is left as text, or an item of one, by the name of its field; asked once for
            each different text.
    """

    def __init__(
        self,
        cls: type[T],
        whole: Whole[T] = lambda instance, where, held: None,
        parts: Mapping[str, Callable[[Any, str], None]] = types.MappingProxyType({}),
    ) -> None:
        self._cls, self._whole, self._forms = cls, whole, parts
        self._mirror = _mirror(typing.cast(type, cls))
        self._decoder = msgspec.json.Decoder(self._mirror.struct)
        self._shared: dict[str, dict[bytes, Any]] = {name: {} for name in self._mirror.parts | self._mirror.items}

    def read(self, text: str, where: str) -> T:
        """The instance that a text says; `where` names the file or message in errors.

        Raises:
            codec.NotJsonError: the text is no JSON.
            UsageError: as `codec.from_json`.
        """
        try:
            return self._read(text)
        except (msgspec.MsgspecError, ValueError, RecursionError, UsageError):
            instance = codec.from_json(self._cls, codec.parse(text), where)
            self._whole(instance, where, False)
            return instance

    def _read(self, text: str) -> T:
        values = msgspec.structs.asdict(self._decoder.decode(text))
        named = '"NaN"' in text or 'Infinity"' in text or "\\" in text  # or one of them written with an escape
        if named:
            for name in self._mirror.numbers:
                values[name] = _named(values[name])
        for name, hint in self._mirror.parts.items():
            if isinstance(values[name], msgspec.Raw):  # else it is the field's default
                values[name] = self._part(name, hint, values[name])
        for name, hint in self._mirror.items.items():
            if values[name]:
                values[name] = tuple([self._part(name, hint, item) for item in values[name]])
        instance = self._cls(**values)
        self._whole(instance, "", not named)
        return instance

    def _part(self, name: str, hint: Any, raw: msgspec.Raw) -> Any:
        text, shared = bytes(raw), self._shared[name]
        try:
            return shared[text]
        except KeyError:
            part = codec.from_json(hint, codec.parse(text), name)
            if name in self._forms:
                self._forms[name](part, name)
            if len(shared) < MOST_SHARED:
                shared[text] = part
            return part


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Mirror:
    """A struct with the fields of a dataclass, and which of them it leaves as text."""

    struct: type[msgspec.Struct]
    numbers: tuple[str, ...]
    """Fields in which numbers stand that may be named."""
    parts: dict[str, Any]
    """Type of each field that is left as text as a whole."""
    items: dict[str, Any]
    """Type of the items of each tuple that are left as text one by one."""


@functools.cache
def _mirror(cls: type) -> _Mirror:
    hints = typing.get_type_hints(cls)
    parts, items, fields, numbers = {}, {}, [], []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if _is_plain(hint):
            numbers += [field.name] if _holds_floats(hint) else []
            hint = _written(hint)
        elif typing.get_origin(hint) is tuple:
            items[field.name], hint = typing.get_args(hint)[0], tuple[msgspec.Raw, ...]
        else:
            parts[field.name], hint = hint, msgspec.Raw
        if field.default is not dataclasses.MISSING:
            fields.append((field.name, hint, msgspec.field(default=field.default)))
        elif field.default_factory is not dataclasses.MISSING:
            fields.append((field.name, hint, msgspec.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, hint, msgspec.field()))
    struct = msgspec.defstruct(f"{cls.__name__}Mirror", fields, forbid_unknown_fields=True, kw_only=True, gc=False)
    return _Mirror(struct=struct, numbers=tuple(numbers), parts=parts, items=items)


def _is_plain(hint: Any) -> bool:
    """Whether msgspec reads a type exactly as the codec does: words, numbers, lists and tables of them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return all(isinstance(word, str) for word in args)
    if origin in (typing.Union, types.UnionType):
        others = [arg for arg in args if arg is not type(None)]
        return len(others) == 1 and _is_plain(others[0])
    if origin is tuple:
        return _is_plain(args[0])
    if origin is dict:
        return args[0] is str and _is_plain(args[1])
    return hint in SCALARS


def _holds_floats(hint: Any) -> bool:
    return hint is float or any(map(_holds_floats, typing.get_args(hint)))


def _written(hint: Any) -> Any:
    """A plain type with its floats as they may be written, and its whole numbers within the codec's bound."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return Number
    if hint is int:
        return Integer
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, [_written(arg) for arg in args])
    if origin is tuple:
        return tuple[_written(args[0]), ...]  # type: ignore[misc]  # a type that is made here
    if origin is dict:
        return dict[str, _written(args[1])]  # type: ignore[misc]  # as above
    return hint


def _named(value: Any) -> Any:
    """A value of a written type with its numbers as floats."""
    if isinstance(value, str):
        return codec.NAMED[value]
    if isinstance(value, tuple):
        return tuple([_named(item) if type(item) is not float else item for item in value])
    if isinstance(value, dict):
        return {key: _named(item) if type(item) is not float else item for key, item in value.items()}
    return value
