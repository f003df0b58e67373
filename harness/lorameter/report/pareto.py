"""Variants in two measures at once, and which of them no other beats in both.

Loss against cost, of what was trained; throughput against latency, of requests that have different numbers of prompts.
More prompts a request share what it costs to read the weights: all of them together get more tokens a second, and each
of them waits longer for its own. Neither number alone says how many to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorameter.records.metrics import METRICS
from lorameter.report.blocks import Cell, Table, name_columns, say, value_cell, write_row
from lorameter.report.curves import Axis
from lorameter.report.figure import Figure, Mark, ParetoFront, Spot
from lorameter.verdicts.series import Series

LATENCY, THROUGHPUT = "time_per_output_token_s", "output_tokens_per_s"
SERVING = "Throughput against latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoMeasures:
    """Variants in two metrics, of those that have both."""

    across: str
    up: str
    marks: Mapping[str, tuple[Mark, Mark]]

    @property
    def spots(self) -> tuple[Spot, ...]:
        """Each with whether it is on the front."""
        return tuple(
            Spot(name=name, across=x, up=y, best=not any(self._beats(other, (x, y)) for other in self.marks.values()))
            for name, (x, y) in self.marks.items()
        )

    @property
    def drawing(self) -> ParetoFront:
        """As a picture."""
        return ParetoFront(across=axis_of(self.across), up=axis_of(self.up), spots=self.spots)

    def _beats(self, one: tuple[Mark, Mark], other: tuple[Mark, Mark]) -> bool:
        """Whether it is better in one measure and no worse in the other."""
        signs = [-1 if METRICS[metric].higher_is_better else 1 for metric in (self.across, self.up)]
        pairs = [(sign * a.value, sign * b.value) for sign, a, b in zip(signs, one, other, strict=True)]
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def axis_of(metric: str) -> Axis:
    """The axis of a metric."""
    return Axis(title=METRICS[metric].title, unit=METRICS[metric].unit)


def measure_both(shown: Mapping[str, Series], across: str, up: str) -> TwoMeasures | None:
    """The variants that have both metrics; None where fewer than two do."""
    marks: dict[str, tuple[Mark, Mark]] = {}
    for name, series in shown.items():
        x, y = (_mark(name, series, metric) for metric in (across, up))
        if x is not None and y is not None:
            marks[name] = x, y
    return TwoMeasures(across=across, up=up, marks=marks) if len(marks) > 1 else None


def tabulate_front(found: TwoMeasures) -> Table:
    """The numbers of a front."""
    front = found.drawing
    rows = (
        write_row(spot.name, _written(spot.across, front.across), _written(spot.up, front.up), _on_it(spot))
        for spot in front.spots
    )
    return Table(heads=name_columns("variant", front.across.title, front.up.title, "on the front"), rows=tuple(rows))


def tabulate_serving(shown: Mapping[str, Series]) -> Table | None:
    """Throughput and latency of variants whose requests have different numbers of prompts; None where all have one."""
    found = _serving(shown)
    if found is None:
        return None
    front = found.drawing
    rows = (
        write_row(
            spot.name, _prompts(shown[spot.name]), _written(spot.across, front.across), _written(spot.up, front.up),
            _on_it(spot),
        )
        for spot in front.spots
    )  # fmt: skip
    heads = name_columns("variant", "prompts", front.across.title, front.up.title, "on the front")
    said = (
        "output tokens/s: of all prompts of a request, over its time; on the front: no other has more of them and less "
        "time per token, by their estimates"
    )
    return Table(title=SERVING, heads=heads, rows=tuple(rows), notes=(say(said),), blank_line_before=True)


def draw_serving(shown: Mapping[str, Series]) -> Figure | None:
    """The same as a picture."""
    found, table = _serving(shown), tabulate_serving(shown)
    if found is None or table is None:
        return None
    return Figure(
        title=SERVING,
        says="To the left each prompt gets its tokens sooner, above all prompts of a request together get more of them "
        "a second. The dashed stair joins the variants that no other beats in both by its estimate; where intervals "
        "overlap the order is open.",
        drawing=found.drawing,
        table=replace(table, title="", notes=(), blank_line_before=False),
    )


def _serving(shown: Mapping[str, Series]) -> TwoMeasures | None:
    several = len({batch for series in shown.values() for batch in _batches(series)}) > 1
    return measure_both(shown, LATENCY, THROUGHPUT) if several else None


def _batches(series: Series) -> set[float]:
    """Prompts of its requests; a record that does not say is of one."""
    return {record.values.get("request_batch", 1.0) for record in series.measuring(LATENCY)}


def _prompts(series: Series) -> Cell:
    batch = max(_batches(series))
    return Cell(text=f"{batch:.0f}", value=batch)


def _mark(name: str, series: Series, metric: str) -> Mark | None:
    found = series.estimate(metric)
    if found is None or found.value is None:
        return None
    return Mark(name=name, value=found.value, low=found.low, high=found.high)


def _on_it(spot: Spot) -> str:
    return "yes" if spot.best else "no"


def _written(mark: Mark, axis: Axis) -> Cell:
    return value_cell(mark.value, mark.low, mark.high, axis.unit)
