"""Writes a report as one HTML file: complete without scripts, offline, and without external resources.

The page's content security policy allows only its own style sheet, script and inline pictures, by their hashes. The
template engine escapes every text, and control characters are made visible before.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lorameter.records.fileio import replace_file
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.units import format_interval, format_value
from lorameter.report.blocks import (
    Block,
    Chart,
    Document,
    Figure,
    Intervals,
    Line,
    Section,
    Table,
    name_columns,
    ratio_axis_limit,
    value_cell,
    verdict_tone,
    write_number,
    write_row,
)
from lorameter.report.html import svg
from lorameter.terminal import escape_control_chars


def write_html(
    document: Document, *, title: str, names: Sequence[str] = (), figures: Sequence[Figure] = (), reproduction: str = ""
) -> str:
    """The page of a report.

    Args:
        document: the document, as for the terminal.
        title: title of the page.
        names: the variants in order, which determines their colours; the page can hide each of them.
        figures: pictures after the text, each with its table.
        reproduction: commands that reproduce the run; may be empty.
    """
    classes = {name: f"s s{number % svg.COLOURS}" for name, number in svg.number_variants(names).items()}
    blocks = list(document)
    first = blocks[0] if blocks else None
    invalid = blocks.pop(0) if isinstance(first, Line) and first.spans[0].tone == "alarm" else None
    head = blocks.pop(0) if blocks and isinstance(blocks[0], Section) and blocks[0].title == title else None
    style, script = _file("style.css"), _file("script.js")
    return _environment().get_template("page.html.jinja").render(
        title=title, invalid=invalid, head=head, document=blocks, figures=figures, reproduction=reproduction,
        top=sum(isinstance(figure.drawing, Intervals) for figure in figures) or len(figures[:1]),
        classes=classes, names=[(escape_control_chars(name), own) for name, own in classes.items()],
        style=Markup(style), style_hash=_hash(style), script=Markup(script), script_hash=_hash(script),
    )  # fmt: skip


def save_html(page: str, path: str | Path) -> Path:
    """Write the complete page or nothing. Raises `UsageError` or `InvalidRunError` if it cannot be written."""
    target = Path(path)
    with (
        translate_write_errors(f"--html {target}", "Name a file in an existing folder."),
        replace_file(target) as draft,
    ):
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def chart_table(chart: Chart) -> Table:
    """The points of a chart as a table."""
    rows = (
        write_row(write_number(point.x), value_cell(point.y, low, high, chart.up.unit))
        for curve in chart.curves
        for point in curve.points
        for low, high in [point.y_interval or (None, None)]
    )
    return Table(title=chart.across.title, heads=name_columns("at", "value", left=0), rows=tuple(rows))


def _scales(table: Table) -> list[svg.Scale | None]:
    """The scale of each column of ratios, and None for all other columns."""
    return [
        svg.ratio_scale(ratio_axis_limit([row.cells[place] for row in table.rows])) if head.ratio else None
        for place, head in enumerate(table.heads)
    ]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    environment.globals.update(
        verdict_tone=verdict_tone, chart_table=chart_table, format_interval=format_interval, format_value=format_value,
        kind=_kind, scales=_scales, svg=svg,
    )  # fmt: skip
    environment.filters["px"] = "{:.1f}".format
    environment.policies["truncate.leeway"] = 0
    return environment


def _kind(block: Block) -> str:
    return type(block).__name__


def _finalize(value: Any) -> Any:
    """Outside text with its control characters made visible; markup and other values unchanged."""
    return escape_control_chars(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
