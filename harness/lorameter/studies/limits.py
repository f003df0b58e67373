"""How large what a study asks for may be: no more than any machine could measure, so that a slip of the hand ends here.

The limits lie far above what anybody measures and far below what makes a plan endless, fills the memory with it, or
does not fit into what a number, a clock or a file name can hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from lorameter.errors import UsageError, impossible, shorten

MOST_REPLICATES = 10_000
MOST_STEPS = 10_000_000
"""Of one trial."""
MOST_TOKENS = 2**28
"""Of an epoch, its padding included; they are prepared in memory and written to a file of 32 bytes a token."""
MOST_VARIANTS = 1_000
MOST_ROUNDS = 2_000_000
"""Turns and requests of a whole plan, of all its trials."""
MOST_SEED = 2**32 - 1
"""The largest that every generator of random numbers takes (numpy's is the narrowest)."""
WEEK_S = 7 * 24 * 3600.0
YEAR_MINUTES = 366 * 24 * 60.0
LARGEST_FLOAT = 1e38
"""Of float32, about."""
NAME_BYTES = 120
"""Of what becomes part of a file's name, with a side, a replicate and an ending beside it; file systems take 255."""
MOST_FRACTION = 0.5
"""Of a tolerance, a margin or a precision. A larger value is a percentage by mistake."""
TEXT_CHARACTERS = 4096
"""Of a path or the name of a model; the kernel takes no longer path."""

Range = tuple[float, float]
"""The least and the most that a field may be."""


def check_ranges(where: str, owner: object, ranges: Mapping[str, Range]) -> None:
    """Raises `UsageError` for a field that lies outside of its range, or is no number; None is a field left out."""
    for key, (least, most) in ranges.items():
        value = getattr(owner, key)
        if value is None or least <= value <= most:
            continue
        why, remedy = (
            ("too small", f"Use {_write(least)} or more")
            if value < least
            else ("too large", f"Use {_write(most)} or less")
            if value > most
            else ("no number", f"Use one from {_write(least)} to {_write(most)}")
        )
        raise UsageError(f"{where}: {key} = {value!r}: {why}. {remedy}.")


def check_fraction(where: str, key: str, value: float | None, *, zero: bool = False) -> None:
    """Raises `UsageError` for a tolerance, margin or precision that is not a fraction up to 0.5; `zero` allows 0."""
    if value is None or 0 < value <= MOST_FRACTION or (zero and value == 0):
        return
    remedy = f"Use a fraction {'of 0 or more' if zero else 'above 0'}, up to {MOST_FRACTION}; 0.05 is 5 %."
    raise impossible(where, key, value, "not a fraction that two results can be judged by", remedy)


def check_name(what: str, name: str, forbidden: str = "/") -> None:
    """Raises `UsageError` for a name that could not become part of a file's."""
    size = len(name.encode("utf-8", errors="replace"))
    if size > NAME_BYTES:
        raise UsageError(f"{what} {shorten(name, 60)!r}: {size} bytes long, and it becomes part of the names of files. "
                         f"Use {NAME_BYTES} or fewer.")  # fmt: skip
    if not name or not name.isprintable() or any(character in forbidden for character in name):
        raise UsageError(
            f"{what} {name!r}: a name is part of test ids and file names. Use letters, digits, '-', '_', '.', '='."
        )


def check_word(where: str, key: str, text: str, *, lines: bool = False) -> None:
    """Raises `UsageError` for a text that is not UTF-8 (bytes of a command line), too long, or has control characters;
    `lines` allows line ends and tabs."""
    control = "[\0\ud800-\udfff]" if lines else "[\0-\x1f\x7f-\x9f\ud800-\udfff]"
    if len(text) > TEXT_CHARACTERS or re.search(control, text):
        raise UsageError(
            f"{where}: {key} = {shorten(ascii(text), 80)}: too long, no UTF-8, or with control characters in it. "
            "Correct it."
        )


def _write(limit: float) -> str:
    return str(int(limit)) if float(limit).is_integer() and abs(limit) < sys.maxsize else f"{limit:g}"
