"""Which runs go: never one that somebody accepted, that is being measured, or of which nobody knows what it is."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import UsageError
from harness.records import inputs, store
from harness.records.store import MANIFEST
from harness.verdicts.baselines import read_baselines

_AGE = re.compile(r"(\d{1,6})([hdw])")
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A run that goes, or that stays for a reason."""

    run: str
    path: str
    study: str
    created_unix_s: float
    size_bytes: int
    why: str = ""
    """Why it stays; empty where it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What becomes of the runs of a folder."""

    going: tuple[Candidate, ...]
    staying: tuple[Candidate, ...]
    """What would go, but for a reason."""
    kept: int
    """Runs that nobody asked to remove."""


def parse_age(text: str) -> float:
    """Seconds of `12h`, `30d` or `8w`. Raises `UsageError`."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--older = {text!r}: no age. Write hours, days or weeks, as in 12h, 30d, 8w.")
    return float(found[1]) * _UNITS_S[found[2]]


def size_of(path: Path) -> int:
    """Bytes of all files of a run; of what goes meanwhile nothing."""
    total = 0
    for file in path.rglob("*") if inputs.is_folder(path) else (path,):
        with contextlib.suppress(OSError):
            total += file.lstat().st_size if file.is_symlink() or file.is_file() else 0
    return total


def choose(
    runs: Path, *, keep: int | None = None, older_s: float | None = None, now_unix_s: float | None = None
) -> Choice:
    """Which runs of a folder go.

    Args:
        runs: the folder of runs; what is packed there is no run's folder and stays.
        keep: so many of each study stay, the newest; None for no limit.
        older_s: only older ones go; None for any age. Where both are given a run goes for which both say so.
        now_unix_s: from when on ages are counted; None for now.

    Raises:
        UsageError: the file of accepted baselines cannot be read, so that nobody knows what must stay.
    """
    accepted = {baseline.run for baseline in read_baselines(runs).baselines}
    now = time.time() if now_unix_s is None else now_unix_s
    unknown: list[Candidate] = []
    known: list[Candidate] = []
    for path in store.list_runs(runs):
        try:
            manifest = store.read_manifest(path)
        except UsageError as error:
            unknown.append(_candidate(path, why=f"nobody can tell what it is: {error}"))
            continue
        why = ""
        if path.name in accepted or manifest.run in accepted:
            why = "it is an accepted baseline"
        elif store.is_live(path, manifest):
            why = "it is being measured"
        elif path.is_symlink():
            why = "it is a link to a run that lies elsewhere"
        study = str(manifest.study.get("name", ""))
        known.append(_candidate(path, study=study, created=manifest.created_unix_s, why=why))
    seen: Counter[str] = Counter()
    asked: list[Candidate] = []
    for one in sorted(known, key=lambda one: -one.created_unix_s):
        seen[one.study] += 1
        if (keep is None or seen[one.study] > keep) and (older_s is None or now - one.created_unix_s > older_s):
            asked.append(one)
    going = tuple(reversed([one for one in asked if not one.why]))
    staying = (*reversed([one for one in asked if one.why]), *unknown)
    return Choice(going=going, staying=staying, kept=len(known) - len(asked))


def _candidate(path: Path, *, study: str = "", created: float = 0.0, why: str = "") -> Candidate:
    size = size_of(path)
    return Candidate(run=path.name, path=str(path), study=study, created_unix_s=created, size_bytes=size, why=why)


def remove(going: Sequence[Candidate]) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """Remove runs; those that went, and those that the disk or another process would not let go.

    The manifest goes first: what is left of a run that was half removed is none.
    """
    gone: list[Candidate] = []
    refused: list[Candidate] = []
    for one in going:
        path = Path(one.path)
        try:
            with store.writing(path):
                (path / MANIFEST).unlink()
            shutil.rmtree(path)
        except (OSError, UsageError) as error:
            refused.append(replace(one, why=f"it could not be removed: {error}"))
        else:
            gone.append(one)
    return tuple(gone), tuple(refused)
