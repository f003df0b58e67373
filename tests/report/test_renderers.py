"""A new renderer is one new file: one is written here, and it says all that the terminal says, of every report."""

from __future__ import annotations

import ast
import csv
import dataclasses
import html
import io
from html.parser import HTMLParser
from pathlib import Path

from harness.report.table import Fold, Gallery, Line, Panel, Section, Table, tone_of
from harness.report.terminal import text_of
from kernels_check.visible import make_visible


def as_html(document):
    """A whole renderer: every block, every tone, and the numbers behind the text."""
    return "\n".join(f"<div>{_block(block)}</div>" for block in document)


def _block(block):
    if isinstance(block, Line):
        return _line(block)
    if isinstance(block, Section):
        return f"<h2>{_text(block.title)}</h2>{_text(block.beside)}" + "".join(map(_line, block.lines))
    if isinstance(block, Fold):
        lines = "".join(map(_line, block.lines))
        return f"<details><summary>{_line(block.summary)}</summary>{lines}</details>"
    if isinstance(block, Gallery):
        return f"<h3>{_text(block.title)}</h3>" + "".join(map(_chart, block.charts))
    if isinstance(block, Panel):
        return f"<h3>{_text(block.title)}</h3>" + "".join(
            f"<h4>{_text(one.head)}</h4><pre>{_text(one.text)}</pre>" for one in block.passages
        )
    heads = "".join(f"<th>{_text(head.text)}</th>" for head in block.heads)
    rows = "".join(f"<tr>{''.join(map(_cell, row.cells))}</tr>" for row in block.rows)
    notes = "".join(map(_line, block.notes))
    return f"<table><caption>{_text(block.title)}</caption><tr>{heads}</tr>{rows}</table>{notes}"


def _line(line):
    spans = "".join(f'<span class="{span.tone}">{_text(span.text)}</span>' for span in line.spans)
    return f"<p><b>{_text(line.lead)}</b> {spans}</p>"


def _chart(chart):
    """A curve with its whiskers, from the numbers alone."""
    dots = "".join(f'<circle cx="{x!r}" cy="{y!r}"/>' for curve in chart.curves for x, y in curve.points)
    whiskers = "".join(
        f'<line x1="{x!r}" y1="{low!r}" y2="{high!r}"/>' for curve in chart.curves for x, low, high in curve.band
    )
    return f"<figure><svg>{dots}{whiskers}</svg><figcaption>{_text(chart.across.title)}</figcaption></figure>"


def _cell(cell):
    number = "" if cell.value is None else f' data-value="{cell.value!r}"'
    return f'<td class="{tone_of(cell.verdict)}"{number}>{_text(cell.words)}</td>'


def _text(text):
    return html.escape(make_visible(text))


def as_csv(document):
    """The tables as a spreadsheet reads them: numbers in base units where there are numbers."""
    out = io.StringIO()
    writer = csv.writer(out)
    for table in document:
        if isinstance(table, Table):
            writer.writerow([head.text for head in table.heads])
            writer.writerows(
                [cell.line if cell.value is None else cell.value for cell in row.cells] for row in table.rows
            )
    return out.getvalue()


class Words(HTMLParser):
    """The text between the tags."""

    def __init__(self):
        super().__init__()
        self.said = ""

    def handle_data(self, data):
        self.said += data


def letters(text):
    """The characters of a text that are neither space nor frame, sorted: order and layout are the renderer's own."""
    return sorted(one for one in text if not one.isspace() and not "─" <= one <= "╿")


def in_words(document):
    """The document without what a renderer draws in its own way: charts, ratios around 1, and what is repeated."""
    for block in document:
        if isinstance(block, Table):
            heads = tuple(dataclasses.replace(head, ratio=False) for head in block.heads)
            yield dataclasses.replace(block, heads=heads)
        elif isinstance(block, Fold):
            yield from block.lines
        elif isinstance(block, Section):
            lines = tuple(dataclasses.replace(line, last=False) for line in block.lines)
            yield dataclasses.replace(block, lines=lines, last=False)
        elif isinstance(block, Line):
            yield dataclasses.replace(block, last=False)
        elif not isinstance(block, Gallery):
            yield block


def test_another_renderer_says_all_that_the_terminal_says(every_report):
    """Character for character, of every report, from the document alone."""
    for name, document in every_report.items():
        said = tuple(in_words(document))
        page = Words()
        page.feed(as_html(said))
        assert letters(page.said) == letters(text_of(said, width=2000, coloured=False)), name


def test_another_renderer_draws_what_the_terminal_draws(every_report):
    """Charts from their numbers: a dot a point and a whisker an interval; what folds unfolds by itself."""
    page = as_html(every_report["swept run"])
    galleries = [block for block in every_report["swept run"] if isinstance(block, Gallery)]
    curves = [curve for gallery in galleries for chart in gallery.charts for curve in chart.curves]
    assert page.count("<circle") == sum(len(curve.points) for curve in curves) > 20
    assert page.count("<line") == sum(len(curve.band) for curve in curves) > 5
    assert "<details>" in page


def test_a_renderer_of_numbers_parses_no_text(every_report):
    """Each table of a run, a comparison and a profile gives numbers beside its words."""
    for name in ("run", "comparison", "claims", "profile", "estimate"):
        rows = list(csv.reader(io.StringIO(as_csv(every_report[name]))))
        assert any(cell.replace(".", "", 1).isdigit() for row in rows for cell in row[1:]), name


def test_every_module_of_reports_has_its_report_here(every_report):
    """Whatever makes a document is called for `every_report`; no document is empty, and every block there is occurs."""
    making = {
        node.name
        for path in (Path(__file__).parents[2] / "harness" / "report").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and isinstance(node.returns, ast.Name)
        and node.returns.id == "Document"
    }
    here = ast.parse((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(here) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert len(making) > 15
    assert making - {"describe_verdicts"} <= called  # it is the part of the claims that a run's report ends with
    assert all(every_report.values())
    found = {type(block) for document in every_report.values() for block in document}
    assert found == {Line, Section, Fold, Panel, Table, Gallery}
