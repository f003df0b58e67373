"""A value that may be unavailable, with the reason if it is.

Available counters differ between GPUs and containers. A zero for "unknown" would be reported as a measurement, and an
exception would end the measurement. So meters return a `Reading`, which holds the reason for a missing value.
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
    """One value of a meter, or None with a reason; exactly one of the two is set."""

    value: V_co | None = None
    reason: str = ""

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def then(self, convert: Callable[[V_co], W]) -> Reading[W]:
        """Convert the value; a missing value stays missing for the same reason."""
        return Reading(reason=self.reason) if self.value is None else Reading(value=convert(self.value))

    def value_or_reason(self) -> V_co | str:
        """For documents: the value, or a text that it is unavailable and why."""
        return unavailable(self.reason) if self.value is None else self.value


def unavailable(reason: str) -> str:
    """The text that replaces a missing value in all documents."""
    return f"not available: {reason}"


def missing_reading(reason: str) -> Reading[V]:
    """A reading without a value, for this reason."""
    return Reading(reason=reason)


def counter_increase(before: Reading[float], after: Reading[float]) -> Reading[float]:
    """The increase of a cumulative counter; missing if it decreased, which is then a reset or another machine."""
    if before.value is None or after.value is None:
        return missing_reading(before.reason or after.reason)
    if after.value < before.value:
        return missing_reading(f"the counter went back from {before.value:g} to {after.value:g}")
    return Reading(value=after.value - before.value)


def read_file(path: Path, convert: Callable[[str], V], absent: str) -> Reading[V]:
    """A value from a file of the kernel; `absent` is the reason if the file does not exist.

    A file with unexpected content also gives a missing value, with the content in the reason.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return missing_reading(absent)
    except OSError as error:
        return missing_reading(f"{path} cannot be read: {error.strerror}")
    try:
        return Reading(value=convert(text))
    except (ValueError, LookupError, ArithmeticError):
        return missing_reading(f"{path} says {text[:60]!r}, which is not understood")


def parse_fields(text: str) -> dict[str, str]:
    """The fields of a file of the kernel with lines such as `VmRSS: 100 kB`; of several with one name, the first."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
