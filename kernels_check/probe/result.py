"""What the probe says of one fast path: could it run, did it, how exact, how fast, and why not.

A path counts as run only by what was executed or stored; that it was accepted without complaint proves nothing. What
was accepted, did not run and was not announced by any warning is ``claimed``, the one case that misleads a user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

ProbeStatus: TypeAlias = Literal["exact", "inexact", "claimed", "unavailable", "broken"]
"""``exact``: ran, within its bounds. ``inexact``: ran, outside. ``claimed``: accepted in silence, and did not run.
``unavailable``: refused, by an exception or a warning. ``broken``: the probe's own code raised, which tells nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """One comparison with a reference."""

    what: str
    error: float
    bound: float
    source: str
    """Where the bound comes from."""
    least: float = 0.0
    """Errors below it are as wrong: an error of quantisation identifies its format."""

    @property
    def holds(self) -> bool:
        """False for NaN."""
        return self.least <= self.error <= self.bound

    @property
    def strain(self) -> float:
        """Error as a part of what is allowed; infinite where it does not hold."""
        return self.error / self.bound if self.holds else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Paired repeats of the path and of the plain one."""

    plain: str
    """Name of the plain path."""
    path_time_s: float
    """Median."""
    plain_time_s: float
    """Median."""
    speedup: float
    """Median of the paired ratios, plain divided by path: above 1 is faster."""
    low: float
    """First quartile of the ratios."""
    high: float
    """Third quartile."""
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one try of a path brought."""

    ran: bool
    evidence: str
    """The operators, kernels or stored bytes that prove it, or that were there instead."""
    exactness: tuple[Exactness, ...] = ()
    speed: Speed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReport:
    """One line of the probe."""

    name: str
    can_run: bool
    """Whether nothing refused it."""
    ran: bool
    status: ProbeStatus
    evidence: str | None
    exactness: tuple[Exactness, ...]
    speed: Speed | None
    reason: str | None
    """Why it does not run, in the library's own words where it gave any."""

    @property
    def failed(self) -> bool:
        """Whether it misleads: wrong numbers, a claim that is none, or a probe that could not tell."""
        return self.status in ("inexact", "claimed", "broken")
