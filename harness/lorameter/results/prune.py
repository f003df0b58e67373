"""Removal of runs; accepted baselines, runs that are being measured and unreadable runs are kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.records.manifest import Manifest
from lorameter.verdicts.baselines import deciding, read_baselines

_AGE = re.compile(r"(\d{1,6})([hdw])")
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
_REMOVED = ".removed-"
"""Begins the names of folders that hold a run while it is deleted. No command lists what is in them."""


class PruneDecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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

    going: tuple[PruneDecision, ...]
    staying: tuple[PruneDecision, ...]
    """What would go, but for a reason."""
    kept: int
    """Runs that were not selected."""


def parse_age(text: str) -> float:
    """Seconds of `12h`, `30d` or `8w`. Raises `UsageError`."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--older = {text!r}: no age. Write hours, days or weeks, as in 12h, 30d, 8w.")
    return float(found[1]) * _UNITS_S[found[2]]


def size_of(path: Path) -> int:
    """Bytes of all files of a run; files that are removed meanwhile count as nothing."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    total = 0
    for file in files:
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
        UsageError: the file of accepted baselines cannot be read.
    """
    accepted = _accepted(runs)
    now = time.time() if now_unix_s is None else now_unix_s
    unknown: list[PruneDecision] = []
    known: list[PruneDecision] = []
    for path in store.list_runs(runs):
        try:
            manifest = store.read_manifest(path)
        except UsageError as error:
            one = _candidate(path, why=f"it cannot be read: {error}")
            unknown += [one] if store.is_run(path) else []
            continue
        study = str(manifest.study.get("name", ""))
        why = _why_it_stays(path, manifest, accepted)
        one = _candidate(path, study=study, created=manifest.created_unix_s, why=why)
        known += [one] if store.is_run(path) else []
    seen: Counter[str] = Counter()
    asked: list[PruneDecision] = []
    for one in sorted(known, key=lambda one: -one.created_unix_s):
        seen[one.study] += 1
        if (keep is None or seen[one.study] > keep) and (older_s is None or now - one.created_unix_s > older_s):
            asked.append(one)
    unbegun = [
        _candidate(path, study="killed before its first trial", created=path.lstat().st_mtime)
        for path in store.list_unbegun(runs)
    ]
    asked += [one for one in unbegun if older_s is None or now - one.created_unix_s > older_s]
    going = tuple(reversed([one for one in asked if not one.why]))
    staying = (*reversed([one for one in asked if one.why]), *unknown)
    return Choice(going=going, staying=staying, kept=len(known) - len(asked))


def _candidate(path: Path, *, study: str = "", created: float = 0.0, why: str = "") -> PruneDecision:
    size = size_of(path)
    return PruneDecision(run=path.name, path=str(path), study=study, created_unix_s=created, size_bytes=size, why=why)


def _accepted(runs: Path) -> set[str]:
    return {baseline.run for baseline in read_baselines(runs).baselines}


def _why_it_stays(path: Path, manifest: Manifest, accepted: Collection[str]) -> str:
    """Why a run may not be removed; empty where it may."""
    if path.name in accepted or manifest.run in accepted:
        return "it is an accepted baseline"
    if store.is_live(path, manifest):
        return "it is being measured"
    return "it is a link to a run in another folder" if path.is_symlink() else ""


def remove(runs: Path, going: Sequence[PruneDecision]) -> tuple[tuple[PruneDecision, ...], tuple[PruneDecision, ...]]:
    """Remove runs, and what an earlier removal that was killed has left.

    A run is moved into a folder of its own name first, so that it is there as a whole or not at all.

    Args:
        runs: the folder of runs.
        going: what `choose` has found there.

    Returns:
        The runs that were removed, and those that were not, each with the reason: one that was accepted since, that is
        measured again, or that the disk refused. A run that another process has removed is in neither.
    """
    for path in _left_behind(runs):
        with contextlib.suppress(OSError):
            _delete(path)
    gone: list[PruneDecision] = []
    refused: list[PruneDecision] = []
    for one in going:
        moved = None
        try:
            moved, why = _move_away(runs, Path(one.path))
            if moved is not None:
                _delete(moved)
        except (OSError, UsageError) as error:
            why = f"it could not be removed: {error}" if moved is None else f"its files are still in {moved}: {error}"
        if why:
            refused.append(msgspec.structs.replace(one, why=why))
        elif moved is not None:
            gone.append(one)
    return tuple(gone), tuple(refused)


def _left_behind(runs: Path) -> list[Path]:
    """Folders of removals that were killed, or that another process is just deleting."""
    if not list(runs.glob(f"{_REMOVED}*")):
        return []
    with deciding(runs):  # no process is between making its folder and moving a run into it
        return list(runs.glob(f"{_REMOVED}*"))


def _move_away(runs: Path, path: Path) -> tuple[Path | None, str]:
    """Where a run was moved to be deleted, or why it stays; neither where it is no longer there."""
    with deciding(runs):
        begun = store.is_run(path)
        if not begun and not store.is_held_by_nobody(path):
            return None, ""
        if begun and (why := _why_it_stays(path, store.read_manifest(path), _accepted(runs))):
            return None, why
        with store.writing(path):
            moved = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=runs))
            path.rename(moved / path.name)
    return moved, ""


def _delete(folder: Path) -> None:
    """Delete a folder that another process may be deleting, too."""
    while os.path.lexists(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
