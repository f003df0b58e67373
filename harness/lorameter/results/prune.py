"""Removal of runs; accepted baselines, runs that are being measured and unreadable runs are kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lorameter.errors import UsageError
from lorameter.records import fileio, store
from lorameter.records.store import Manifest
from lorameter.verdicts.baselines import deciding, read_baselines

_AGE = re.compile(r"(\d{1,6})([hdw])")
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
_REMOVED = ".removed-"
"""Begins the names of folders that hold a run while it is deleted. No command lists what is in them."""


class PruneDecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that is removed, or that is kept for a reason."""

    run: str
    path: str
    study: str
    created_unix_s: float
    size_bytes: int
    why: str = ""
    """Why it is kept; empty where it is removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The decisions on the runs of a folder."""

    removed: tuple[PruneDecision, ...]
    staying: tuple[PruneDecision, ...]
    """Selected, but kept for a reason."""
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


def prune(
    runs: Path,
    *,
    keep: int | None = None,
    older_s: float | None = None,
    dry_run: bool = False,
    now_unix_s: float | None = None,
) -> Pruned:
    """Remove runs of a folder, under the lock under which baselines are accepted.

    Args:
        runs: the folder of runs; packed runs in it are kept.
        keep: number of runs of each study to keep, the newest; None for no limit.
        older_s: remove only runs older than this; None for any age. With both, a run must fulfil both to be removed.
        dry_run: only decide.
        now_unix_s: the time from which ages are counted; None for now.

    Raises:
        UsageError: the file of accepted baselines cannot be read.
    """
    if not fileio.is_folder(runs):
        return Pruned(removed=(), staying=(), kept=0)
    with contextlib.nullcontext() if dry_run else deciding(runs):
        selected, unreadable, kept = _select(runs, keep, older_s, time.time() if now_unix_s is None else now_unix_s)
        if not dry_run:
            for left in runs.glob(f"{_REMOVED}*"):  # by a removal that was killed
                shutil.rmtree(left, ignore_errors=True)
            selected = [one if one.why else msgspec.structs.replace(one, why=_remove(one)) for one in selected]
    return Pruned(
        removed=tuple(one for one in selected if not one.why),
        staying=(*(one for one in selected if one.why), *unreadable),
        kept=kept,
    )


def _select(
    runs: Path, keep: int | None, older_s: float | None, now_unix_s: float
) -> tuple[list[PruneDecision], list[PruneDecision], int]:
    """The runs that are selected, oldest first; those that cannot be read; and how many are not selected."""
    accepted = {baseline.run for baseline in read_baselines(runs).baselines}
    known: list[PruneDecision] = []
    unreadable: list[PruneDecision] = []
    for path in store.list_runs(runs):
        try:
            manifest = store.read_manifest(path)
        except UsageError as error:
            unreadable += [_decision(path, "", 0.0, f"it cannot be read: {error}")] if store.is_run(path) else []
            continue
        why = _reason_to_keep(path, manifest, accepted)
        one = _decision(path, str(manifest.study.get("name", "")), manifest.created_unix_s, why)
        known += [one] if store.is_run(path) else []  # another process may have removed it
    seen: Counter[str] = Counter()
    selected = []
    for one in sorted(known, key=lambda one: -one.created_unix_s):
        seen[one.study] += 1
        if (keep is None or seen[one.study] > keep) and (older_s is None or now_unix_s - one.created_unix_s > older_s):
            selected.append(one)
    return selected[::-1], unreadable, len(known) - len(selected)


def _decision(path: Path, study: str, created_unix_s: float, why: str) -> PruneDecision:
    return PruneDecision(
        run=path.name, path=str(path), study=study, created_unix_s=created_unix_s, size_bytes=size_of(path), why=why
    )


def _reason_to_keep(path: Path, manifest: Manifest, accepted: Collection[str]) -> str:
    """Why a run may not be removed; empty where it may."""
    if path.name in accepted or manifest.run in accepted:
        return "it is an accepted baseline"
    if store.is_live(path, manifest):
        return "it is being measured"
    return "it is a link to a run in another folder" if path.is_symlink() else ""


def _remove(one: PruneDecision) -> str:
    """Remove a run; why it could not be removed, else an empty text. It is renamed first, so that it is there
    in whole or not at all."""
    path = Path(one.path)
    try:
        with store.writing(path):
            moved = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=path.parent))
            path.rename(moved / path.name)
        shutil.rmtree(moved)
    except (OSError, UsageError) as error:
        return f"it could not be removed: {error}"
    return ""
