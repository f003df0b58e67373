"""What is asked of many runs, in one SQLite file of the cache: made from the runs when it is missing, never the truth.

A run is read again when one of its files has changed; what has gone is taken out. A file that is damaged, of another
version, or that cannot be written is no error: the index is made anew, in memory where the disk refuses. So it can be
removed at any time, and nothing may be known from it alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.models.catalogue import cache_dir
from harness.records import inputs, store
from harness.records.packed import list_packed
from harness.results.indexing import VERSION, create_tables, refresh

FOLDER = "indexes"
"""Of the cache: a folder of runs may lie in a repository, and belong to somebody else."""
_BUSY_S = 10.0
_UNUSED_S = 30 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedRun:
    """What is known of a run without reading it."""

    folder: str
    """Name of its folder, or of its file."""
    error: str | None
    """Why it cannot be read; then nothing else is known of it."""
    run: str = ""
    study: str = ""
    title: str = ""
    fingerprint: str = ""
    created_unix_s: float = 0.0
    state: str = "damaged"
    verdict: str = ""
    """`valid` or `invalid`; of an A/B its worst verdict."""
    trials: Mapping[str, int]
    """How many ended in which way."""
    planned: int = 0
    sides: bool = False
    size_bytes: int = 0
    commit: str | None = None
    dirty: bool = False
    versions: Mapping[str, str | None]
    newer_schema: int | None = None
    """The schema of a run that a newer version wrote; what this one does not know of it is in no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One estimate of one run."""

    folder: str
    study: str
    variant: str
    variant_id: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    replicates: int
    broken: str | None
    """Why it does not count; None where it does."""


class Index:
    """The index of one folder of runs, as up to date as its files were when it was opened."""

    def __init__(self, connection: sqlite3.Connection, runs: Path) -> None:
        self._connection, self._runs = connection, runs

    def runs(self) -> tuple[IndexedRun, ...]:
        """All runs, those that cannot be read included, by the names of their folders."""
        return tuple(self._run(row) for row in self._ask("SELECT * FROM runs ORDER BY folder"))

    def _ask(self, question: str, *values: Any) -> list[sqlite3.Row]:
        try:
            return self._connection.execute(question, values).fetchall()
        except sqlite3.Error as error:
            raise UsageError(
                f"{index_file(self._runs)}: cannot be read: {error}. Remove it; it is made anew from the runs."
            ) from None

    def _run(self, row: sqlite3.Row) -> IndexedRun:
        if row["error"] is not None:
            return IndexedRun(
                folder=row["folder"], error=row["error"], trials={}, versions={}, size_bytes=row["size_bytes"]
            )
        state = row["status"]
        if state == "running":
            path = self._runs / row["folder"]
            state = store.state_of(path, store.read_manifest(path, newer=True)) if inputs.is_folder(path) else "killed"
        return IndexedRun(
            error=None,
            state=state,
            trials=json.loads(row["trials"]),
            sides=bool(row["sides"]),
            commit=row["commit_id"],
            dirty=bool(row["dirty"]),
            versions=json.loads(row["versions"]),
            **{
                name: row[name]
                for name in (
                    "folder", "run", "study", "title", "fingerprint", "created_unix_s", "verdict", "planned",
                    "size_bytes", "newer_schema",
                )
            },
        )  # fmt: skip

    def points(self, metric: str, *, study: str | None = None, variant: str | None = None) -> tuple[Point, ...]:
        """Every estimate of a metric, oldest run first."""
        asked = {"study": study, "variant": variant}
        words = {name: value for name, value in asked.items() if value is not None}
        where = "".join(f" AND points.{name} = ?" for name in words)
        rows = self._connection.execute(
            "SELECT points.* FROM points JOIN runs USING (folder) WHERE points.metric = ?"
            f"{where} ORDER BY runs.created_unix_s, points.folder",
            (metric, *words.values()),
        ).fetchall()
        names = ("folder", "study", "variant", "variant_id", "metric", "unit", "value", "low", "high", "replicates")
        return tuple(
            Point(
                higher_is_better=bool(row["higher_is_better"]),
                broken=row["broken"],
                **{name: row[name] for name in names},
            )
            for row in rows
        )

    def metrics(self) -> tuple[str, ...]:
        """What there are estimates of."""
        return tuple(row[0] for row in self._ask("SELECT DISTINCT metric FROM points ORDER BY metric"))

    def facts(self, folder: str) -> dict[str, Any]:
        """What is known of where and with what a run was measured, for telling what changed."""
        rows = self._ask("SELECT facts FROM runs WHERE folder = ?", folder)
        return {} if not rows or rows[0][0] is None else dict(json.loads(rows[0][0]))


def index_file(runs: Path) -> Path:
    """Where the index of a folder of runs is kept: by its place, so that a copy of it has one of its own."""
    place = str(runs.resolve())
    return cache_dir() / FOLDER / f"{hashlib.sha256(place.encode('utf-8', 'replace')).hexdigest()[:16]}.sqlite"


@contextlib.contextmanager
def open_index(runs: Path, *, rebuild: bool = False) -> Iterator[Index]:
    """The index of a folder of runs, brought up to date; `rebuild` makes it anew."""
    connection = _connect(runs, rebuild=rebuild)
    try:
        try:
            refresh(connection, runs)
        except sqlite3.Error:  # damaged, or taken away meanwhile: everything in it is in the runs
            connection.close()
            connection = _in_memory()
            refresh(connection, runs)
            with contextlib.suppress(OSError):
                index_file(runs).unlink()
        yield Index(connection, runs)
    finally:
        connection.close()


def _connect(runs: Path, *, rebuild: bool) -> sqlite3.Connection:
    """A connection to the file, with the tables of this version in it; to memory where there can be none."""
    path = index_file(runs)
    if not (store.list_runs(runs) or list_packed(runs)):
        return _in_memory()
    for again in (rebuild, True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if again:
                path.unlink(missing_ok=True)
            connection = sqlite3.connect(path, timeout=_BUSY_S)
            connection.row_factory = sqlite3.Row
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if found == VERSION and tables == {"runs", "points"}:
                os.utime(path)
                return connection
            if found == 0 and not tables:
                _remove_unused(path.parent)
                create_tables(connection)
                return connection
            connection.close()
        except (sqlite3.Error, OSError):
            continue
    return _in_memory()


def _remove_unused(folder: Path) -> None:
    """Take away indexes that nobody has asked for a month: their runs may be long gone."""
    for path in folder.glob("*.sqlite"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                path.unlink()


def _in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    create_tables(connection)
    return connection
