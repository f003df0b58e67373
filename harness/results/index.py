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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import LorameterError, UsageError
from harness.models.catalogue import cache_dir
from harness.records import codec, inputs, store
from harness.records.evidence import CHECKS
from harness.records.packed import list_packed
from harness.records.store import MANIFEST, TRIALS, Run
from harness.results.columns import names_of
from harness.results.prune import size_of
from harness.results.rows import estimate_rows
from harness.studies.study import Study
from harness.verdicts.ab import report_of
from harness.verdicts.comparand import comparand_of
from harness.verdicts.outcome import EXIT_OF, worst
from harness.verdicts.software import facts_of
from harness.verdicts.standing import standing_of

FOLDER = "indexes"
"""Of the cache: a folder of runs may lie in a repository, and belong to somebody else."""
VERSION = 1
"""Raised with whatever is kept in it, or how it is worked out."""
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions stand beside each run."""
_BUSY_S = 10.0
_UNUSED_S = 30 * 86400.0
_LEFT_OUT = ("worker", "git", "workload", "libraries", "packages")
"""Of the provenance, in what is kept of it: the first two and the libraries have columns, the others are large."""
_TABLES = """
CREATE TABLE runs (
    folder TEXT PRIMARY KEY, stamp TEXT NOT NULL, error TEXT, run TEXT, study TEXT, title TEXT, fingerprint TEXT,
    created_unix_s REAL, status TEXT, verdict TEXT, trials TEXT, planned INTEGER, sides INTEGER, size_bytes INTEGER,
    commit_id TEXT, dirty INTEGER, versions TEXT, facts TEXT
);
CREATE TABLE points (
    folder TEXT NOT NULL, study TEXT, variant TEXT, variant_id TEXT, phase TEXT, metric TEXT, unit TEXT,
    higher_is_better INTEGER, value REAL, low REAL, high REAL, replicates INTEGER, broken TEXT
);
CREATE INDEX by_metric ON points (metric, study, variant);
CREATE INDEX by_folder ON points (folder);
"""


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
            state = store.state_of(path, store.read_manifest(path)) if inputs.is_folder(path) else "killed"
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
                    "size_bytes",
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
            _refresh(connection, runs)
        except sqlite3.Error:  # damaged, or taken away meanwhile: everything in it is in the runs
            connection.close()
            connection = _in_memory()
            _refresh(connection, runs)
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
                _create(connection)
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
    _create(connection)
    return connection


def _create(connection: sqlite3.Connection) -> None:
    connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")


def _refresh(connection: sqlite3.Connection, runs: Path) -> None:
    """Read what is new or has changed, and take out what has gone, all at once or not at all."""
    paths = {path.name: path for path in (*store.list_runs(runs), *list_packed(runs))}
    stamps = {name: _stamp(path) for name, path in paths.items()}
    known = dict(connection.execute("SELECT folder, stamp FROM runs").fetchall())
    stale = [name for name, stamp in stamps.items() if known.get(name) != stamp]
    gone = [name for name in known if name not in stamps]
    if not stale and not gone:
        return
    with connection:
        for name in (*stale, *gone):
            connection.execute("DELETE FROM runs WHERE folder = ?", (name,))
            connection.execute("DELETE FROM points WHERE folder = ?", (name,))
        for name in stale:
            _add(connection, paths[name], stamps[name])


def _stamp(path: Path) -> str:
    """What tells whether a run's files are those that were read."""
    files = [path / name for name in (MANIFEST, TRIALS, CHECKS)] if inputs.is_folder(path) else [path]
    said = []
    for file in files:
        with contextlib.suppress(OSError):
            found = file.stat()
            said.append(f"{found.st_mtime_ns}:{found.st_size}:{found.st_ino}")
    return " ".join(said)


def _add(connection: sqlite3.Connection, path: Path, stamp: str) -> None:
    try:
        run = store.read_run(str(path), path.parent)
        study = codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")
        row, points = _row(run, study), list(_points(run, study))
    except (LorameterError, UnicodeError) as error:  # one that cannot be read must not hide the others
        row, points = {"error": str(error)}, []
    row = {"folder": path.name, "stamp": stamp, "size_bytes": size_of(path)} | row
    _insert(connection, "runs", row)
    for point in points:
        _insert(connection, "points", {"folder": path.name} | point)


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    names = ", ".join(row)
    places = ", ".join("?" for _ in row)
    values = [_storable(value) for value in row.values()]
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", values)


def _storable(value: Any) -> Any:
    """Text that UTF-8 cannot hold would be refused by SQLite."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _row(run: Run, study: Study) -> dict[str, Any]:
    manifest, counts = run.manifest, dict[str, int]()
    for record in run.records:
        counts[record.status] = counts.get(record.status, 0) + 1
    provenance = facts_of(manifest.provenance, run.records)
    git, libraries = provenance.get("git", {}), provenance.get("libraries", {})
    facts = {name: value for name, value in provenance.items() if name not in _LEFT_OUT}
    facts |= {"libraries": libraries, "harness": provenance.get("worker", {}).get("harness"), "git": git}
    facts |= {"workload": provenance.get("workload", {})}
    return {
        "run": manifest.run,
        "study": study.name,
        "title": study.title,
        "fingerprint": manifest.fingerprint,
        "created_unix_s": manifest.created_unix_s,
        "status": manifest.status,
        "verdict": _verdict(run, study),
        "trials": json.dumps(dict(sorted(counts.items()))),
        "planned": len(manifest.order),
        "sides": int(bool(manifest.sides)),
        "commit_id": git.get("commit"),
        "dirty": int(bool(git.get("dirty"))),
        "versions": json.dumps({name: libraries.get(name) for name in VERSIONS}),
        "facts": json.dumps(codec.to_json(facts)),
    }


def _verdict(run: Run, study: Study) -> str:
    """In a word: how a run stands, or what an A/B found."""
    if not run.manifest.sides:
        return "valid" if standing_of(run, study).valid else "invalid"
    found = [compared.verdict for compared in report_of(run).comparisons]
    if not found:
        return "invalid"
    decided = worst(EXIT_OF[verdict] for verdict in found)
    return next(verdict for verdict in found if EXIT_OF[verdict] == decided)


def _points(run: Run, study: Study) -> Iterator[dict[str, Any]]:
    """The estimates of an ordinary run, each with why it does not count; an A/B has two sides and is no point."""
    if run.manifest.sides:
        return
    side = comparand_of(run)
    names: Sequence[str] = names_of("estimates")
    for values in estimate_rows(run, study):
        row = dict(zip(names, values, strict=True))
        if row["role"] != "variant":
            continue
        measured = side.sides.get(row["variant"])
        broken = side.broken or (measured.broken if measured else "it was not measured")
        kept = ("study", "variant", "variant_id", "phase", "metric", "unit", "value", "low", "high", "replicates")
        yield {name: row[name] for name in kept} | {
            "higher_is_better": int(row["higher_is_better"]),
            "broken": broken,
        }
