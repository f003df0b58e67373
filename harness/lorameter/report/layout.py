"""Which columns of a table fit, and how wide each is: numbers whole, words whole, what matters least left out first.

A column has a width below which a word or a number of it would break, and one at which nothing of it wraps. Where
columns do not fit next to each other, some are left out by their rank; where those that may never be left out do not
fit, the table is no table there, and its rows are written below each other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

GAP = 2
"""Columns between two columns."""
_GLUE = "\ue000"
"""Stands for a space at which no line may end; of a private use, and as wide as a space."""
_WITHIN = re.compile(
    r"(?<=\d) (?=%|(?:[mnµ]?s|min|h|[KMGT]?i?B|[kmµ]?J|W|°C)\b)|(?<=[±×]) (?=[\d.])|(?<=\w) (?=±)"
    r"|(?<=\d) (?=(?:of|to) \d)"
)
"""Spaces of a number with its unit, and of a number with what belongs to it."""
_INTERVAL = re.compile(r"\[[^\[\]\n]{1,40}\]")


def glue(text: str) -> str:
    """The text, of the same length, with what no line may break at: a number and its unit, an interval."""
    if _GLUE in text:
        return text
    return _WITHIN.sub(_GLUE, _INTERVAL.sub(_glue_interval, text))


def _glue_interval(found: re.Match[str]) -> str:
    return found[0].replace(" ", _GLUE) if any(map(str.isdigit, found[0])) else found[0]


def unglue(text: str) -> str:
    """The text as it was before `glue`."""
    return text.replace(_GLUE, " ")


_COMFORT = 16
_COMFORT_OF_RANKED = 26
"""Characters below which prose is hard to read; a column that may be left out is left out sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """What a column needs."""

    least: int
    """Below it a word or a number breaks."""
    good: int
    """Below it it is hard to read."""
    natural: int
    """At it nothing wraps."""
    rank: int = 0
    """The higher, the sooner it is left out; 0 is never left out."""


def measure(texts: Iterable[str], *, whole: bool, rank: int = 0) -> ColumnSpec:
    """What these texts need below each other; `whole`: whether each of their lines stays on one line."""
    lines = [glue(line) for text in texts for line in text.split("\n")]
    natural = max(map(cell_len, lines), default=0)
    longest = max((cell_len(word) for line in lines for word in line.split()), default=0)
    least = natural if whole else longest
    good = max(least, min(natural, _COMFORT_OF_RANKED if rank else _COMFORT))
    return ColumnSpec(least=least, good=good, natural=natural, rank=rank)


def fit(columns: Sequence[ColumnSpec], width: int, *, whole: bool = False) -> tuple[int, ...] | None:
    """The width of each column, 0 for one that is left out; None where what must be shown does not fit, or, if it is
    wanted `whole`, where anything would be left out or be hard to read."""
    kept = list(range(len(columns)))
    if whole and _total([column.good for column in columns]) > width:
        return None
    while _total([columns[place].good for place in kept]) > width:
        droppable = [place for place in kept if columns[place].rank]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda place: (columns[place].rank, place)))
    begin = {place: columns[place].good for place in kept}
    if _total(begin.values()) > width:
        begin = {place: columns[place].least for place in kept}
    left = width - _total(begin.values())
    if left < 0:
        return None
    widths = _share_out(columns, begin, left)
    return tuple(widths.get(place, 0) for place in range(len(columns)))


def _total(widths: Collection[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _share_out(columns: Sequence[ColumnSpec], begin: Mapping[int, int], left: int) -> dict[int, int]:
    """What is left goes to columns that wrap, by how much they lack."""
    widths = dict(begin)
    while left > 0:
        lacking = {place: columns[place].natural - wide for place, wide in widths.items()}
        short = {place: lack for place, lack in lacking.items() if lack > 0}
        if not short:
            break
        whole = left
        for place, lack in short.items():
            given = min(lack, max(1, whole * lack // sum(short.values())), left)
            widths[place] += given
            left -= given
    return widths
