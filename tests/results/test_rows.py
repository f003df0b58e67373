"""Tests that rows contain exactly the values of the records and the reports."""

import pytest

from lorameter.records import store
from lorameter.records.record import DISTURBED, Failure
from lorameter.report.run_view import view_of
from lorameter.results.columns import TABLES, names_of
from lorameter.results.rows import table_of
from tests.constructed import RUNS

CONSTRUCTED = sorted(path.name for path in RUNS.iterdir())


def tables(run):
    return {name: [dict.fromkeys(names_of(name)) | row for row in table_of(run, name)] for name in TABLES}


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_every_run_has_rows_of_the_column_types(name, read):
    """This includes runs with failures, missing metrics, one replicate, no reference and old schemas."""
    kinds = {"text": str, "count": int, "number": float, "flag": bool}
    for table, rows in tables(read(name)).items():
        for row in rows:
            for column in TABLES[table]:
                value = row[column.name]
                assert value is None or type(value) is kinds[column.kind], (table, column.name, value)


def test_every_sample_of_every_trial_is_a_row(read):
    """Rows and samples of the records agree in number, value and order."""
    run = read("sound")
    rows = tables(run)["samples"]
    record = next(record for record in run.records if len(record.samples.get("step_time_s", ())) > 1)
    mine = [row for row in rows if row["trial"] == record.trial and row["metric"] == "step_time_s"]
    assert [row["value"] for row in mine] == list(record.samples["step_time_s"])
    assert [row["sample"] for row in mine] == list(range(len(mine)))
    turns = [row["turn"] for row in mine]
    assert [turns.count(turn) for turn in range(len(record.turn_lengths))] == list(record.turn_lengths)
    held = sum(sum(map(len, one.samples.values())) + len(one.values | one.memory) for one in run.records)
    assert len(rows) == held


def test_estimates_and_ratios_are_those_of_the_report(read):
    """The report's cells and the rows hold the same numbers."""
    run = read("sound")
    found, view = tables(run), view_of(run)
    estimates = {(row["variant"], row["metric"]): row for row in found["estimates"] if row["role"] == "variant"}
    ratios = {(row["variant"], row["metric"], row["role"]): row for row in found["comparisons"]}
    primary = {"train": "step_time_s", "generate": "request_time_s"}
    for table in view.tables:
        metric = primary[table.phase]
        place = next(place for place, head in enumerate(table.table.heads) if head.key == metric)
        for row in table.table.rows:
            cell, estimate = row.cells[place], estimates[row.cells[0].text, metric]
            assert (cell.value, cell.low, cell.high) == (estimate["value"], estimate["low"], estimate["high"])
        for name, ratio in table.ratios.items():
            mine = ratios[name, metric, "variant"]
            assert (mine["ratio"], mine["verdict"]) == (ratio.ratio, ratio.verdict)
        control = ratios["lora-r16", metric, "control"]
        assert control["verdict"] == table.control.verdict


def test_an_earlier_attempt_is_a_trial_that_does_not_count(write_run):
    """It precedes the attempt that counts and has no samples."""
    from lorameter.records.trials import line_of

    path = write_run("again", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]})
    lines = (path / store.TRIALS).read_text().splitlines(keepends=True)
    first = store.read_run(str(path), path.parent).records[0]
    failure = Failure(phase="train", kind=DISTURBED, message="stolen")
    before = first.replaced(status="invalid", failure=failure, started_unix_s=-9.0, checks=())
    after = first.replaced(attempt=1, checks=())
    (path / store.TRIALS).write_text("".join([line_of(before, ()), line_of(after, ()), *lines[1:]]))
    rows = tables(store.read_run(str(path), path.parent))
    mine = [(row["attempt"], row["counts"], row["failure"]) for row in rows["trials"] if row["trial"] == first.trial]
    assert mine == [(0, False, "stolen"), (1, True, None)]
    assert len([r for r in rows["samples"] if r["trial"] == first.trial and r["metric"] == "step_time_s"]) == 3
