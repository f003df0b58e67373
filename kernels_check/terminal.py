"""Makes outside text safe for a terminal, for everything that prints.

Names, messages and answers come from files, models and other programs. An escape sequence in them could rename the
window or hide a verdict, a bidirectional mark could make a name look different, and a lone surrogate cannot be written
at all.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from typing import NoReturn

_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Bidirectional marks, which reorder the letters around them."""
_ACTING = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Categories of control characters, surrogates, and line and paragraph separators."""


def escape_control_chars(text: str) -> str:
    """Replace control characters, except line ends and tabs, by escape sequences."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_write_out(character) if _acts(character) else character for character in text)


def print_stderr(text: str) -> None:
    """Print a line on standard error, with its control characters escaped."""
    print(escape_control_chars(text), file=sys.stderr, flush=True)


class SafeParser(argparse.ArgumentParser):
    """A command-line parser whose errors make control characters in arguments visible."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        super().error(escape_control_chars(message))


def _acts(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in _ACTING or character in _REORDERING)


def _write_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
