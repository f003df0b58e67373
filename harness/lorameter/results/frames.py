"""Runs as pandas DataFrames: `lorameter.load(run)` of one, `lorameter.load_all(folder)` of all in a folder.

This module computes nothing: the rows are those of the reports, and an absent value is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorameter.errors import UsageError
from lorameter.records import fileio, store
from lorameter.records.store import Run
from lorameter.results.history import read_each
from lorameter.results.rows import DTYPES, TABLES, Row, TableName, table_of

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
    return _frames([_tables_of(store.read_run(str(run), _folder(runs_dir)))], {})


def load_all(folder: str | Path | None = None) -> Frames:
    """The tables of all runs in a folder, concatenated in the order of the folder names; packed runs come last.

    An unreadable run is left out with a warning, so that it does not hide the others, and is listed with the reason in
    `unreadable`.

    Args:
        folder: default: $LORAMETER_RUNS or ./.lorameter/runs.

    Raises:
        lorameter.errors.UsageError: no such folder.
    """
    runs = _folder(folder)
    if not fileio.is_folder(runs):
        raise UsageError(f"{runs}: there is no such folder. Name the folder that holds the runs.")
    loaded: list[Tables] = []
    unreadable: dict[str, str] = {}
    for path, tables, error in read_each(runs, _tables_of):
        if tables is not None:
            loaded.append(tables)
        else:
            unreadable[path.name] = error
            warnings.warn(f"left out: {error}", stacklevel=2)
    return _frames(loaded, unreadable)


def _tables_of(run: Run) -> Tables:
    return {table: list(table_of(run, table)) for table in TABLES}


def frame_of(table: TableName, rows: list[Row]) -> pd.DataFrame:
    """One table as a DataFrame, typed by its columns."""
    import pandas as pd

    return pd.DataFrame(
        {
            column.name: pd.Series([row.get(column.name) for row in rows], dtype=DTYPES[column.kind])
            for column in TABLES[table]
        }
    )


def _frames(runs: list[Tables], unreadable: Mapping[str, str]) -> Frames:
    tables = {table: frame_of(table, [row for run in runs for row in run[table]]) for table in TABLES}
    return Frames(**tables, unreadable=unreadable)


def _folder(given: str | Path | None) -> Path:
    return store.runs_dir(None if given is None else str(given))
