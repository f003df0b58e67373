"""Reports as a page: complete without scripts, closed to the world, escaped, drawn as their tables say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.records import store
from harness.report.curves import Axis, Curve, Curves
from harness.report.figure import Bar, Bars, Front, Intervals, Mark, Part, Samples, Spot, Stretch
from harness.report.figures import figures_of_run
from harness.report.front import TwoMeasures
from harness.report.html.page import write_html
from harness.report.html.pictures import MOST_DOTS, draw
from harness.report.html.raster import COLOURS
from harness.report.html.scale import TICKS, scale_for
from harness.report.html.svg import WIDTH
from harness.report.run import describe_run
from harness.report.table import Table, name_columns, say, write_row
from harness.report.view import Asked, view_of

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path for path in (ROOT / "reports").iterdir() if (path / "trials.jsonl").is_file())
HOSTILE = "</title><script>alert(1)</script>&\"'\x1b[31m\u202ex"
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """What a page consists of."""

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
    return run, view, figures, write_html(describe_run(view), title=view.title, names=view.variants, figures=figures)


@pytest.fixture(scope="module", params=COMMITTED, ids=lambda path: path.name.rpartition("_")[2])
def committed(request):
    return page_of(request.param)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_report_is_a_page_that_says_all_its_words(every_report):
    """Whatever the terminal says: each cell, line and title is on the page."""
    for name, document in every_report.items():
        shown = " ".join("".join(Page(write_html(document, title=name)).words).split())
        for block in document:
            if isinstance(block, Table):
                texts = [part for row in block.rows for cell in row.cells for part in (cell.text, cell.interval)]
                for text in texts:
                    assert " ".join(text.split()) in shown, (name, text)


def test_nothing_is_loaded_from_elsewhere(committed):
    """No address but those of the page itself and of pictures inside it; no style and no handler in an attribute."""
    found = Page(committed[3]).attributes
    for tag, name, value in found:
        assert name != "style", tag
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "data", "srcset", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(Page(committed[3]).tags)


def test_the_policy_allows_the_page_and_nothing_else(committed):
    """The hashes are those of its one style sheet and its one script."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', committed[3])[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", committed[3], re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not re.search("unsafe|http", policy)


def test_links_lead_somewhere_and_ids_are_of_one(committed):
    """The list of figures at the top can be followed."""
    page = Page(committed[3])
    assert len(page.ids) == len(set(page.ids))
    links = [value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert links
    assert set(links) <= set(page.ids)


def test_a_committed_run_fits_into_half_a_megabyte(committed):
    """It is sent by mail and kept on a branch."""
    assert len(committed[3].encode()) < 500_000


def test_texts_from_outside_are_texts():
    """In titles, cells, names of variants, figures and the command at the end; none is markup and none acts."""
    mark = Mark(name=HOSTILE, value=1.0, low=0.9, high=1.1, verdict="equivalent")
    axis = Axis(title=HOSTILE, line_at=1.0)
    drawings = (
        Intervals(axis=axis, marks=(mark,)),
        Curves(across=axis, up=axis, curves=(Curve(name=HOSTILE, points=((1.0, 2.0), (2.0, 3.0))),) * 2),
        Bars(axis=Axis(title=HOSTILE), bars=(Bar(name=HOSTILE, parts=(Part(kind=HOSTILE, value=1.0),)),)),
        Front(across=axis, up=axis, spots=(Spot(name=HOSTILE, across=mark, up=mark, best=True),) * 2),
        Samples(across=axis, up=axis, stretches=(Stretch(name=HOSTILE, began_s=0, ended_s=1, samples=(1.0,)),)),
    )
    pictures = "".join(draw(one, HOSTILE, HOSTILE, {HOSTILE: 0}) for one in drawings)
    table = Table(title=HOSTILE, heads=name_columns(HOSTILE, HOSTILE), rows=(write_row(HOSTILE, HOSTILE),))
    page = write_html((say(HOSTILE), table), title=HOSTILE, names=[HOSTILE, "b"], again=HOSTILE) + pictures
    assert page.count("alert(1)") > 20
    assert Page(page).tags.count("script") == 1
    assert not set("\x1b\u202e") & set(page)


# --- its figures ------------------------------------------------------------------------------------------------------


def test_a_figure_of_each_kind_is_there(committed):
    """The study that began the project, and the default one: ratios, losses, memory, cost, samples, checks."""
    titles = [figure.title for figure in committed[2]]
    for word in ("ratios to", "Losses", "Memory", "Loss against cost", "Every step", "Checks"):
        assert any(word in title for title in titles), (word, titles)


def test_the_numbers_of_ratios_are_those_of_the_report(committed):
    """No figure computes a verdict or a ratio of its own."""
    shown = {(row.name, row.ratio.ratio, row.ratio.low, row.ratio.high)
             for table in committed[1].tables for row in table.rows if row.ratio is not None}  # fmt: skip
    ratios = [figure.drawing for figure in committed[2] if isinstance(figure.drawing, Intervals)]
    drawn = {(mark.name, mark.value, mark.low, mark.high) for drawing in ratios for mark in drawing.marks}
    assert drawn
    assert drawn <= shown


def test_every_picture_has_its_numbers_in_a_table(committed):
    """A row for each thing that is drawn."""
    for figure in committed[2]:
        drawing, table = figure.drawing, figure.table
        if isinstance(drawing, Intervals):
            assert [row.cells[0].text for row in table.rows] == [mark.name for mark in drawing.marks]
        elif isinstance(drawing, Samples):
            assert len(table.rows) == len(drawing.stretches)
        elif isinstance(drawing, Bars):
            totals = [row.cells[-1].value for row in table.rows]
            assert totals == pytest.approx([sum(part.value for part in bar.parts) for bar in drawing.bars])
        elif isinstance(drawing, Front):
            assert [row.cells[0].text for row in table.rows] == [spot.name for spot in drawing.spots]
        elif isinstance(drawing, Curves):
            assert {row.cells[0].text for row in table.rows} == {curve.name for curve in drawing.curves}


def test_losses_are_those_of_the_charts():
    """One curve of a variant wherever it is drawn: the median of the replicates."""
    runs = ROOT / "tests" / "golden" / "runs"
    run = store.read_run("swept", runs)
    view = view_of(run)
    (losses,) = [one.drawing for one in figures_of_run(run, view) if one.title == "Losses of all variants"]
    charts = {chart.across.title: chart for gallery in view.tables[0].galleries for chart in gallery.charts}
    both = [(curve, charts[curve.name]) for curve in losses.curves if curve.name in charts]
    assert both
    for curve, chart in both:
        assert curve.points == chart.curves[0].points
        assert all(low <= y <= high for (_, y), (_, low, high) in zip(curve.points, curve.band, strict=True))


def test_the_stack_of_memory_ends_at_the_peak(committed):
    """Its pieces do not overlap: all of them together are what was measured."""
    run, _, figures, _ = committed
    (bars,) = [one.drawing.bars for one in figures if one.title == "Memory of training"]
    for bar in bars:
        peaks = sorted(
            record.memory["host_peak_train_bytes"]
            for record in run.records
            if (record.name, record.role) == (bar.name, "variant") and "host_peak_train_bytes" in record.memory
        )
        assert peaks[0] <= sum(part.value for part in bar.parts) <= peaks[-1]


@pytest.mark.parametrize(
    ("asked", "titles"),
    [
        (Asked(variants=("qlora-nf4-r16",), metrics=("step_time_s",)), ["Training: step time: ratios to lora-r16"]),
        (
            Asked(variants=("qlora-nf4-r16",), phases=("generate",)),
            ["Warm generation: ratios to lora-r16", "Checks of the paths that ran"],
        ),
    ],
)
def test_a_figure_shows_what_was_asked_for(asked, titles):
    """None of a phase or a metric that the tables leave out."""
    (path,) = [path for path in COMMITTED if path.name.endswith("lora-or-qlora")]
    run = store.read_run(str(path), path.parent)
    assert [figure.title for figure in figures_of_run(run, view_of(run, asked))] == titles


def test_variants_that_were_not_asked_for_are_nowhere_on_a_page(tmp_path):
    """Neither in a picture nor in its numbers; what the run claims and how it is repeated names all."""
    (path,) = [path for path in COMMITTED if path.name.endswith("lora-or-qlora")]
    assert main(["report", str(path), "--variant", "qlora-nf4-r16", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    drawn = re.findall('data-variant="([^"]*)"', page)
    assert set(drawn) == {"lora-r16", "qlora-nf4-r16"}
    run = store.read_run(str(path), path.parent)
    figures = figures_of_run(run, view_of(run, Asked(variants=("qlora-nf4-r16",))))
    cells = {cell.line for figure in figures if figure.table for row in figure.table.rows for cell in row.cells}
    assert len(figures) == 9
    assert not cells & {"qlora-nf4-r64-a16", "qlora-nf4-r64-a256"}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=8))
def test_the_front_holds_what_nothing_beats(points):
    """Against the definition, one by one: of losses less is better, of tokens a second more."""
    marks = {str(n): (Mark(name=str(n), value=x), Mark(name=str(n), value=y)) for n, (x, y) in enumerate(points)}
    for metric, sign in (("held_out_loss", 1), ("output_tokens_per_s", -1)):
        spots = TwoMeasures(across="time_per_output_token_s", up=metric, marks=marks).spots
        for (x, y), spot in zip(points, spots, strict=True):
            assert spot.best == (not any(u <= x and sign * (v - y) <= 0 and (u, v) != (x, y) for u, v in points))
        assert any(spot.best for spot in spots)


# --- its pictures -----------------------------------------------------------------------------------------------------


def elements(svg, tag):
    return list(ElementTree.fromstring(svg).iter(SVG + tag))


def test_a_mark_is_where_its_value_is():
    """In order, with 1 between what is below and what is above, and its interval around it."""
    marks = [Mark(name=str(value), value=value, low=value - 0.05, high=value + 0.05) for value in (0.8, 1.0, 1.3)]
    svg = draw(Intervals(axis=Axis(title="ratio", line_at=1.0), marks=tuple(marks)), "t", "s", {})
    dots = [float(dot.get("cx")) for dot in elements(svg, "circle")]
    (one,) = [float(line.get("x1")) for line in elements(svg, "line") if line.get("class") == "one"]
    assert dots[0] < dots[1] == one < dots[2] < WIDTH
    assert (dots[2] - dots[1]) / (dots[1] - dots[0]) == pytest.approx(1.5, abs=0.01)
    whiskers = [line for line in elements(svg, "line") if line.get("class") == "whisker"]
    assert len(whiskers) == 9
    assert float(whiskers[0].get("x1")) < dots[0] < float(whiskers[0].get("x2"))


def test_what_has_no_interval_has_no_whisker():
    """One replicate: a hollow dot, which is told as such."""
    svg = draw(Intervals(axis=Axis(title="ratio"), marks=(Mark(name="a", value=2.0),)), "t", "s", {})
    assert [dot.get("class") for dot in elements(svg, "circle")] == ["hollow"]
    assert not [line for line in elements(svg, "line") if line.get("class") == "whisker"]
    assert "no interval" in svg


def test_pieces_of_a_bar_follow_each_other():
    """Their widths are as their values, from zero on."""
    bar = Bar(name="a", parts=(Part(kind="x", value=1.0), Part(kind="y", value=3.0)))
    svg = draw(Bars(axis=Axis(title="time", unit="s"), bars=(bar,)), "t", "s", {})
    first, second = [piece for piece in elements(svg, "rect") if piece.get("height") == "16.0"]
    assert float(second.get("x")) == pytest.approx(float(first.get("x")) + float(first.get("width")), abs=0.2)
    assert float(second.get("width")) == pytest.approx(3 * float(first.get("width")), abs=0.3)


def decoded(png):
    """The plane of an indexed PNG without filters, and its palette."""
    at, kinds, data = 8, {}, b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        kinds[kind] = body
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height = struct.unpack(">II", kinds[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], kinds[b"PLTE"]


def test_very_many_samples_are_a_picture_with_each_in_its_place():
    """A slow half after a fast one; both in the colour of their variant, at the height of their value."""
    half = MOST_DOTS
    stretches = (
        Stretch(name="a", began_s=0.0, ended_s=1.0, samples=(1.0,) * half),
        Stretch(name="b", began_s=1.0, ended_s=2.0, samples=(3.0,) * half),
    )
    svg = draw(
        Samples(across=Axis(title="time", unit="s"), up=Axis(title="step", unit="s"), stretches=stretches), "t", "s",
        {"a": 0, "b": 1},
    )  # fmt: skip
    assert len(svg) < 50_000
    (image,) = elements(svg, "image")
    plane, palette = decoded(base64.b64decode(image.get("href").partition(",")[2]))
    assert palette[3:6].hex() == COLOURS[0]
    (low, left), (high, right) = (np.argwhere(plane == colour).mean(axis=0) for colour in (1, 2))
    assert low > plane.shape[0] / 2 > high, "what takes longer is drawn higher"
    assert left < plane.shape[1] / 2 < right


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e6), st.sampled_from(["s", "byte", "1/s", "1"]))
def test_ticks_are_round_few_and_inside(low, factor, unit):
    """Whatever is measured, in whatever unit."""
    scale = scale_for(Axis(title="t", unit=unit), [low, low * factor], 0.0, 100.0)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 2 * TICKS + 2
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(-1e-6 <= scale.place(value) <= 100 + 1e-6 for value, _ in ticks)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["report {}", "compare {} {}", "gate {} {}"])
def test_commands_write_a_page(line, write_run, tmp_path, capsys):
    """Beside what they print, with the exit code of what they found."""
    path, page = write_run("r", {"plain": [1.0] * 5, "nf4": [1.1] * 5}), tmp_path / "page.html"
    words = [word.replace("{}", str(path)) for word in line.split()]
    without = main([*words, "--runs-dir", str(path.parent)])
    printed = capsys.readouterr().out
    assert main([*words, "--runs-dir", str(path.parent), "--html", str(page)]) == without
    out, errors = capsys.readouterr()
    assert out == printed
    assert str(page) in errors
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_claims_are_a_page(tmp_path, capsys):
    """Of the study that this project began with."""
    (path,) = [path for path in COMMITTED if "llama2" in path.name]
    assert main(["claims", str(path), "--html", str(tmp_path / "page.html")]) == 0
    said = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "refuted" in capsys.readouterr().out
    assert "refuted" in said


def test_a_history_is_a_page(tmp_path, capsys):
    """A curve for each fingerprint, and a row for each run, whether it counts or not."""
    shutil.copytree(ROOT / "tests" / "golden" / "runs", tmp_path / "runs")
    page = tmp_path / "page.html"
    line = ["history", "--study", "lora-or-qlora", "--variant", "qlora-nf4-r16", "--runs-dir", str(tmp_path / "runs")]
    assert main([*line, "--html", str(page), "--json"]) == 0
    (track,) = json.loads(capsys.readouterr().out)["tracks"]
    said = page.read_text(encoding="utf-8")
    for one in track["lines"]:
        assert f"fingerprint {one['fingerprint'][:8]}" in said
        for moment in one["moments"]:
            assert moment["run"] in said
    assert said.count('class="curve"') >= len([one for one in track["lines"] if any(
        moment["why_not"] is None for moment in one["moments"])])  # fmt: skip


@pytest.mark.parametrize(
    "line", ["report {}", "ab training-step --base HEAD --candidate HEAD", "profile lora-or-qlora:lora-r16"]
)
def test_a_page_that_cannot_be_written_is_refused_first(line, write_run, tmp_path, capsys):
    """Before anything is measured; the file is named."""
    path = write_run("r", {"plain": [1.0] * 5})
    words = [word.replace("{}", str(path)) for word in line.split()]
    assert main([*words, "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "page.html" in capsys.readouterr().err
