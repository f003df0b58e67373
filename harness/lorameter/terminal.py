"""Makes outside text safe for a terminal, for everything that prints.

Names, messages and answers come from files, models and other programs. An escape sequence in them could rename the
window or hide a verdict, a bidirectional mark could make a name look different, and a lone surrogate cannot be written
at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except line ends and tabs, bidirectional marks, line and paragraph separators, surrogates."""


def escape_control_chars(text: str) -> str:
    """Replace control characters, except line ends and tabs, by escape sequences."""
    return _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def print_stderr(text: str) -> None:
    """Print a line on standard error, with its control characters escaped."""
    print(escape_control_chars(text), file=sys.stderr, flush=True)


class SafeParser(argparse.ArgumentParser):
    """A command-line parser whose errors make control characters in arguments visible."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        super().error(escape_control_chars(message))
