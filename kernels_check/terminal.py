"""Text from outside made safe for a terminal: in one place, for everything that prints.

Names, messages and answers come from files, models and other programs. An escape sequence among them could retitle the
window or hide a verdict, a mark that reorders letters could show another name than is there, and half a character
cannot be written at all.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from typing import NoReturn

_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that reorder the letters around them, so that a reader sees another text."""
_ACTING = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Control characters, halves of characters, and ends of lines and paragraphs that are not written as such."""


def escape_control_chars(text: str) -> str:
    """The text with control characters but line ends and tabs written as escape sequences."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_write_out(character) if _acts(character) else character for character in text)


def print_stderr(text: str) -> None:
    """Print a line on standard error, with its control characters escaped."""
    print(escape_control_chars(text), file=sys.stderr, flush=True)


class SafeParser(argparse.ArgumentParser):
    """A parser of command lines whose errors show control characters in what was typed."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end with exit code 2."""
        super().error(escape_control_chars(message))


def _acts(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in _ACTING or character in _REORDERING)


def _write_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
