"""A value that may be unavailable: the value, or the reason why there is none.

Counters differ between GPUs and containers. A zero for "unknown" would be shown as a measurement, and an exception
would end one. So meters return a `Reading`, which shows what is missing and why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
W = TypeVar("W")
_CHUNK = 2**16
LARGEST = 2**64
"""Of what the kernel counts, and writes as a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[V_co]):
    """One value of a meter, or None with the reason; exactly one of them is given. Raises ValueError otherwise."""

    value: V_co | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.reason):
            raise ValueError(f"a reading has a value or a reason, not {self.value!r} and {self.reason!r}")

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def then(self, convert: Callable[[V_co], W]) -> Reading[W]:
        """The converted value; a missing one stays missing for its reason."""
        return Reading(reason=self.reason) if self.value is None else Reading(value=convert(self.value))

    def value_or_reason(self) -> V_co | str:
        """For a document: the value, or that there is none and why."""
        return unavailable(self.reason) if self.value is None else self.value


def unavailable(reason: str) -> str:
    """How it reads that there is no value, everywhere."""
    return f"not available: {reason}"


def missing(reason: str) -> Reading[V]:
    """No value, and why."""
    return Reading(reason=reason)


def read_file(path: Path, convert: Callable[[str], V], without: str) -> Reading[V]:
    """A value from a file of the kernel's; `without` says what it means that the file is not there.

    A file that is there and says something unexpected is missing too, with what it said.
    """
    try:
        text = _content(path)
    except FileNotFoundError:
        return missing(without)
    except OSError as error:
        return missing(f"{path} cannot be read: {error.strerror}")
    try:
        value = convert(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("no number")
        return Reading(value=value)
    except (ValueError, LookupError, ArithmeticError):
        return missing(f"{path} says {text[:60]!r}, which is not understood")


def count_of(text: str) -> int:
    """A whole number of the kernel's. Raises ValueError for what is none, or beyond what it counts to."""
    count = int(text)
    if abs(count) > LARGEST:
        raise ValueError("beyond what is counted")
    return count


def _content(path: Path) -> str:
    """All of a file. Meters read a dozen before and after a turn; for one of the kernel's this takes half of what
    `read_text` does, which asks what kind of file it is and how long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(descriptor, _CHUNK), b"")).decode(errors="replace")
    finally:
        os.close(descriptor)
