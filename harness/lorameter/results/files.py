"""A run written as a file, or as several: one function a format, by its name.

`csv` and `parquet` are one table a file; `json` is all four tables in one document.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.fileio import replacing
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.store import Run
from lorameter.results.columns import TABLES, TableName, Values, names_of
from lorameter.results.exchange import encode_action, encode_bencher
from lorameter.results.rows import table_of

SCHEMA = 1
"""Version of the JSON document. 1: first form."""
GROUP_ROWS = 100_000
"""Rows of a parquet file that are in memory at once."""
TABULAR = ("csv", "parquet")
OF_TRENDS = ("github-action-benchmark", "bencher")
FORMATS = ("json", *TABULAR, *OF_TRENDS)


def text_of(run: Run, form: str, *, table: TableName | None = None, metrics: Sequence[str] = ()) -> Iterator[str]:
    """A run as text in one of the formats, in parts: a table of samples may be larger than the memory.

    Args:
        run: what was measured.
        form: one of `FORMATS`.
        table: which table, for csv.
        metrics: which metrics go to a page of trends; see `exchange.trend_rows`.

    Raises:
        UsageError: a table file that holds no text, or none named.
        InvalidRunError: a run that is not valid, for a page of trends.
    """
    if form == "csv" and table is not None:
        return csv_of(table, table_of(run, table))
    if form == "json":
        return _json_of(run)
    if form in OF_TRENDS:
        encode = encode_action if form == "github-action-benchmark" else encode_bencher
        return iter((json.dumps(encode(run, metrics), allow_nan=False), "\n"))
    what = "is no text" if form == "parquet" else f"is one table: add --table {'|'.join(TABLES)}"
    raise UsageError(f"export --format {form}: {what}. Give a place with --output.")


def write_tables(run: Run, form: str, output: Path, table: TableName | None = None) -> list[Path]:
    """Write one table to a file, or without a name all of them into a folder; the files.

    Raises:
        UsageError, InvalidRunError: the place cannot be written; all files that were there are there.
    """
    names: Sequence[TableName] = get_args(TableName) if table is None else (table,)
    tables = {name: table_of(run, name) for name in names}
    with _refusals(output), contextlib.ExitStack() as drafts:
        (output if table is None else output.parent).mkdir(parents=True, exist_ok=True)
        targets = {name: output / f"{name}.{form}" if table is None else output for name in names}
        for name, target in targets.items():
            draft = drafts.enter_context(replacing(target))
            if form == "csv":
                with draft.open("w", encoding="utf-8", errors="replace", newline="") as file:
                    file.writelines(csv_of(name, tables[name]))
            else:
                _write_parquet(name, tables[name], draft)
    return list(targets.values())


def write_text(text: Iterable[str], output: Path) -> list[Path]:
    """Write the parts of a document to a file. Raises `UsageError` or `InvalidRunError` where the place cannot be
    written."""
    with _refusals(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as draft, draft.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(text)
    return [output]


class _Echo:
    """A file for `csv.writer`, whose `writerow` returns what `write` does."""

    def write(self, line: str) -> str:
        return line


def csv_of(table: TableName, rows: Iterable[Values]) -> Iterator[str]:
    """The lines of a table with its heads; what is missing is empty, and no number is rounded."""
    writer = csv.writer(_Echo(), lineterminator="\n")
    for row in itertools.chain([names_of(table)], rows):
        yield writer.writerow(row)


def _write_parquet(table: TableName, rows: Iterable[Values], target: Path) -> None:
    """Write a table, a group of rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    from lorameter.results.frames import frame_of

    left = iter(rows)
    schema = pa.Schema.from_pandas(frame_of(table, []), preserve_index=False)
    with parquet.ParquetWriter(target, schema) as writer:
        while part := list(itertools.islice(left, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pandas(frame_of(table, part), schema, preserve_index=False))


def _json_of(run: Run) -> Iterator[str]:
    """All four tables in one JSON document, a table of its columns a row."""
    tables = {name: table_of(run, name) for name in get_args(TableName)}
    yield f'{{"schema": {SCHEMA}, "run": {json.dumps(run.manifest.run)}'
    for name, rows in tables.items():
        yield f', "{name}": ['
        for place, row in enumerate(rows):
            values = codec.to_json(dict(zip(names_of(name), row, strict=True)))
            yield (", " if place else "") + json.dumps(values, allow_nan=False)
        yield "]"
    yield "}\n"


def _refusals(output: Path) -> contextlib.AbstractContextManager[None]:
    return translate_write_errors(f"--output {output}", "Give another place.")
