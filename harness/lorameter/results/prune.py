"""Removal of runs; accepted baselines, runs that are being measured and unreadable runs are kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from lorameter.errors import UsageError
from lorameter.records import fileio, store
from lorameter.records.store import Manifest
from lorameter.verdicts.baselines import lock_baselines, read_baselines

_AGE = re.compile(r"(\d{1,6})([hdw])")
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
_REMOVED = ".removed-"
"""Prefix of folders that hold a run while it is deleted. No command lists their contents."""


class PruneDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The decision to remove a run, or to keep it for a reason: `why`."""

    run: str
    path: str
    study: str = ""
    created_unix_s: float = 0.0
    size_bytes: int
    why: str = ""


class Pruned(NamedTuple):
    """The removed runs, the selected or unreadable runs that stay, and the number of runs kept."""

    removed: list[PruneDecision]
    staying: list[PruneDecision]
    kept: int


def parse_age(text: str) -> float:
    """Seconds of `12h`, `30d` or `8w`. Raises `UsageError`."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--older = {text!r}: no age. Write hours, days or weeks, as in 12h, 30d, 8w.")
    return float(match[1]) * _UNITS_S[match[2]]


def size_of(path: Path) -> int:
    """Bytes of all files of a run; files that are removed during the count are ignored."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.lstat().st_size
    return total


def prune(
    runs: Path,
    *,
    keep: int | None = None,
    older_s: float | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove runs of a folder, while holding the lock under which baselines are accepted.

    Args:
        runs: the folder of runs; packed runs in it are kept.
        keep: number of runs of each study to keep, the newest; None for no limit.
        older_s: remove only runs older than this; None for any age. With both, a run must fulfil both to be removed.
        dry_run: only decide.

    Raises:
        UsageError: the file of accepted baselines cannot be read.
    """
    if not fileio.is_folder(runs):
        return Pruned([], [], 0)
    begun_before = time.time() - (older_s or 0.0)
    counts: Counter[str] = Counter()
    selected, removed, staying = list[PruneDecision](), list[PruneDecision](), list[PruneDecision]()
    with contextlib.nullcontext() if dry_run else lock_baselines(runs):
        known = sorted(_decide(runs), key=lambda one: -one.created_unix_s)
        for one in known:
            counts[one.study] += 1
            is_newest = keep is not None and counts[one.study] <= keep
            if not one.study or not (is_newest or one.created_unix_s >= begun_before):
                selected.append(one)
        if not dry_run:
            for left in runs.glob(f"{_REMOVED}*"):  # from a removal that was killed
                shutil.rmtree(left, ignore_errors=True)
        for one in reversed(selected):
            why = one.why or ("" if dry_run else _remove(Path(one.path)))
            (staying if why else removed).append(msgspec.structs.replace(one, why=why))
    return Pruned(removed, staying, len(known) - len(selected))


def _decide(runs: Path) -> Iterator[PruneDecision]:
    """Each run of a folder, with the reason why it must stay; an unreadable run belongs to no study."""
    accepted = {baseline.run for baseline in read_baselines(runs).baselines}
    for path in store.list_runs(runs):
        one = PruneDecision(run=path.name, path=str(path), size_bytes=size_of(path))
        try:
            manifest = store.read_manifest(path)
            why = _reason_to_keep(path, manifest, accepted)
            began, study = manifest.created_unix_s, str(manifest.study.get("name", ""))
            one = msgspec.structs.replace(one, study=study, created_unix_s=began, why=why)
        except UsageError as error:
            one = msgspec.structs.replace(one, why=f"it cannot be read: {error}")
        if store.is_run(path):  # another process may have removed it
            yield one


def _reason_to_keep(path: Path, manifest: Manifest, accepted: Collection[str]) -> str:
    """Why a run must not be removed; empty if it may be."""
    if path.name in accepted or manifest.run in accepted:
        return "it is an accepted baseline"
    if store.is_live(path, manifest):
        return "it is being measured"
    return "it is a link to a run in another folder" if path.is_symlink() else ""


def _remove(path: Path) -> str:
    """Remove a run; returns why it could not be removed, else an empty text. The run is renamed first, so that it is
    either complete or gone."""
    try:
        with store.writing(path):
            moved = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=path.parent))
            path.rename(moved / path.name)
        shutil.rmtree(moved)
    except (OSError, UsageError) as error:
        return f"it could not be removed: {error}"
    return ""
