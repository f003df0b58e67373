"""What a phase looks like: sweeps along each field that has three levels, and losses by step, each on one scale."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from harness.cli import main
from harness.records import store
from harness.report.charts import MOST_CURVES
from harness.report.curves import Axis, Curve, Curves
from harness.report.figures import figures_of_run
from harness.report.plots import HEIGHT, plot
from harness.report.table import Gallery
from harness.report.terminal import text_of
from harness.report.view import Asked, view_of

RUNS = Path(__file__).parents[1] / "golden" / "runs"


@pytest.fixture(scope="module")
def swept():
    """The galleries of the training of a run with two sweeps."""
    return view_of(store.read_run(str(RUNS / "swept"), RUNS)).tables[0].galleries


def test_each_field_that_is_swept_is_a_chart_of_ratios(swept):
    """A point a level in their order, the reference at 1 without a whisker, the others with their intervals."""
    ratios = swept[0]
    assert ratios.title == "step time × r64-a16-d0.1, along each field"
    curves = {chart.across.title: chart.curves[0] for chart in ratios.charts}
    assert [x for x, _ in curves["lora_alpha"].points] == [16, 32, 64, 256]
    assert [x for x, _ in curves["r"].points] == [16, 32, 64, 512]
    assert dict(curves["r"].points)[64] == 1.0
    assert 64 not in [x for x, _, _ in curves["r"].band]
    (_, last), (_, low, high) = curves["r"].points[-1], curves["r"].band[-1]
    assert low < last < high
    assert last == pytest.approx(1.30, abs=0.005)
    assert all(chart.across.log for chart in ratios.charts)


def test_charts_beside_each_other_share_a_scale(swept):
    """So that what hardly matters looks so."""
    for gallery in swept:
        assert len({chart.up.span for chart in gallery.charts}) == 1
        low, high = gallery.charts[0].up.span
        assert all(low <= end <= high for chart in gallery.charts for end in chart.curves[0].ends)


def test_losses_are_the_median_of_the_replicates_by_step(swept):
    """One curve a variant, from the first step to the last; as many as one can look at."""
    losses = swept[-1]
    assert losses.title == "loss by step, median of the replicates"
    assert [chart.across.title for chart in losses.charts][:2] == ["r64-a16-d0.1", "lora_alpha=32"]
    points = losses.charts[0].curves[0].points
    assert [x for x, _ in points] == list(range(1, len(points) + 1))
    assert points[0][1] > points[-1][1]
    assert len(losses.charts) <= MOST_CURVES


def test_a_variant_that_is_asked_for_is_the_one_that_is_drawn():
    """With the reference."""
    view = view_of(store.read_run(str(RUNS / "swept"), RUNS), Asked(variants=("r=512",)))
    (losses,) = view.tables[0].galleries
    assert [chart.across.title for chart in losses.charts] == ["r64-a16-d0.1", "r=512"]


@pytest.mark.parametrize(("field", "kept"), [("batch_size", True), ("sequence_length", False)])
def test_losses_of_other_tokens_are_in_no_picture_that_compares_them(field, kept, write_run, small_study):
    """Neither along the field that makes them so nor against cost, where one would beat another; times are."""
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
    view = view_of(run)
    swept = [gallery.title for gallery in view.tables[0].galleries if "along each field" in gallery.title]
    assert [title.partition(" ×")[0] for title in swept] == [
        "time per real token", *(["held-out loss, along each field"] if kept else []),
    ]  # fmt: skip
    assert ("Loss against cost" in [figure.title for figure in figures_of_run(run, view)]) == kept


def test_a_front_says_whose_losses_are_of_other_tokens(write_run, small_study):
    """They are left out, and the others are drawn."""
    names = ("plain", "half", "longer")
    study = dataclasses.replace(
        small_study,
        variants=tuple(
            dataclasses.replace(small_study.variants[0], name=name, r=2**at) for at, name in enumerate(names)
        ),
        workloads={"longer": {"sequence_length": 2 * small_study.workload.sequence_length}},
    )

    def learnt(record):
        samples = {**record.samples, "held_out_loss": (2.0,)}
        return record.replaced(samples=samples, tokens={"real_tokens": 64, "padded_tokens": 0})

    steps = {name: [1.0, 1.1] for name in names}
    path = write_run("apart", steps, study=study, own_workloads=study.own_workloads, change=learnt)
    run = store.read_run(str(path), path.parent)
    (front,) = [figure for figure in figures_of_run(run, view_of(run)) if figure.title == "Loss against cost"]
    assert [spot.name for spot in front.drawing.spots] == ["plain", "half"]
    assert front.says.endswith("Not drawn, since theirs are losses of other tokens: longer.")


def test_two_levels_are_no_curve():
    """A table says them; losses are drawn all the same."""
    galleries = view_of(store.read_run(str(RUNS / "sound"), RUNS)).tables[0].galleries
    assert [gallery.title for gallery in galleries] == ["loss by step, median of the replicates"]


POINTS = ((8.0, 1.0), (16.0, 1.1), (32.0, 1.4))
CHART = Curves(
    across=Axis(title="r", named=((8, "8"), (16, "16"), (32, "32")), log=True),
    up=Axis(title="ratio"),
    curves=(Curve(name="r", points=POINTS, band=((16.0, 1.05, 1.2), (32.0, 1.3, 1.5))),),
)


@pytest.mark.parametrize("width", [20, 38, 60])
def test_a_chart_is_as_wide_as_asked_and_names_its_ends(width):
    """A dot a point, every level by name, the least and the greatest value."""
    lines = plot(CHART, width)
    assert {len(line) for line in lines} == {width}
    assert len(lines) == HEIGHT
    text = "\n".join(lines)
    assert text.count("•") == 3
    assert lines[-1].split() == ["8", "16", "32"]
    assert "1.50" in lines[0] or "1.5" in lines[0]


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (-1.0, 0.0, 1.0), (1e-9, 2e-9, 3e-9), (1e12, 2e12, 3e12)])
def test_any_numbers_can_be_drawn(values):
    """Constant ones, negative ones, tiny and huge ones."""
    curve = Curve(name="t", points=tuple(enumerate(values)))
    assert len(plot(Curves(across=Axis(title="t"), up=Axis(title="v"), curves=(curve,)), 38)) == HEIGHT


def test_charts_stand_side_by_side_as_far_as_there_is_room():
    """One below the other at 60 columns, two at 80, three at 120."""
    gallery = Gallery(
        title="g", charts=tuple(dataclasses.replace(CHART, across=Axis(title=f"chart-{n}")) for n in range(3))
    )
    for width, beside in ((60, 1), (80, 2), (120, 3)):
        text = text_of((gallery,), width=width, coloured=False)
        assert max(line.count("chart-") for line in text.splitlines()) == beside


def test_a_terminal_without_utf_8_is_told(monkeypatch):
    """Braille would be escapes there."""
    import io

    from rich.console import Console

    from harness.report.terminal import show

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    show((Gallery(title="g", charts=(CHART,)),), Console(file=out, width=80))
    out.flush()
    assert b"charts are drawn where the terminal takes UTF-8" in out.buffer.getvalue()


@pytest.mark.parametrize(
    ("run", "replicates", "steps"),
    [("2026-11-24_amd-epyc-2cpu_llama2-lora-parameters", 6, 31), ("2026-11-25_amd-epyc-2cpu_lora-or-qlora", 3, 21)],
)
def test_losses_are_those_of_the_trials_that_trained_to_the_end(run, replicates, steps, tmp_path, capsys):
    """Solo trials take four steps and are in no curve: the page and the terminal show every step of the training."""
    page = tmp_path / "report.html"
    assert main(["report", str(RUNS.parents[2] / "reports" / run), "--html", str(page)]) == 0
    assert "loss by step, median of the replicates" in capsys.readouterr().out
    figure = page.read_text(encoding="utf-8").rpartition("Losses of all variants</h2>")[2].partition("</figure>")[0]
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">(.*?)</tr>", figure)
    told = [[float(cell) for cell in re.findall(r"<td[^>]*> ([\d.]+)</td>", row)] for row in rows]
    assert len(told) >= 4
    assert {(row[0], row[1]) for row in told} == {(replicates, steps)}
    assert all(last < first for *_, first, last in told)


def test_a_training_that_was_cut_short_is_in_no_median_of_a_step(write_run):
    """The median of a step is that of the trials that trained as many steps as any; what ended before is left out."""

    def learnt(record):
        steps = 6 if record.replicate == 1 else 8
        losses = tuple(float(10 - step + 100 * (steps == 6)) for step in range(steps))
        values = record.values | {"training_steps": float(steps)}
        return record.replaced(samples=record.samples | {"train_loss": losses}, values=values)

    path = write_run("cut", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}, change=learnt)
    run = store.read_run(str(path), path.parent)
    (losses,) = (figure for figure in figures_of_run(run, view_of(run)) if figure.title.startswith("Losses"))
    assert list(losses.drawing.curves[0].points) == [(step, 11.0 - step) for step in range(1, 9)]
    assert [cell.text for cell in losses.table.rows[0].cells[1:3]] == ["2", "8"]
