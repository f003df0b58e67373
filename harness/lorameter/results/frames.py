"""Runs as pandas DataFrames: `lorameter.load(run)` of one, `lorameter.load_all(folder)` of all in a folder.

Nothing is computed here: the rows are those that reports are made of, and a value that is not there is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorameter.errors import UsageError
from lorameter.records import fileio, store
from lorameter.results.columns import TABLES, Kind, TableName, Values
from lorameter.results.folder import read_each
from lorameter.results.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

DTYPES: Mapping[Kind, str] = {"text": "string", "count": "Int64", "number": "float64", "flag": "boolean"}
"""What pandas calls each kind of column; the first, second and last know missing values, and a number's is NaN."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """The tables of one run, or of several below each other. docs/results.md says every column."""

    trials: pd.DataFrame
    """A row a trial, whether it counts or not."""
    samples: pd.DataFrame
    """A row a raw value: long form."""
    estimates: pd.DataFrame
    """A row a metric of a variant, with its interval over replicates."""
    comparisons: pd.DataFrame
    """A row a verdict, as in the report."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Why runs are not in the tables, by the names of their folders."""

    def __repr__(self) -> str:
        """How many rows each table has."""
        sizes = [f"{name}: {len(getattr(self, name))}" for name in TABLES]
        skipped = [f"unreadable: {len(self.unreadable)}"] if self.unreadable else []
        return f"Frames({', '.join([*sizes, *skipped])})"


def load(run: str | Path, runs_dir: str | Path | None = None) -> Frames:
    """The tables of a run.

    Args:
        run: a run id, a run directory, or a file that `lorameter pack` made.
        runs_dir: where ids are looked for; default: $LORAMETER_RUNS or ./.lorameter/runs.

    Raises:
        lorameter.errors.UsageError: no such run, or one that cannot be read.
        lorameter.errors.InvalidRunError: samples that have no number.
    """
    return _frames([rows_of(store.read_run(str(run), _folder(runs_dir)))], {})


def load_all(folder: str | Path | None = None) -> Frames:
    """The tables of all runs in a folder, below each other, by the names of their folders; then those that are packed.

    A run that cannot be read is left out, with a warning, and is listed with the reason in `unreadable`: it must not
    hide the others.

    Args:
        folder: default: $LORAMETER_RUNS or ./.lorameter/runs.

    Raises:
        lorameter.errors.UsageError: no such folder.
    """
    runs = _folder(folder)
    if not fileio.is_folder(runs):
        raise UsageError(f"{runs}: there is no such folder. Name the folder that holds the runs.")
    found: list[dict[TableName, list[Values]]] = []
    unreadable: dict[str, str] = {}
    for one in read_each(runs, rows_of):
        if one.content is not None:
            found.append(one.content)
        else:
            unreadable[one.path.name] = str(one.error)
            warnings.warn(f"left out: {one.error}", stacklevel=2)
    return _frames(found, unreadable)


def frame_of(table: TableName, rows: list[Values]) -> pd.DataFrame:
    """One table as a DataFrame, typed by its columns."""
    import pandas as pd

    columns = TABLES[table]
    by_column = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    return pd.DataFrame(
        {
            column.name: pd.Series(list(values), dtype=DTYPES[column.kind])
            for column, values in zip(columns, by_column, strict=True)
        }
    )


def _frames(runs: list[dict[TableName, list[Values]]], unreadable: Mapping[str, str]) -> Frames:
    tables = {table: frame_of(table, [row for run in runs for row in run[table]]) for table in TABLES}
    return Frames(**tables, unreadable=unreadable)


def _folder(given: str | Path | None) -> Path:
    return store.runs_dir(None if given is None else str(given))
