"""Figures of a report as data: what is drawn, in which unit, and the table that says the same in numbers.

Like the blocks of `lorameter.report.blocks` they are written for no renderer. A number is in its base unit; who it
belongs to is a variant's name, so that a reader can hide a variant everywhere at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from lorameter.report.blocks import Axis, Curves, Table, Tone


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One value of a variant, with its interval where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """A line for each mark, its value and its interval."""

    axis: Axis
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarSegment:
    """A piece of a bar."""

    kind: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Pieces that follow each other, of memory or of time."""

    name: str
    parts: tuple[BarSegment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A bar a variant; pieces of one kind have one colour."""

    axis: Axis
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A variant in two measures at once, each with its interval where it has one."""

    name: str
    across: Mark
    up: Mark
    best: bool
    """Whether no other variant is better in one of them and no worse in the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoFront:
    """Variants in two measures: of the one across less is better, of the other less or more."""

    across: Axis
    up: Axis
    spots: tuple[Spot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The raw samples of one trial, and when it ran."""

    name: str
    began_s: float
    ended_s: float
    samples: tuple[float, ...]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Each sample with a time: they are spread evenly over the trial's, as no record holds when each was taken."""
        step = (self.ended_s - self.began_s) / max(len(self.samples), 1)
        return [(self.began_s + step * (place + 0.5), sample) for place, sample in enumerate(self.samples)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Every raw sample of all trials."""

    across: Axis
    up: Axis
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureCheck:
    """What a check found of a variant, and why."""

    text: str
    tone: Tone
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What was found of each path in each variant; it is its own table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[FigureCheck | None, ...]], ...]


Drawing: TypeAlias = Intervals | Curves | Bars | ParetoFront | Samples | Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture, what it shows in words, and the table of its numbers."""

    title: str
    says: str
    """One or two sentences for who does not see it, and for who does not know how to read it."""
    drawing: Drawing
    table: Table | None
    """None where the drawing is a table itself."""
