"""Text from outside made safe for a terminal: in one place, for everything that prints.

Names, messages and answers come from files, models and other programs. An escape sequence among them could retitle the
window or hide a verdict, a mark that reorders letters could show another name than is there, and half a character
cannot be written at all.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import unicodedata
from typing import Any, NoReturn

_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that reorder the letters around them, so that what is read is not what is there."""
_ACTING = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Control characters, halves of characters, and ends of lines and paragraphs that are not written as such."""


def escape_control_chars(text: str) -> str:
    """The text with what would act on a terminal written out, all but line ends and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_write_out(character) if _acts(character) else character for character in text)


def print_stderr(text: str) -> None:
    """Print a line on standard error, with its control characters escaped."""
    print(escape_control_chars(text), file=sys.stderr, flush=True)


class SafeParser(argparse.ArgumentParser):
    """A parser of command lines whose errors show control characters in what was typed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but `--option=--` is an error: it would store an empty list. What follows a `--` belongs to
        another program."""
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile("--".__ne__, words):
            option, _, value = word.partition("=")
            if value == "--" and option.startswith("-"):
                self.error(f"argument {option}: '--' is no value of it")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end with exit code 2."""
        super().error(escape_control_chars(message))


def _acts(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in _ACTING or character in _REORDERING)


def _write_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
