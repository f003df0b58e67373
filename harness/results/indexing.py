"""How runs get into the index: its tables, and what of a run becomes a row of each.

A run is read again when one of its files has changed, and what has gone is taken out, all at once or not at all.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import LorameterError
from harness.records import codec, inputs, store
from harness.records.evidence import CHECKS
from harness.records.packed import list_packed
from harness.records.store import MANIFEST, TRIALS, Run
from harness.results.columns import names_of
from harness.results.prune import size_of
from harness.results.rows import estimate_rows
from harness.studies.stored import read_study
from harness.studies.study import Study
from harness.verdicts.ab import report_of
from harness.verdicts.comparand import comparand_of
from harness.verdicts.mixed import is_mixed
from harness.verdicts.outcome import EXIT_OF, worst
from harness.verdicts.software import facts_of
from harness.verdicts.standing import newer_faults, say_broken, standing_of

VERSION = 2
"""Raised with whatever is kept in it, or how it is worked out."""
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions stand beside each run."""
_LEFT_OUT = ("worker", "git", "workload", "libraries", "packages")
"""Of the provenance, in what is kept of it: the first two and the libraries have columns, the others are large."""
_TABLES = """
CREATE TABLE runs (
    folder TEXT PRIMARY KEY, stamp TEXT NOT NULL, error TEXT, run TEXT, study TEXT, title TEXT, fingerprint TEXT,
    created_unix_s REAL, status TEXT, verdict TEXT, trials TEXT, planned INTEGER, sides INTEGER, size_bytes INTEGER,
    commit_id TEXT, dirty INTEGER, versions TEXT, facts TEXT, newer_schema INTEGER
);
CREATE TABLE points (
    folder TEXT NOT NULL, study TEXT, variant TEXT, variant_id TEXT, phase TEXT, metric TEXT, unit TEXT,
    higher_is_better INTEGER, value REAL, low REAL, high REAL, replicates INTEGER, broken TEXT
);
CREATE INDEX by_metric ON points (metric, study, variant);
CREATE INDEX by_folder ON points (folder);
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Those of this version, in an empty database."""
    connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")


def refresh(connection: sqlite3.Connection, runs: Path) -> None:
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
        run = store.read_run(str(path), path.parent, newer=True)
        study = read_study(run)
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
        "newer_schema": run.newer.schema if run.newer else None,
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
    """The estimates of an ordinary run, each with why it does not count; an A/B has two sides and is no point, and
    neither is a run of unlike sites."""
    if run.manifest.sides or is_mixed(run):
        return
    side, newer = comparand_of(run), say_broken(run.manifest.run, tuple(newer_faults(run)))
    names: Sequence[str] = names_of("estimates")
    for values in estimate_rows(run, study):
        row = dict(zip(names, values, strict=True))
        if row["role"] != "variant":
            continue
        measured = side.sides.get(row["variant"])
        broken = newer or side.broken or (measured.broken if measured else "it was not measured")
        kept = ("study", "variant", "variant_id", "phase", "metric", "unit", "value", "low", "high", "replicates")
        yield {name: row[name] for name in kept} | {
            "higher_is_better": int(row["higher_is_better"]),
            "broken": broken,
        }
