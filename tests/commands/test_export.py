"""`lorameter export`: a run as a file of each format, or on standard output."""

import csv
import io
import json
import tracemalloc

import pytest

from lorameter import cli
from lorameter.records import store
from lorameter.results import columns


@pytest.fixture
def called(write_run, tmp_path, capsys, monkeypatch):
    """A function that exports one sound run; gives exit code, standard output and standard error."""
    write_run("sound", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]})
    write_run("cut", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, status="interrupted")
    monkeypatch.chdir(tmp_path)

    def run(*words, name="sound"):
        code = cli.main(["export", name, *words, "--runs-dir", "runs"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_csv_of_one_table(called):
    """Heads first, a line a row, every digit kept."""
    code, out, _ = called("--format", "csv", "--table", "estimates")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert tuple(rows[0]) == columns.names_of("estimates")
    value = next(row["value"] for row in rows if (row["variant"], row["metric"]) == ("plain", "step_time_s"))
    document = json.loads(called()[1])
    assert float(value) in [row["value"] for row in document["estimates"]]


def test_all_tables_into_a_folder(called, tmp_path):
    """A file for each, whose paths are said; parquet keeps the types."""
    import pandas as pd

    for form in ("csv", "parquet"):
        code, out, _ = called("--format", form, "--output", "out")
        assert code == 0
        assert out.split() == [f"out/{name}.{form}" for name in columns.TABLES]
    frame = pd.read_parquet(tmp_path / "out" / "trials.parquet")
    assert list(frame.columns) == list(columns.names_of("trials"))
    assert str(frame["replicate"].dtype) == "Int64"
    text = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert list(text["trial"]) == list(frame["trial"])


def test_only_the_table_that_is_asked_for_is_made(write_run, called):
    """Trials are written where step times cannot be compared; the comparisons are refused."""
    write_run("zero", {"plain": [0.0, 0.0], "nf4": [1.0, 1.2]})
    code, out, _ = called("--format", "csv", "--table", "trials", name="zero")
    assert code == 0
    assert len(out.splitlines()) == 7
    assert called("--format", "csv", "--table", "samples", "--output", "out.csv", name="zero")[0] == 0
    code, _, err = called("--format", "csv", "--table", "comparisons", name="zero")
    assert (code, "no number can be had" in err) == (4, True)


@pytest.fixture
def long(write_run):
    """A run with 180,000 samples."""
    samples = tuple(float(number) for number in range(60_000))
    write_run("long", {"plain": [1.0], "nf4": [1.0]}, change=lambda record: record.replaced(samples={"held": samples}))


@pytest.mark.usefixtures("long")
def test_samples_are_written_one_by_one(called, tmp_path, monkeypatch):
    """The memory that the export takes beside the run is less than the table as text."""
    run = store.read_run("long", tmp_path / "runs")
    monkeypatch.setattr(store, "read_run", lambda *_: run)
    tracemalloc.start()
    try:
        code, _, _ = called("--format", "csv", "--table", "samples", "--output", "samples.csv", name="long")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code == 0
    assert len((tmp_path / "samples.csv").read_text().splitlines()) > 180_000
    assert peak_bytes < (tmp_path / "samples.csv").stat().st_size


@pytest.mark.usefixtures("long")
def test_a_parquet_file_is_written_in_groups_of_rows(called, tmp_path):
    """They are read back as one table."""
    import pandas as pd
    from pyarrow import parquet

    assert called("--format", "parquet", "--table", "samples", "--output", "samples.parquet", name="long")[0] == 0
    assert parquet.ParquetFile(tmp_path / "samples.parquet").num_row_groups > 1
    frame = pd.read_parquet(tmp_path / "samples.parquet")
    assert list(frame[frame["metric"] == "held"]["value"]) == 3 * [float(number) for number in range(60_000)]


@pytest.mark.parametrize("form", ["github-action-benchmark", "bencher"])
def test_a_page_of_trends_gets_json_and_only_of_valid_runs(called, form):
    """Exit code 4, with the reason, for one that is not."""
    code, out, _ = called("--format", form, "--metric", "step_time_s")
    assert code == 0
    assert "step_time_s" in json.dumps(json.loads(out))
    code, out, err = called("--format", form, name="cut")
    assert (code, out) == (4, "")
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "csv"), "add --table"),
        (("--format", "parquet"), "--output"),
        (("--format", "json", "--table", "trials"), "no table"),
        (("--format", "csv", "--table", "trials", "--metric", "x"), "all metrics"),
        (("--format", "csv", "--table", "trials", "--json"), "Give one of them"),
        (("--output", "runs"), "cannot be written"),
        (("--format", "csv", "--output", "runs/sound/manifest.json/x"), "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(called, words, said):
    """Exit code 2, and nothing is printed."""
    code, out, err = called(*words)
    assert (code, out) == (2, "")
    assert said in err
