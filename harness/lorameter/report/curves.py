"""Curves as data: what one is, over which axes. Whatever draws one, in characters or as a picture, is given these.

They know nothing of tables or reports, so that the blocks of a document and the figures of a page can both hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.records.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What a direction of a picture measures."""

    title: str
    unit: Unit = "1"
    line_at: float | None = None
    """A value that all others are read against, as 1 is of ratios."""
    named: tuple[tuple[float, str], ...] = ()
    """Values that are named next to it, and by what; () leaves that to the renderer."""
    log: bool = False
    """Whether it is laid out by the logarithm, as values are that double; they are above 0."""
    span: tuple[float, float] | None = None
    """Its ends; None is what its values need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values of one variant in an order, with a band around them where there is one."""

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    """Place, lower and upper end, of the points that have an interval."""

    @property
    def ends(self) -> tuple[float, ...]:
        """All of its values, those of its band among them."""
        return (*(y for _, y in self.points), *(end for _, low, high in self.band for end in (low, high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Curves over one axis."""

    across: Axis
    up: Axis
    curves: tuple[Curve, ...]
