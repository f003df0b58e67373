"""A value that may be unavailable: the value, or the reason why there is none.

Counters differ between GPUs and containers. A zero for "unknown" would be shown as a measurement, and an exception
would end one. So meters return a `Reading`, which gives a missing value its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
W = TypeVar("W")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[V_co]):
    """One value of a meter, or None with the reason; exactly one of them is given."""

    value: V_co | None = None
    reason: str = ""

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
    """The text in place of a missing value, everywhere."""
    return f"not available: {reason}"


def missing(reason: str) -> Reading[V]:
    """No value, and why."""
    return Reading(reason=reason)


def read_file(path: Path, convert: Callable[[str], V], absent: str) -> Reading[V]:
    """A value from a file of the kernel's; `absent` says what it means that there is no such file.

    A file with an unexpected content is missing too, with what it says.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return missing(absent)
    except OSError as error:
        return missing(f"{path} cannot be read: {error.strerror}")
    try:
        return Reading(value=convert(text))
    except (ValueError, LookupError, ArithmeticError):
        return missing(f"{path} says {text[:60]!r}, which is not understood")
