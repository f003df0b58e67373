"""Metadata and tensor dimensions of a GGUF file (gguf specification, section "File structure").

`gguf.GGUFReader` makes numpy arrays of every item of every list: 7.5 s of CPU time for a vocabulary of 151,000 tokens,
in every dry run. A plan needs a dozen numbers, so lists are skipped here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorameter.records import fileio

VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` codes of the value types that are numbers."""
_TEXT, _LIST = 8, 9
Value = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Metadata of a file."""

    values: Mapping[str, Value]
    """By name, without lists."""
    tensors: Mapping[str, tuple[int, ...]]
    """Dimensions of each tensor by name, the fastest-varying one first."""


def read_header(path: Path) -> Header:
    """The header of a complete file.

    Raises:
        NotReadableError: it is no GGUF file of a known version, or truncated.
        OSError: it does not exist, or cannot be opened.
    """
    with fileio.open_plain(path) as file:
        if file.read(4) != b"GGUF":
            raise fileio.NotReadableError("it does not begin with GGUF")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Parser(content).header()
        except struct.error:
            raise fileio.NotReadableError("it is truncated") from None
        except (KeyError, ValueError) as error:
            raise fileio.NotReadableError(f"unknown type or text: {error}") from None


class _Parser:
    """Reads a header from its first byte; `struct.error` at the end of the file."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._offset = 4

    def header(self) -> Header:
        version, tensors, entries = self._number("I"), self._number("Q"), self._number("Q")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise fileio.NotReadableError(f"its version is {version}, and {known} are supported")
        found = {self._text(): self._value(self._number("I")) for _ in range(entries)}
        values = {name: value for name, value in found.items() if value is not None}
        return Header(values=values, tensors=self._tensors(tensors, int(values.get("general.alignment", 32))))

    def _tensors(self, count: int, alignment: int) -> dict[str, tuple[int, ...]]:
        import gguf

        found, last_byte = {}, 0
        for _ in range(count):
            name, rank = self._text(), self._number("I")
            found[name] = tuple(self._number("Q") for _ in range(rank))
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self._number("I"))]
            last_byte = max(last_byte, self._number("Q") + math.prod(found[name]) // block * size)
        if count and -(-self._offset // alignment) * alignment + last_byte > len(self._content):
            raise fileio.NotReadableError("it is truncated: tensors are missing")
        return found

    def _value(self, kind: int) -> Value | None:
        """A number or text; None for a list, which is skipped."""
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            return self._number(_SCALARS[kind])
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._offset += count * struct.calcsize(_SCALARS[kind])
        elif kind == _TEXT:
            for _ in range(count):
                size = self._number("Q")
                self._offset += size
        else:
            for _ in range(count):
                self._value(kind)
        return None

    def _text(self) -> str:
        size = self._number("Q")
        self._offset += size
        return self._content[self._offset - size : self._offset].decode("utf-8")

    def _number(self, code: str) -> int:
        number: int = struct.unpack_from(f"<{code}", self._content, self._offset)[0]
        self._offset += struct.calcsize(code)
        return number
