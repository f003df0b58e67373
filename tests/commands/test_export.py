"""Tests of `lorameter export`: a run as a file of each format, or on standard output."""

import csv
import io
import json

import pytest

from lorameter import cli
from lorameter.results.rows import TABLES, table_columns


@pytest.fixture
def export(write_run, tmp_path, capsys, monkeypatch):
    """A function that exports one valid run and returns exit code, standard output and standard error."""
    write_run("sound", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]})
    write_run("cut", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, status="interrupted")
    monkeypatch.chdir(tmp_path)

    def run(*words, name="sound"):
        code = cli.main(["export", name, *words, "--runs-dir", "runs"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_csv_of_one_table(export):
    """The CSV has a header, one line for each row, and all digits."""
    code, out, _ = export("--format", "csv", "--table", "estimates")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert tuple(rows[0]) == table_columns("estimates")
    value = next(row["value"] for row in rows if (row["variant"], row["metric"]) == ("plain", "step_time_s"))
    document = json.loads(export()[1])
    assert float(value) in [row["value"] for row in document["estimates"]]


def test_all_tables_into_a_folder(export, tmp_path):
    """Each table becomes a file whose path is printed; parquet keeps the types."""
    import pandas as pd

    for form in ("csv", "parquet"):
        code, out, _ = export("--format", form, "--output", "out")
        assert code == 0
        assert out.split() == [f"out/{name}.{form}" for name in TABLES]
    frame = pd.read_parquet(tmp_path / "out" / "trials.parquet")
    assert list(frame.columns) == list(table_columns("trials"))
    assert str(frame["replicate"].dtype) == "Int64"
    text = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert list(text["trial"]) == list(frame["trial"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--format", "csv"), "add --table"),
        (("--format", "parquet"), "--output"),
        (("--format", "json", "--table", "trials"), "does not write tables"),
        (("--format", "csv", "--table", "trials", "--metric", "x"), "all metrics"),
        (("--format", "csv", "--table", "trials", "--json"), "Give one of them"),
        (("--output", "runs"), "cannot be written"),
        (("--format", "csv", "--output", "runs/sound/manifest.json/x"), "cannot be written"),
    ],
)
def test_an_impossible_export_is_refused_with_the_remedy(export, words, expected):
    """An impossible export exits with 2, names the remedy, and prints nothing on standard output."""
    code, out, err = export(*words)
    assert (code, out) == (2, "")
    assert expected in err
