"""What no recorder writes, refused before it costs more than the file is worth.

A parser keeps the path to where it is, so nesting takes memory by the square of its depth; a token that spans the parts
in which a file is read is looked at again with each of them, and the digits of an integer take time by the square of
their number. So a small file of brackets would take gigabytes, and one of digits minutes. Real traces nest six levels,
their longest strings are names of kernels, and their numbers have twenty digits.
"""

from __future__ import annotations

import re

import numpy as np

MOST_LEVELS = 256
LONGEST_STRING_BYTES = 1 << 20
LONGEST_NUMBER_BYTES = 10_000

_NUMBER = b"0123456789+-.eE"
_NO_NUMBER = re.compile(rb"[^0-9+\-.eE]+")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CLOSES = 4
"""The bit in which a closing bracket differs from an opening one, both of lists and of objects."""


class JsonLimits:
    """Follows the text of a JSON document, part by part; whether it is JSON is for the parser to say."""

    def __init__(self) -> None:
        self._levels = 0
        self._in_string = False
        self._escaped = False
        self._string_bytes = 0
        self._number_bytes = 0

    def problem(self, part: bytes) -> str | None:
        """Take the next part and say what is beyond a limit in it, or None."""
        pieces = self._unescaped(part).split(b'"')
        outside = b'"'.join(pieces[1 if self._in_string else 0 :: 2])
        begun = self._string_bytes + len(pieces[0]) if self._in_string else 0
        ends_inside = self._in_string == (len(pieces) % 2 == 1)
        self._string_bytes = (begun if len(pieces) == 1 else len(pieces[-1])) if ends_inside else 0
        if max(begun, self._string_bytes) > LONGEST_STRING_BYTES:
            return f"a string is longer than {LONGEST_STRING_BYTES >> 20} MiB"
        self._in_string = ends_inside
        return self._number_problem(outside) or self._nesting_problem(outside)

    def _unescaped(self, part: bytes) -> bytes:
        """The part with what is escaped blotted out, of which quotation marks matter."""
        if self._escaped and part:
            part, self._escaped = b"_" + part[1:], False
        if b"\\" in part:
            part = part.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            self._escaped = part.endswith(b"\\")
        return part

    def _number_problem(self, outside: bytes) -> str | None:
        """Numbers end at whatever is none of their letters; one may have begun in the part before."""
        first = len(outside) - len(outside.lstrip(_NUMBER))
        last = len(outside) - len(outside.rstrip(_NUMBER))
        longest = self._number_bytes + first
        self._number_bytes = longest if first == len(outside) else last
        if max(map(len, outside.split(b","))) > LONGEST_NUMBER_BYTES:  # seldom: blank space, or a long number
            longest = max(longest, *map(len, _NO_NUMBER.split(outside)))
        if longest > LONGEST_NUMBER_BYTES:
            return f"a number has more than {LONGEST_NUMBER_BYTES:,} digits"
        return None

    def _nesting_problem(self, outside: bytes) -> str | None:
        brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), dtype=np.uint8)
        if not len(brackets):
            return None
        levels = self._levels + np.cumsum(np.where(brackets & _CLOSES, -1, 1))
        self._levels = int(levels[-1])
        return f"it nests deeper than {MOST_LEVELS} levels" if levels.max() > MOST_LEVELS else None
