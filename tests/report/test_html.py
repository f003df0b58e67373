"""Tests of HTML reports: complete without scripts, no external resources, escaped, and charts that agree with the
tables.

Tests of the charts of a phase: sweeps along each field with three levels, and losses by step, on common scales.

Tests of the parts of a report: values are formatted once, and foreign text is escaped in one place.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorameter.cli import main
from lorameter.records import store
from lorameter.report.blocks import (
    Axis,
    Bars,
    Cell,
    Chart,
    Curve,
    Figure,
    Intervals,
    Point,
    Table,
    name_columns,
    to_line,
    write_row,
)
from lorameter.report.figures import describe_charts, draw_run_figures
from lorameter.report.html.page import write_html
from lorameter.report.run_view import ReportFilter, make_run_view
from lorameter.terminal import escape_control_chars

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path for path in (ROOT / "reports").iterdir() if (path / "trials.jsonl").is_file())
HOSTILE = "</title><script>alert(1)</script>&\"'\x1b[31m\u202ex"


class Page(HTMLParser):
    """The parsed elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.words.append(data)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_and_nothing_else():
    """The hashes in the policy are those of the only style sheet and the only script."""
    page = write_html((to_line("text"),), title="title", names=["a", "b"])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not re.search("unsafe|http", policy)


def test_foreign_text_is_neither_markup_nor_executed():
    """Foreign text in titles, cells, variant names, figures and the final command is neither markup nor executed."""
    mark = Cell(name=HOSTILE, value=1.0, low=0.9, high=1.1, verdict="equivalent")
    axis = Axis(title=HOSTILE, line_at=1.0)
    curve = Curve(name=HOSTILE, points=(Point(x=1.0, y=2.0, y_interval=(1.5, 2.5)),))
    other = Curve(name=f"{HOSTILE} 2", points=(Point(x=2.0, y=3.0, x_interval=(1.5, 2.5)),), hollow=True)
    drawings = (
        Intervals(axis=axis, marks=(mark,)),
        Bars(axis=Axis(title=HOSTILE), bars={HOSTILE: {HOSTILE: 1.0}}),
        *(Chart(across=axis, up=axis, curves=(curve, other), style=style) for style in ("joined", "dots", "specks")),
    )
    figures = [Figure(title=HOSTILE, caption=HOSTILE, drawing=one, table=None) for one in drawings]
    table = Table(title=HOSTILE, heads=name_columns(HOSTILE, HOSTILE), rows=(write_row(HOSTILE, HOSTILE),))
    document = (to_line(HOSTILE), table)
    page = write_html(document, title=HOSTILE, names=[HOSTILE, "b"], figures=figures, reproduction=HOSTILE)
    assert page.count("alert(1)") > 20
    assert Page(page).tags.count("script") == 1
    assert not set("\x1b\u202e") & set(page)


# --- its figures ------------------------------------------------------------------------------------------------------


def test_charts_and_tables_show_only_the_selected_variants(tmp_path):
    """Charts and tables show the selected variants only; claims and reproduction steps name all."""
    (path,) = [path for path in COMMITTED if path.name.endswith("lora-or-qlora")]
    assert main(["report", str(path), "--variant", "qlora-nf4-r16", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    drawn = re.findall('data-variant="([^"]*)"', page)
    assert set(drawn) == {"lora-r16", "qlora-nf4-r16"}
    run = store.read_run(str(path), path.parent)
    figures = draw_run_figures(make_run_view(run, ReportFilter(variants=("qlora-nf4-r16",))))
    cells = {cell.line for figure in figures if figure.table for row in figure.table.rows for cell in row.cells}
    assert len(figures) == 11
    assert not cells & {"qlora-nf4-r64-a16", "qlora-nf4-r64-a256"}


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["report {}", "ab training-step --base HEAD --candidate HEAD"])
def test_a_page_that_cannot_be_written_is_refused_first(line, write_run, tmp_path, capsys):
    """The error names the file before anything is measured."""
    path = write_run("r", {"plain": [1.0] * 5})
    words = [word.replace("{}", str(path)) for word in line.split()]
    assert main([*words, "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "page.html" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "kept"), [("batch_size", True), ("sequence_length", False)])
def test_losses_of_other_workloads_are_in_no_comparing_chart(field, kept, write_run, small_study):
    """Losses of other workloads are drawn neither along the changed field nor against cost; times are."""
    value = getattr(small_study.workload, field)
    names = {"plain": value, "double": 2 * value, "triple": 3 * value}
    study = dataclasses.replace(
        small_study,
        variants=tuple(dataclasses.replace(small_study.variants[0], name=name) for name in names),
        workloads={name: {field: size} for name, size in names.items() if size != value},
    )

    def learnt(record):
        samples = {**record.samples, "held_out_loss": (names[record.name] / 10,)}
        return record.replaced(samples=samples, tokens={"real_tokens": 64, "padded_tokens": 0})

    steps = {"plain": [1.0, 1.1], "double": [1.2, 1.3], "triple": [1.4, 1.5]}
    path = write_run("own", steps, study=study, own_workloads=study.own_workloads, change=learnt)
    run = store.read_run(str(path), path.parent)
    view = make_run_view(run)
    swept = [gallery.title for gallery in describe_charts(view, view.tables[0]) if "along each field" in gallery.title]
    assert [title.partition(" ×")[0] for title in swept] == [
        "time per real token", *(["held-out loss, along each field"] if kept else []),
    ]  # fmt: skip
    assert ("Loss against cost" in [figure.title for figure in draw_run_figures(view)]) == kept


def test_a_truncated_training_is_in_no_median_of_a_step(write_run):
    """The median of a step uses the trials with the most steps; shorter trainings are left out."""

    def learnt(record):
        steps = 6 if record.replicate == 1 else 8
        losses = tuple(float(10 - step + 100 * (steps == 6)) for step in range(steps))
        values = record.values | {"training_steps": float(steps)}
        return record.replaced(samples=record.samples | {"timed_loss": losses}, values=values)

    path = write_run("cut", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}, change=learnt)
    run = store.read_run(str(path), path.parent)
    (losses,) = (figure for figure in draw_run_figures(make_run_view(run)) if figure.title.startswith("Losses"))
    points = losses.drawing.curves[0].points
    assert [(point.x, point.y) for point in points] == [(step, 11.0 - step) for step in range(1, 9)]
    assert [cell.text for cell in losses.table.rows[0].cells[1:3]] == ["2", "8"]


def test_terminal_control_characters_are_escaped():
    """Escape sequences, bells, erasing, reordering and unencodable characters are escaped; letters of all scripts
    stay."""
    for text, shown in (
        ("plain · ≥ é 😀 👩‍🔬", "plain · ≥ é 😀 👩‍🔬"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\a back\b nul\0 cr\r del\x7f", "bell\\x07 back\\x08 nul\\x00 cr\\x0d del\\x7f"),
        ("C1 \x9b31m \x85", "C1 \\x9b31m \\x85"),
        ("abc\u202egpj\u2066x\u2069", "abc\\u202egpj\\u2066x\\u2069"),
        ("half \udcff", "half \\udcff"),
    ):
        assert escape_control_chars(text) == shown


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_control_character(text):
    """For any input, the output can be encoded and has no effect on a terminal."""
    shown = escape_control_chars(text)
    assert not [one for one in shown if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cs")]
    shown.encode()
    assert escape_control_chars(shown) == shown
