"""Describes the runs of a folder: the state, verdict and size of each, and the history of a metric.

A history has the levels of each line in a table, its breaks and its level changes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorameter.machine.provenance import MAIN_LIBRARIES
from lorameter.records.units import first_few, format_count, format_percent, format_value
from lorameter.report.blocks import (
    Axis,
    Block,
    Cell,
    Change,
    Chart,
    ColumnHeader,
    Curve,
    Document,
    Figure,
    Line,
    Point,
    Row,
    Span,
    Table,
    list_sections,
    name_columns,
    to_line,
    to_lines,
    value_cell,
    write_number,
    write_row,
    write_value,
)
from lorameter.report.phrases import metric_title
from lorameter.results.history import Break, History, HistorySeries, Moment, Suspicion, Track
from lorameter.stats.changes import MIN_POINTS
from lorameter.verdicts.compare import Difference

_LEVELS = (*name_columns("from", "to", "runs", "level", left=2), ColumnHeader(text="with"))
_RUNS = (
    *name_columns("when", "run", "value", left=2),
    ColumnHeader(text="replicates", right=True, drop_priority=1),
    ColumnHeader(text="commit"),
    ColumnHeader(text="versions", drop_priority=2),
    ColumnHeader(text="fingerprint", drop_priority=3),
)
COMMIT = "git.commit"
_MINUTE = "%Y-%m-%d %H:%M"
MAX_DIFFERENCES, MAX_REASONS = 4, 2
"""Maximum differences that are listed, and reasons for runs that are left out."""


def describe_history(history: History, *, every_run: bool = False) -> Document:
    """All tracks; `every_run` adds a table with a row for each run."""
    return (
        *(block for track in history.tracks for block in _track(track, every_run=every_run)),
        *list_sections({"Not read": [f"{name}: {why}" for name, why in history.unreadable.items()]}),
    )


def _track(track: Track, *, every_run: bool) -> Iterator[Block]:
    title = f"{metric_title(track.metric)} of {track.variant}, study {track.study}"
    yield Table(title=title, heads=_LEVELS, rows=tuple(_levels(track)))
    for change in track.breaks:
        yield from _break(change)
    for line in track.lines:
        for suspicion in line.suspicions:
            yield from _suspicion(suspicion, track)
        yield _conclusion(line)
    if every_run:
        yield tabulate_runs(track)


def tabulate_runs(track: Track) -> Table:
    """A row for each run, and below it the reasons why runs do not count."""
    rows = tuple(_run(one, line, track) for line in track.lines for one in line.moments)
    moments = [one for line in track.lines for one in line.moments if one.why_not is not None]
    return Table(heads=_RUNS, rows=rows, notes=to_lines(f"{one.run} does not count: {one.why_not}" for one in moments))


def _levels(track: Track) -> Iterator[Row]:
    for line in track.lines:
        rows = [
            write_row(
                _when(plateau.first),
                _when(plateau.last),
                str(plateau.runs),
                value_cell(plateau.value, plateau.low, plateau.high, track.unit),
                f"{_versions(plateau.last)}; "
                f"{'..'.join(dict.fromkeys((_commit(plateau.first), _commit(plateau.last))))}; {line.fingerprint}",
            )
            for plateau in line.plateaus
        ]
        *others, last = rows or [write_row("", "", "0", "–", "no run counts")]
        yield from others
        yield dataclasses.replace(last, ends_group=line is not track.lines[-1])


def _break(change: Break) -> Iterator[Line]:
    where = f"{_when(change.after)}, run {change.after.run}: "
    yield to_line(
        Span(text="known break ", tone="odd"), where, first_few(_list_differences(change.differing), MAX_DIFFERENCES)
    )
    if change.confirm:
        yield to_line("  its effect is measured by: ", Span(text=change.confirm, tone="command"))


def _suspicion(suspicion: Suspicion, track: Track) -> Iterator[Line]:
    ratio, low, high = (100 * (end - 1) for end in (suspicion.ratio, suspicion.low, suspicion.high))
    levels = " → ".join(format_value(level, track.unit) for level in (suspicion.level_before, suspicion.level_after))
    yield to_line(
        Span(
            text=f"{suspicion.direction} from {_when(suspicion.after)} on, ",
            tone="bad" if suspicion.ratio > 1 else "good",
        ),
        f"run {suspicion.after.run}: by {ratio:+.1f} % [{low:+.1f}, {high:+.1f}], {levels}; "
        f"last before: {_when(suspicion.before)}, run {suspicion.before.run}. Changed between: ",
        first_few(_list_differences(suspicion.differing), MAX_DIFFERENCES) or "nothing that is known",
    )
    if suspicion.confirm:
        yield to_line("  a suspicion; it is confirmed by: ", Span(text=suspicion.confirm, tone="command"))
    else:
        yield to_line("  a suspicion without a known cause: measure once more.")


def _conclusion(line: HistorySeries) -> Line:
    """The number of changes found, and the smallest detectable change: "no change" is meaningless without it."""
    counting, left_out = len(line.counting), [one.why_not for one in line.moments if one.why_not is not None]
    reasons = first_few(list(dict.fromkeys(left_out)), MAX_REASONS, "; ")
    gaps = f"; {format_count(len(left_out), 'run')} left out ({reasons})" if left_out else ""
    if line.scatter is None or line.detectable is None:
        return to_line(
            Span(text=f"fingerprint {line.fingerprint}: ", tone="faint"),
            f"{format_count(counting, 'counted run')}; changes are looked for from {MIN_POINTS} on{gaps}",
        )
    found = f"{format_count(len(line.suspicions), 'change')} suspected" if line.suspicions else "no change found"
    return to_line(
        Span(text=f"fingerprint {line.fingerprint}: ", tone="faint"),
        f"{found}; runs scatter by {format_percent(line.scatter)} around their level, and only a change of "
        f"{format_percent(line.detectable)} would be seen within three more with 80 % power{gaps}",
    )


def _run(moment: Moment, line: HistorySeries, track: Track) -> Row:
    value = value_cell(moment.value, moment.low, moment.high, track.unit)
    if moment.why_not is not None:
        value = dataclasses.replace(value, interval="", detail="not counted")
    return write_row(
        Cell(text=_when(moment, _MINUTE), value=moment.created_unix_s), moment.run, value,
        write_number(moment.replicates), _commit(moment), _versions(moment),
        line.fingerprint,
    )  # fmt: skip


def _when(moment: Moment, form: str = "%Y-%m-%d") -> str:
    """The start of a run in local time."""
    return time.strftime(form, time.localtime(moment.created_unix_s))


def _list_differences(differing: Sequence[Difference]) -> list[str]:
    """The differences, with commits first and as a range."""
    commits = [f"commits {str(one.base)[:10]}..{str(one.candidate)[:10]}" for one in differing if one.field == COMMIT]
    others = [one for one in differing if one.field != COMMIT]
    return commits + [f"{one.field.removeprefix('libraries.')} {one.base} → {one.candidate}" for one in others]


def _versions(moment: Moment) -> str:
    versions = [f"{name} {version}" for name in MAIN_LIBRARIES if (version := moment.versions.get(name))]
    return ", ".join(versions) or "no versions known"


def _commit(moment: Moment) -> str:
    return f"{moment.commit[:10]}{'+' if moment.dirty else ''}" if moment.commit else "no commit"


def draw_history_figures(history: History) -> tuple[Figure, ...]:
    """A figure for each track with a run that counts."""
    return tuple(_figure(track) for track in history.tracks if any(line.counting for line in track.lines))


def list_curve_names(history: History) -> tuple[str, ...]:
    """The names of the curves, in order."""
    return tuple(dict.fromkeys(_curve_name(line) for track in history.tracks for line in track.lines))


def _curve_name(line: HistorySeries) -> str:
    return f"fingerprint {line.fingerprint[:8]}, variant {line.variant_id[:8]}"


def _figure(track: Track) -> Figure:
    title = metric_title(track.metric)
    first = min((moment for line in track.lines for moment in line.moments), key=lambda one: one.created_unix_s)

    def day(moment: Moment) -> float:
        return (moment.created_unix_s - first.created_unix_s) / 86_400.0

    suspicions = (
        Change(
            at=day(one.after), text=f"{100 * (one.ratio - 1):+.1f} % at {_commit(one.after)}",
            tone="bad" if one.ratio > 1 else "good",
        )
        for line in track.lines
        for one in line.suspicions
    )  # fmt: skip
    breaks = (
        Change(at=day(one.after), text=first_few(_list_differences(one.differing), 1), tone="odd")
        for one in track.breaks
    )
    curves = (
        Curve(
            name=_curve_name(line),
            points=tuple(
                Point(
                    x=day(one),
                    y=one.value,
                    y_interval=None if one.low is None or one.high is None else (one.low, one.high),
                )
                for one in line.counting
            ),
        )
        for line in track.lines
        if line.counting
    )
    return Figure(
        title=f"{title} of {track.variant}, study {track.study}",
        caption=f"A curve for each fingerprint, from {_when(first, _MINUTE)} on, with the interval of each run; where "
        "another begins, machine or software changed, and the two are not compared. What does not "
        "count is in the table only.",
        drawing=Chart(
            across=Axis(title="days since the first run"),
            up=Axis(title=title, unit=track.unit),
            curves=tuple(curves),
            changes=(*suspicions, *breaks),
        ),
        table=tabulate_runs(track),
    )


def describe_runs(rows: Sequence[Mapping[str, Any]]) -> Document:
    """A row for each run, and below the table the reasons for unreadable runs.

    Args:
        rows: the rows of `lorameter list runs --json`.
    """
    damaged = [f"{row['run']}: {row['title']}" for row in rows if row["status"] == "damaged"]
    table = Table(heads=name_columns("run", "study", "state", "verdict", "size", left=4), rows=tuple(map(_row, rows)))
    return (table, *list_sections({"Not read": damaged}))


def _row(row: Mapping[str, Any]) -> Row:
    size = write_value(row["size_bytes"], "byte")
    if row["status"] == "damaged":
        return write_row(row["run"], "", "damaged", "", size)
    ok, planned = row["trials"].get("ok", 0), sum(row["trials"].values())
    short = "" if ok == planned else f", {ok or 'none'} of {planned} trials ok"
    verdict = Cell(verdict=row["verdict"], detail="baseline" if row["baseline"] else "")
    return write_row(row["run"], row["study"], f"{row['status']}{short}", verdict, size)
