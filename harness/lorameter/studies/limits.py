"""Bounds of the values in a study."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lorameter.errors import UsageError, impossible, shorten

MOST_VARIANTS = 1_000
MOST_ROUNDS = 2_000_000
"""Maximum turns and requests of all trials of a plan."""
MOST_TOKENS = 2**28
"""Maximum tokens of an epoch, including padding; they are prepared in memory and written to a file of 32 bytes a
token."""
NAME_BYTES = 120
"""Maximum bytes of a part of a file name, to which a side, a replicate and a suffix are added; file systems allow
255."""
MOST_FRACTION = 0.5
"""Largest tolerance, margin or precision. A larger value is probably a percentage."""
TEXT_CHARACTERS = 4096
"""Maximum length of a path or a model name; the kernel accepts no longer path."""


def check_least(where: str, owner: object, least: Mapping[str, float], *, positive: Collection[str] = ()) -> None:
    """Raise `UsageError` for a field below its minimum, or not above zero; None is a field that is not given."""
    for key, bound in least.items():
        value = getattr(owner, key)
        if value is not None and not bound <= value < float("inf"):
            why = "too small" if value < bound else "not a finite number"
            raise UsageError(f"{where}: {key} = {value!r}: {why}. Use {bound:g} or more.")
    for key in positive:
        value = getattr(owner, key)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{where}: {key} = {value!r}: must be positive and finite. Use a number above 0.")


def check_fraction(where: str, key: str, value: float | None, *, zero: bool = False) -> None:
    """Raise `UsageError` for a tolerance, margin or precision that is not a fraction up to 0.5; `zero` allows 0."""
    if value is None or 0 < value <= MOST_FRACTION or (zero and value == 0):
        return
    remedy = f"Use a fraction {'of 0 or more' if zero else 'above 0'}, up to {MOST_FRACTION}; 0.05 is 5 %."
    raise impossible(where, key, value, "not a fraction that two results can be judged by", remedy)


def check_name(what: str, name: str, forbidden: str = "/") -> None:
    """Raise `UsageError` for a name that cannot be a part of a file name."""
    size = len(name.encode("utf-8", errors="replace"))
    if size > NAME_BYTES:
        raise UsageError(f"{what} {shorten(name, 60)!r}: {size} bytes long, and it becomes part of the names of files. "
                         f"Use {NAME_BYTES} or fewer.")  # fmt: skip
    if not name or not name.isprintable() or any(character in forbidden for character in name):
        raise UsageError(
            f"{what} {name!r}: a name is part of test ids and file names. Use letters, digits, '-', '_', '.', '='."
        )


def check_word(where: str, key: str, text: str, *, lines: bool = False) -> None:
    """Raise `UsageError` for a text that is not UTF-8 (bytes of a command line), too long, or has control characters;
    `lines` allows line breaks and tabs."""
    control = "[\0\ud800-\udfff]" if lines else "[\0-\x1f\x7f-\x9f\ud800-\udfff]"
    if len(text) > TEXT_CHARACTERS or re.search(control, text):
        raise UsageError(
            f"{where}: {key} = {shorten(ascii(text), 80)}: too long, no UTF-8, or with control characters in it. "
            "Correct it."
        )
