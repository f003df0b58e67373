"""What stands at the beginning of a GGUF file: values by their names, and which tensors lie behind them.

The package gguf makes an array of each item of each list, and believes the file of how many there are: ninety bytes
keep it busy for hours. A plan needs a dozen numbers. So the header is walked through here, lists are passed over, and
whatever is said of sizes is held against the file's before anything is made of it (gguf specification, section "File
structure").
"""

from __future__ import annotations

import importlib.util
import math
import struct
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from lorameter.records import bounded_io

VERSIONS = (2, 3)
MOST_ITEMS = 4_000_000
"""Of all lists together; the largest vocabularies have a million, their merges included."""
MOST_ENTRIES = 1_000_000
"""Of values, and of tensors."""
MOST_NESTED = 8
"""Lists in one another."""
MOST_DIMENSIONS = 8
TEXT_BYTES = bounded_io.CONFIG_BYTES
"""Of a value that is a text; the longest are chat templates and licences."""
NAME_BYTES = 65_535
"""Of a name, by the specification."""
_SCALARS: Mapping[int, str] = types.MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
"""Types of values as `struct` writes them."""
_TEXT, _LIST = 8, 9
Value = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself."""

    values: Mapping[str, Value]
    """By name; those that are lists are left out."""
    tensors: Mapping[str, tuple[int, ...]]
    """Dimensions of each by its name, the one whose elements lie side by side first."""


def is_readable() -> bool:
    """Whether the package is there that loads such files."""
    return importlib.util.find_spec("gguf") is not None


def read_header(path: Path) -> Header:
    """The header of a file whose tensors all lie in it.

    Raises:
        NotReadableError: it is no GGUF file, was cut short, or says of itself what no file has.
        OSError: there is none, or it may not be read.
    """
    with bounded_io.open_plain(path) as file:
        return _Walk(file).header()


def _refuse(why: str) -> NoReturn:
    raise bounded_io.NotReadableError(why)


class _Walk:
    """One walk through a header, from its first byte."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._order = "<"
        self._items = 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            _refuse("it does not begin as one")
        version = self._scalar("I")
        if version & 0xFFFF == 0:  # of a machine that writes the other end of a number first
            self._order = ">"
            version = struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in VERSIONS:
            _refuse(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        tensors, values = self._scalar("Q"), self._scalar("Q")
        if max(tensors, values) > MOST_ENTRIES:
            _refuse(f"it says that it has {tensors} tensors and {values} values")
        found: dict[str, Value | None] = {}
        for _ in range(values):
            name = self._text(NAME_BYTES)
            if name in found:
                _refuse(f"it says {name[:60]!r} twice")
            found[name] = self._value(self._scalar("I"), 0)
        named = {name: value for name, value in found.items() if value is not None}
        return Header(values=named, tensors=self._tensors(tensors, named.get("general.alignment", 32)))

    def _tensors(self, count: int, alignment: Value) -> dict[str, tuple[int, ...]]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            _refuse(f"its tensors are aligned to {alignment!r} bytes")
        found: dict[str, tuple[int, ...]] = {}
        ends = 0
        for _ in range(count):
            name = self._text(NAME_BYTES)
            dimensions = self._scalar("I")
            if name in found or dimensions > MOST_DIMENSIONS:
                _refuse(f"tensor {name[:60]!r} is there twice, or has {dimensions} dimensions")
            found[name] = tuple(self._scalar("Q") for _ in range(dimensions))
            kind, offset = self._scalar("I"), self._scalar("Q")
            ends = max(ends, offset + _size_of(found[name], kind))
        begin = self._file.tell()
        if count and begin + -begin % alignment + ends > self._size:
            _refuse("it has been cut short: its tensors do not lie in it")
        return found

    def _value(self, kind: int, depth: int) -> Value | None:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(TEXT_BYTES)
        if kind != _LIST:
            _refuse(f"a value is of type {kind}")
        self._pass_over(depth + 1)
        return None

    def _pass_over(self, depth: int) -> None:
        kind, count = self._scalar("I"), self._scalar("Q")
        self._items += count
        if self._items > MOST_ITEMS or depth > MOST_NESTED:
            _refuse(f"its lists have more than {MOST_ITEMS} items, or lie in one another")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _TEXT:
            for _ in range(count):
                self._skip(self._scalar("Q"))
        else:
            for _ in range(count):
                self._value(kind, depth)

    def _text(self, most_bytes: int) -> str:
        size = self._scalar("Q")
        if size > most_bytes:
            _refuse(f"a text in it has {size} bytes")
        try:
            return self._bytes(size).decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(str(error))

    def _scalar(self, form: str) -> int:
        """A number; those that are no whole ones are what they are."""
        form = f"{self._order}{form}"
        number: int = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return number

    def _skip(self, size: int) -> None:
        if self._file.seek(size, 1) > self._size:
            _refuse("it has been cut short")

    def _bytes(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            _refuse("it has been cut short")
        return content


def _size_of(dimensions: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor."""
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        _refuse(f"a tensor is of type {kind}")
    return math.prod(dimensions) * int(size) // int(block)
