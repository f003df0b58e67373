"""A run written as a file, or as several: one function a format, by its name.

`csv` and `parquet` are one table a file; `json` is all four tables in one document.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from harness.errors import UsageError
from harness.records import codec
from harness.records.outputs import replacing
from harness.records.refusals import say_unwritable
from harness.records.store import Run
from harness.results.columns import TABLES, TableName, Values, names_of
from harness.results.exchange import encode_action, encode_bencher, mllog_lines
from harness.results.rows import rows_of

SCHEMA = 1
"""Version of the JSON document. 1: first form."""
TABULAR = ("csv", "parquet")
OF_TRENDS = ("github-action-benchmark", "bencher")
FORMATS = ("json", *TABULAR, *OF_TRENDS, "mllog")


def text_of(run: Run, form: str, *, table: TableName | None = None, metrics: Sequence[str] = ()) -> str:
    """A run as text in one of the formats.

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
        return csv_of(table, rows_of(run)[table])
    if form == "mllog":
        return "".join(mllog_lines(run))
    if form == "json":
        return _json(encode_tables(run))
    if form in OF_TRENDS:
        encode = encode_action if form == "github-action-benchmark" else encode_bencher
        return _json(encode(run, metrics))
    what = "is no text" if form == "parquet" else f"is one table: add --table {'|'.join(TABLES)}"
    raise UsageError(f"export --format {form}: {what}. Give a place with --output.")


def write_tables(run: Run, form: str, output: Path, table: TableName | None = None) -> list[Path]:
    """Write one table to a file, or without a name all of them into a folder; the files.

    Raises:
        UsageError, InvalidRunError: the place cannot be written; all files that were there are there.
    """
    rows = rows_of(run)
    names: Sequence[TableName] = get_args(TableName) if table is None else (table,)
    with _refusals(output), contextlib.ExitStack() as drafts:
        (output if table is None else output.parent).mkdir(parents=True, exist_ok=True)
        targets = {name: output / f"{name}.{form}" if table is None else output for name in names}
        for name, target in targets.items():
            draft = drafts.enter_context(replacing(target))
            if form == "csv":
                draft.write_text(csv_of(name, rows[name]), encoding="utf-8", errors="replace", newline="")
            else:
                from harness.results.frames import frame_of

                frame_of(name, rows[name]).to_parquet(draft, index=False)
    return list(targets.values())


def write_text(text: str, output: Path) -> list[Path]:
    """Write a document to a file. Raises `UsageError` or `InvalidRunError` where the place cannot be written."""
    with _refusals(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as draft:
            draft.write_text(text, encoding="utf-8", errors="replace")
    return [output]


def csv_of(table: TableName, rows: Sequence[Values]) -> str:
    """A table with its heads; what is missing is empty, and no number is rounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names_of(table))
    writer.writerows(rows)
    return text.getvalue()


def encode_tables(run: Run) -> dict[str, Any]:
    """All four tables as JSON data, a table of its columns a row."""
    tables = {
        name: [dict(zip(names_of(name), row, strict=True)) for row in rows] for name, rows in rows_of(run).items()
    }
    return {"schema": SCHEMA, "run": run.manifest.run, **codec.to_json(tables)}


def _json(document: Any) -> str:
    return json.dumps(document, allow_nan=False) + "\n"


def _refusals(output: Path) -> contextlib.AbstractContextManager[None]:
    return say_unwritable(f"--output {output}", "Give another place.")
