"""Runs for other programs: as pandas DataFrames, as tables (`csv`, `parquet`), as a JSON document, or for a dashboard.

`lorameter.load(run)` gives the DataFrames of one run, `lorameter.load_all(folder)` of all in a folder. Nothing is
computed here: the rows are those of the reports, and an absent value is missing. The formats of dashboards are:

- github-action-benchmark, `tool: customSmallerIsBetter`: a list of `{name, unit, value, range, extra}`. One file has
  one direction, so metrics for which higher is better are omitted.
- Bencher Metric Format (bencher.dev/docs/reference/bencher-metric-format): benchmark → measure → value with its
  interval.

A dashboard keeps every number and has no verdicts, so an invalid run is refused.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from lorameter.errors import InvalidRunError, UsageError, require
from lorameter.records import codec, fileio, store
from lorameter.records.fileio import replace_file
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.results.history import read_each
from lorameter.results.rows import DTYPES, RANGE, TABLES, Row, TableName, estimate_rows, table_columns, table_rows
from lorameter.studies.study_file import read_study
from lorameter.verdicts.compare import default_metrics, match_patterns
from lorameter.verdicts.validity import run_validity

if TYPE_CHECKING:
    import pandas as pd

Tables: TypeAlias = dict[TableName, list[Row]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """The tables of one run, or of several runs concatenated. docs/results.md describes every column."""

    trials: pd.DataFrame
    """A row for each trial, including trials that do not count."""
    samples: pd.DataFrame
    """A row for each raw value, in long form."""
    estimates: pd.DataFrame
    """A row for each metric of a variant, with its interval over replicates."""
    comparisons: pd.DataFrame
    """A row for each verdict, as in the report."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Why a run is not in the tables, by folder name."""

    def __repr__(self) -> str:
        """The number of rows of each table."""
        sizes = [f"{name}: {len(getattr(self, name))}" for name in TABLES]
        skipped = [f"unreadable: {len(self.unreadable)}"] if self.unreadable else []
        return f"Frames({', '.join([*sizes, *skipped])})"


def load(run: str | Path, runs_dir: str | Path | None = None) -> Frames:
    """The tables of a run.

    Args:
        run: a run id, a run directory, or a file that `lorameter pack` made.
        runs_dir: the folder in which ids are looked up; default: $LORAMETER_RUNS or ./.lorameter/runs.

    Raises:
        lorameter.errors.UsageError: no such run, or one that cannot be read.
        lorameter.errors.InvalidRunError: samples that are not numbers.
    """
    return _frames([_make_tables(store.read_run(str(run), store.runs_dir(runs_dir)))], {})


def load_all(folder: str | Path | None = None) -> Frames:
    """The tables of all runs in a folder, concatenated in the order of the folder names; packed runs come last.

    An unreadable run is left out with a warning, so that it does not hide the others, and is listed with the reason in
    `unreadable`.

    Args:
        folder: default: $LORAMETER_RUNS or ./.lorameter/runs.

    Raises:
        lorameter.errors.UsageError: no such folder.
    """
    runs = store.runs_dir(folder)
    require(fileio.is_folder(runs), f"{runs}: there is no such folder. Name the folder that holds the runs.")
    loaded: list[Tables] = []
    unreadable: dict[str, str] = {}
    for path, tables, error in read_each(runs, _make_tables):
        if tables is not None:
            loaded.append(tables)
        else:
            unreadable[path.name] = error
            warnings.warn(f"left out: {error}", stacklevel=2)
    return _frames(loaded, unreadable)


def _make_tables(run: Run) -> Tables:
    return {table: list(table_rows(run, table)) for table in TABLES}


def make_frame(table: TableName, rows: list[Row]) -> pd.DataFrame:
    """One table as a DataFrame, typed by its columns."""
    import pandas as pd

    return pd.DataFrame(
        {
            column.name: pd.Series([row.get(column.name) for row in rows], dtype=DTYPES[column.kind])
            for column in TABLES[table]
        }
    )


def _frames(runs: list[Tables], unreadable: Mapping[str, str]) -> Frames:
    tables = {table: make_frame(table, [row for run in runs for row in run[table]]) for table in TABLES}
    return Frames(**tables, unreadable=unreadable)


SCHEMA = 1
"""Version of the JSON document. 1: first form."""
TABULAR = ("csv", "parquet")
DASHBOARDS = ("github-action-benchmark", "bencher")


def export_text(run: Run, form: str, *, table: TableName | None = None, metrics: Sequence[str] = ()) -> Iterator[str]:
    """A run as text in one of the formats, in parts: a table of samples may be larger than memory.

    Args:
        run: the run.
        form: json, csv or one of `DASHBOARDS`.
        table: the table to write, for csv.
        metrics: metrics for a dashboard; see `trend_rows`.

    Raises:
        UsageError: the table format is not text, or no table is named.
        InvalidRunError: the run is invalid, for a dashboard.
    """
    if form == "csv" and table is not None:
        return export_csv(table, table_rows(run, table))
    if form == "json":
        return _export_json(run)
    if form in DASHBOARDS:
        encode = encode_action if form == "github-action-benchmark" else encode_bencher
        return iter((json.dumps(encode(run, metrics), allow_nan=False), "\n"))
    what = "is not text" if form == "parquet" else f"is one table: add --table {'|'.join(TABLES)}"
    raise UsageError(f"export --format {form}: {what}. Give a path with --output.")


def write_tables(run: Run, form: str, output: Path, table: TableName | None = None) -> list[Path]:
    """Write one table to a file, or, without a name, all tables into a folder; returns the files.

    Raises:
        UsageError, InvalidRunError: the output cannot be written; existing files are unchanged.
    """
    names: Sequence[TableName] = get_args(TableName) if table is None else (table,)
    targets = {name: output / f"{name}.{form}" if table is None else output for name in names}
    refusals = translate_write_errors(f"--output {output}", "Choose another path.")
    with refusals, contextlib.ExitStack() as drafts:
        (output if table is None else output.parent).mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            draft, rows = drafts.enter_context(replace_file(target)), table_rows(run, name)
            if form == "csv":
                with draft.open("w", encoding="utf-8", errors="replace", newline="") as file:
                    file.writelines(export_csv(name, rows))
            else:
                _write_parquet(name, rows, draft)
    return list(targets.values())


def write_text(text: Iterable[str], output: Path) -> list[Path]:
    """Write the parts of a document to a file. Raises `UsageError` or `InvalidRunError` if it cannot be written."""
    with translate_write_errors(f"--output {output}", "Choose another path."):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(output) as draft, draft.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(text)
    return [output]


class _Echo:
    """A file object for `csv.DictWriter`, whose `writerow` returns the result of `write`."""

    def write(self, line: str) -> str:
        return line


def export_csv(table: TableName, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table with its header; a missing value is empty, and no number is rounded."""
    writer = csv.DictWriter(_Echo(), table_columns(table), extrasaction="ignore", lineterminator="\n")
    yield writer.writeheader()
    for row in rows:
        yield writer.writerow({key: _as_text(value) for key, value in row.items()})


def _as_text(value: Any) -> Any:
    """A text that a spreadsheet would execute as a formula, with an apostrophe before it; any other value unchanged."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _write_parquet(table: TableName, rows: Iterable[Row], target: Path) -> None:
    """Write a table, one group of rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    remaining = iter(rows)
    schema = pa.Schema.from_pandas(make_frame(table, []), preserve_index=False)
    with parquet.ParquetWriter(target, schema) as writer:
        while part := list(itertools.islice(remaining, 100_000)):  # all samples may not fit into memory
            writer.write_table(pa.Table.from_pandas(make_frame(table, part), schema, preserve_index=False))


def _export_json(run: Run) -> Iterator[str]:
    """All four tables in one JSON document, each row an object of its columns."""
    yield f'{{"schema": {SCHEMA}, "run": {json.dumps(run.manifest.run)}'
    for name in get_args(TableName):
        yield f', "{name}": ['
        for place, row in enumerate(table_rows(run, name)):
            values = codec.to_json({column: row.get(column) for column in table_columns(name)})
            yield (", " if place else "") + json.dumps(values, allow_nan=False)
        yield "]"
    yield "}\n"


def trend_rows(run: Run, metrics: Sequence[str] = ()) -> list[Row]:
    """The estimates of a run for a dashboard.

    Args:
        run: a completely valid run.
        metrics: names or patterns of metrics and kinds of memory; empty for the default metrics of a comparison.

    Raises:
        InvalidRunError: the run is not valid.
        UsageError: a pattern matches nothing.
    """
    study, name = read_study(run), run.manifest.run
    if invalid := run_validity(run, study).invalid:
        raise InvalidRunError(
            f"run {name} is invalid: {invalid}. A dashboard would keep its numbers as valid ones. Measure again, "
            "or export it as json."
        )
    rows = [row for row in estimate_rows(run, study) if row["role"] == "variant" and math.isfinite(row["value"])]
    known = list(dict.fromkeys(row["metric"] for row in rows))
    wanted = match_patterns(known, metrics) if metrics else default_metrics(run.manifest.phases, known)
    require(
        wanted or not metrics,
        f"--metric {' '.join(metrics)}: run {name} has no such metric. It has {', '.join(known)}.",
    )
    return [row for row in rows if row["metric"] in wanted]


def encode_action(run: Run, metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Entries for github-action-benchmark's `customSmallerIsBetter`. Raises as `trend_rows` does."""
    return [
        {
            "name": f"{_name(row)}, {row['metric']}",
            "unit": row["unit"],
            "value": row["value"],
            **({} if None in (row["low"], row["high"]) else {"range": f"[{row['low']:.6g}, {row['high']:.6g}]"}),
            "extra": f"run {row['run']}\nfingerprint {row['fingerprint']}\n"
            f"{format_count(row['replicates'], 'replicate')}\n"
            f"range: {row['interval'] or 'none, too few replicates for a 95 % interval'}",
        }
        for row in trend_rows(run, metrics)
        if not row["higher_is_better"]
    ]


def encode_bencher(run: Run, metrics: Sequence[str] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """Estimates in the Bencher Metric Format. Raises as `trend_rows` does."""
    metrics_of: dict[str, dict[str, dict[str, float]]] = {}
    for row in trend_rows(run, metrics):
        has_interval = None not in (row["low"], row["high"]) and row["interval"] != RANGE
        ends = {"lower_value": row["low"], "upper_value": row["high"]} if has_interval else {}
        metrics_of.setdefault(_name(row), {})[row["metric"]] = {"value": row["value"], **ends}
    return metrics_of


def _name(row: Row) -> str:
    side = f", {row['side']}" if row["side"] else ""
    return f"{row['study']}: {row['variant']}{side}"
