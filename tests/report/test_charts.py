"""Tests of the charts of a phase: sweeps along each field with three levels, and losses by step, on common scales."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.records import store
from lorameter.report.figures import describe_charts, figures_of_run
from lorameter.report.run_view import view_of


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
    view = view_of(run)
    swept = [gallery.title for gallery in describe_charts(view, view.tables[0]) if "along each field" in gallery.title]
    assert [title.partition(" ×")[0] for title in swept] == [
        "time per real token", *(["held-out loss, along each field"] if kept else []),
    ]  # fmt: skip
    assert ("Loss against cost" in [figure.title for figure in figures_of_run(run, view)]) == kept


def test_a_truncated_training_is_in_no_median_of_a_step(write_run):
    """The median of a step uses the trials with the most steps; shorter trainings are left out."""

    def learnt(record):
        steps = 6 if record.replicate == 1 else 8
        losses = tuple(float(10 - step + 100 * (steps == 6)) for step in range(steps))
        values = record.values | {"training_steps": float(steps)}
        return record.replaced(samples=record.samples | {"timed_loss": losses}, values=values)

    path = write_run("cut", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}, change=learnt)
    run = store.read_run(str(path), path.parent)
    (losses,) = (figure for figure in figures_of_run(run, view_of(run)) if figure.title.startswith("Losses"))
    points = losses.drawing.curves[0].points
    assert [(point.x, point.y) for point in points] == [(step, 11.0 - step) for step in range(1, 9)]
    assert [cell.text for cell in losses.table.rows[0].cells[1:3]] == ["2", "8"]
