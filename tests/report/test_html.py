"""Tests of HTML reports: complete without scripts, no external resources, escaped, and charts that agree with the
tables."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.report.blocks import (
    Axis,
    Bars,
    Chart,
    Curve,
    Figure,
    Intervals,
    Mark,
    Point,
    Table,
    name_columns,
    say,
    write_row,
)
from lorameter.report.figures import figures_of_run
from lorameter.report.html.page import write_html
from lorameter.report.run import describe_run
from lorameter.report.run_view import ReportFilter, view_of

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


def page_of(path):
    run = store.read_run(str(path), path.parent)
    view = view_of(run)
    figures = figures_of_run(run, view)
    return (
        run,
        view,
        figures,
        write_html(describe_run(view), title=view.study.title, names=view.variants, figures=figures),
    )


@pytest.fixture(scope="module", params=COMMITTED, ids=lambda path: path.name.rpartition("_")[2])
def committed(request):
    return page_of(request.param)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_and_nothing_else(committed):
    """The hashes in the policy are those of the only style sheet and the only script."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', committed[3])[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", committed[3], re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not re.search("unsafe|http", policy)


def test_foreign_text_is_neither_markup_nor_executed():
    """Foreign text in titles, cells, variant names, figures and the final command is neither markup nor executed."""
    mark = Mark(name=HOSTILE, value=1.0, low=0.9, high=1.1, verdict="equivalent")
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
    page = write_html((say(HOSTILE), table), title=HOSTILE, names=[HOSTILE, "b"], figures=figures, again=HOSTILE)
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
    figures = figures_of_run(run, view_of(run, ReportFilter(variants=("qlora-nf4-r16",))))
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
