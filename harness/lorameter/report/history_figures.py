"""The figures of a history: each number over time, a curve for each line of runs that may be compared."""

from __future__ import annotations

from lorameter.report.curves import Axis, Curve, Curves
from lorameter.report.figure import Figure
from lorameter.report.history import table_of_runs, unit_of, write_time
from lorameter.report.phrases import title_of
from lorameter.results.history import History, HistorySeries, Track

_DAY_S = 86_400.0


def figures_of_history(history: History) -> tuple[Figure, ...]:
    """A figure a track that has a run which counts."""
    return tuple(_figure(track) for track in history.tracks if any(line.counting for line in track.lines))


def names_of(history: History) -> tuple[str, ...]:
    """What the curves are called, in their order."""
    return tuple(dict.fromkeys(_name(line) for track in history.tracks for line in track.lines))


def _figure(track: Track) -> Figure:
    title = title_of(track.metric)
    first = min((moment for line in track.lines for moment in line.moments), key=lambda one: one.created_unix_s)
    curves = tuple(
        Curve(
            name=_name(line),
            points=tuple(((one.created_unix_s - first.created_unix_s) / _DAY_S, one.value) for one in line.counting),
            band=tuple(
                ((one.created_unix_s - first.created_unix_s) / _DAY_S, one.low, one.high)
                for one in line.counting
                if one.low is not None and one.high is not None
            ),
        )
        for line in track.lines
        if line.counting
    )
    return Figure(
        title=f"{title} of {track.variant}, study {track.study}",
        says=f"A curve for each fingerprint, from {write_time(first)} on, with the interval of each run; where another "
        "begins, machine or software changed, and the two are not compared. What does not count is in the table only.",
        drawing=Curves(
            across=Axis(title="days since the first run"), up=Axis(title=title, unit=unit_of(track)), curves=curves
        ),
        table=table_of_runs(track),
    )


def _name(line: HistorySeries) -> str:
    return f"fingerprint {line.fingerprint[:8]}, variant {line.variant_id[:8]}"
