"""Throughput against latency: shown where requests have different numbers of prompts, and only there."""

from __future__ import annotations

import dataclasses

import pytest

from harness.records import store
from harness.report.figures import figures_of_run
from harness.report.front import SERVING
from harness.report.html.pictures import draw
from harness.report.markdown import markdown_of
from harness.report.run import describe_run
from harness.report.view import view_of
from harness.studies.variant import Variant
from harness.studies.workload import Workload

SERVED = {"one": (1, 0.010), "eight": (8, 0.016), "slow": (8, 0.040)}
"""Prompts of a request, and seconds for a token of each."""


@pytest.fixture
def run(write_run, small_study):
    """A function that writes a run of three variants, with so many prompts a request."""

    def make(served):
        study = dataclasses.replace(
            small_study,
            variants=tuple(Variant(name=name, r=2**place) for place, name in enumerate(served)),
            reference="one",
            workload=Workload(prompt_tokens=8, new_tokens=4),
            workloads={name: {"request_batch": batch} for name, (batch, _) in served.items() if batch > 1},
        )

        def answered(record):
            batch, token = served[record.name]
            token *= 1 + 0.01 * record.replicate
            samples = record.samples | {
                "request_time_s": (4 * token,), "first_token_time_s": (token,), "time_per_output_token_s": (token,),
            }  # fmt: skip
            values = {"new_tokens": 4.0} | ({"request_batch": float(batch)} if batch > 1 else {})
            return record.replaced(samples=samples, values=values)

        steps = {name: [1.0, 1.1, 1.0] for name in served}
        phases, own = ("train", "generate"), study.own_workloads
        path = write_run("r", steps, study=study, phases=phases, own_workloads=own, change=answered)
        return store.read_run(str(path), path.parent)

    return make


def test_throughput_stands_against_latency_with_both_intervals(run):
    """More prompts take longer for a token of each and make more tokens a second; what is worse in both is behind."""
    measured = run(SERVED)
    view = view_of(measured)
    (figure,) = (one for one in figures_of_run(measured, view) if one.title == SERVING)
    spots = {spot.name: spot for spot in figure.drawing.spots}
    assert {name: spot.best for name, spot in spots.items()} == {"one": True, "eight": True, "slow": False}
    for name, (batch, token) in SERVED.items():
        spot = spots[name]
        assert spot.across.value == pytest.approx(1.01 * token, rel=1e-3)
        assert spot.up.value == pytest.approx(batch / (1.01 * token), rel=1e-3)
        assert all(mark.low < mark.value < mark.high for mark in (spot.across, spot.up))
    assert "on the front" in draw(figure.drawing, figure.title, figure.says, {})
    (table,) = (block for block in describe_run(view) if getattr(block, "title", "") == SERVING)
    assert [head.text for head in table.heads] == [
        "variant", "prompts", "time per output token", "output tokens/s", "on the front",
    ]  # fmt: skip
    assert [[cell.text for cell in (row.cells[1], row.cells[4])] for row in table.rows] == [
        ["1", "yes"], ["8", "yes"], ["8", "no"],
    ]  # fmt: skip
    assert all(row.cells[place].low < row.cells[place].high for row in table.rows for place in (2, 3))
    assert SERVING in markdown_of(describe_run(view))
    assert "8 × (8 + 4)" not in " ".join(line.text for line in view.facts)
    assert "request_batch = 8" in " ".join(line.text for line in view.facts)


def test_requests_of_equally_many_prompts_have_no_front(run):
    """Their times say it already."""
    measured = run({name: (1, token) for name, (_, token) in SERVED.items()})
    view = view_of(measured)
    assert SERVING not in [figure.title for figure in figures_of_run(measured, view)]
    assert all(table.serving is None for table in view.tables)
