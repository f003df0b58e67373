"""The form of a finding, and how a value or the reason for having none is put into words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from lorameter.machine.reading import Reading, unavailable

V = TypeVar("V")
About = Literal["runs", "measures", "spoils"]
"""What can run · what can be measured · what would spoil it."""
Grade = Literal["good", "note", "bad", "unfit"]
"""Nothing to do · worth knowing · costs precision, and can be mended · do not measure here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorCheck:
    """One thing that was looked at: what was found, with the limit where there is one, and what to do about it."""

    about: About
    name: str
    standing: Grade
    found: str
    remedy: str = ""


def say(reading: Reading[V], words: Callable[[V], str]) -> str:
    """The value in words, or why there is none."""
    return unavailable(reading.reason) if reading.value is None else words(reading.value)
