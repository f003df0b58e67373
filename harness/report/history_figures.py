"""The figures of a history: each number over time, a curve for each line of runs that may be compared."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from harness.records.metrics import METRICS
from harness.report.figure import Axis, Curve, Curves, Figure
from harness.report.table import Cell, Row, Table, name_columns, write_row, write_value
from harness.results.history import History, Line, Track

_DAY_S = 86_400.0
_UNCOUNTED = "does not count: "


def figures_of_history(history: History) -> tuple[Figure, ...]:
    """A figure a track that has a run which counts."""
    return tuple(_figure(track) for track in history.tracks if any(line.counting for line in track.lines))


def names_of(history: History) -> tuple[str, ...]:
    """What the curves are called, in their order."""
    return tuple(dict.fromkeys(_name(line) for track in history.tracks for line in track.lines))


def _figure(track: Track) -> Figure:
    known = METRICS.get(track.metric)
    title, unit = (known.title, known.unit) if known is not None else (track.metric, "1")
    first = min(moment.created_unix_s for line in track.lines for moment in line.moments)
    curves = tuple(
        Curve(
            name=_name(line),
            points=tuple(((one.created_unix_s - first) / _DAY_S, one.value) for one in line.counting),
            band=tuple(
                ((one.created_unix_s - first) / _DAY_S, one.low, one.high)
                for one in line.counting
                if one.low is not None and one.high is not None
            ),
        )
        for line in track.lines
        if line.counting
    )
    return Figure(
        title=f"{title} of {track.variant}, study {track.study}",
        says=f"A curve for each fingerprint, from {_day(first)} on, with the interval of each run; where another "
        "begins, machine or software changed, and the two are not compared. What does not count is in the table only.",
        drawing=Curves(across=Axis(title="days since the first run"), up=Axis(title=title, unit=unit), curves=curves),
        table=Table(
            heads=name_columns("when", "run", "fingerprint", "value", "replicates", "commit", left=3),
            rows=tuple(_rows(track)),
        ),
    )


def _rows(track: Track) -> Iterator[Row]:
    unit = METRICS[track.metric].unit if track.metric in METRICS else "1"
    for line in track.lines:
        for one in line.moments:
            value = write_value(one.value, one.low, one.high, unit)
            counted = one.run if one.why_not is None else f"{one.run} ({_UNCOUNTED}{one.why_not})"
            commit = (one.commit or "–")[:10] + ("+" if one.dirty else "")
            yield write_row(
                Cell(text=_day(one.created_unix_s), value=one.created_unix_s), counted, line.fingerprint, value,
                Cell(text=str(one.replicates), value=one.replicates), commit,
            )  # fmt: skip


def _name(line: Line) -> str:
    return f"fingerprint {line.fingerprint[:8]}, variant {line.variant_id[:8]}"


def _day(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M")
