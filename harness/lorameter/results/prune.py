"""Removes runs, and packs a run into one file to send.

Accepted baselines, runs that are being measured and unreadable runs are never removed. A packed run has every sample,
every check and every verdict. Logs and credentials are never packed, and texts of records (examples from the data, and
the model's answers to them) only with `texts`. Paths and machine names stay, since they are part of the measurement.
"""

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
from typing import Any, NamedTuple

import msgspec

from lorameter.errors import UsageError, redact, require
from lorameter.records import codec, fileio, store
from lorameter.records.fileio import replace_file, scratch_folder, write_document
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.record import TrialRecord
from lorameter.records.store import MANIFEST, PACKED_SUFFIX, TRIALS, Manifest, write_packed
from lorameter.records.trials import EvidenceFile, encode_record, read_trials
from lorameter.verdicts.gate import lock_baselines, read_baselines

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


class PruneResult(NamedTuple):
    """The removed runs, the selected or unreadable runs that stay, and the number of runs kept."""

    removed: list[PruneDecision]
    staying: list[PruneDecision]
    kept: int


def parse_age(text: str) -> float:
    """Seconds of `12h`, `30d` or `8w`. Raises `UsageError`."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--older = {text!r}: not an age. Write hours, days or weeks, as in 12h, 30d, 8w.")
    return float(match[1]) * _UNITS_S[match[2]]


def folder_bytes(path: Path) -> int:
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
) -> PruneResult:
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
        return PruneResult([], [], 0)
    begun_before = time.time() - (older_s or 0.0)
    counts: Counter[str] = Counter()
    selected: list[PruneDecision] = []
    with contextlib.nullcontext() if dry_run else lock_baselines(runs):
        known = sorted(_decide(runs), key=lambda one: -one.created_unix_s)
        for one in known:
            counts[one.study] += 1
            is_newest = keep is not None and counts[one.study] <= keep
            if not one.study or not (is_newest or one.created_unix_s >= begun_before):
                selected.append(one)
        if not dry_run:
            for folder in runs.glob(f"{_REMOVED}*"):  # from a removal that was killed
                shutil.rmtree(folder, ignore_errors=True)
        decided = [
            one if one.why or dry_run else msgspec.structs.replace(one, why=_remove(Path(one.path)))
            for one in reversed(selected)
        ]
    removed, staying = [one for one in decided if not one.why], [one for one in decided if one.why]
    return PruneResult(removed, staying, len(known) - len(selected))


def _decide(runs: Path) -> Iterator[PruneDecision]:
    """Each run of a folder, with the reason why it must stay; an unreadable run belongs to no study."""
    accepted = {baseline.run for baseline in read_baselines(runs).baselines}
    for path in store.list_runs(runs):
        one = PruneDecision(run=path.name, path=str(path), size_bytes=folder_bytes(path))
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
        with store.lock_run(path):
            moved = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=path.parent))
            path.rename(moved / path.name)
        shutil.rmtree(moved)
    except (OSError, UsageError) as error:
        return f"it could not be removed: {error}"
    return ""


DAMAGED = '{"damaged\n'
"""Replaces a damaged line, which must stay damaged: otherwise a run with a lost trial would look complete."""
_TEXT_KEYS = re.compile(r"(?:base_)?answer_\d+|(?:cold_)?completion|examples")
"""Keys whose values are texts of records."""


def pack(name: str, runs: Path, output: Path | None = None, *, texts: bool = False) -> Path:
    """Write a run as one file, which every command accepts in place of a run; returns the file.

    Args:
        name: a run id or a run directory.
        runs: the folder in which ids are looked up.
        output: the file; None for the run's name with `.lorameter.zip` in the working folder.
        texts: whether to include texts of records.

    Raises:
        UsageError, InvalidRunError: the run does not exist or is being measured, or the file cannot be written.
    """
    run = store.read_run(name, runs)
    require(fileio.is_folder(run.path), f"run {name!r}: it is already packed. Send that file.")
    require(not run.live, f"run {run.manifest.run}: it is being measured. Wait for its end, and pack it then.")
    target = output or Path(f"{run.manifest.run}{PACKED_SUFFIX}")
    require(
        not os.path.lexists(target), f"{target}: there is a file of that name. Remove it, or give another --output."
    )
    with scratch_folder() as folder:
        write_document(folder / MANIFEST, _clean(codec.to_json(run.manifest), texts=texts))
        evidence = EvidenceFile(folder)  # a new file, since checks are named by hashes of their content
        with (folder / TRIALS).open("w", encoding="utf-8", errors="replace") as file:
            for record in read_trials(run.path, run.path.name):  # including earlier attempts
                if record is None:
                    file.write(DAMAGED)
                    continue
                data = _clean(codec.to_json(record), texts=texts)
                cleaned = codec.from_json(TrialRecord, data, f"trial {record.trial}")
                file.write(encode_record(cleaned, evidence.add(cleaned.checks)))
        with translate_write_errors(str(target), "Give another --output."), replace_file(target) as draft:
            write_packed(draft, folder)
    return target


def _clean(data: Any, *, texts: bool) -> Any:
    """Plain data without credentials, and without texts of records unless `texts`."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, list):
        return [_clean(item, texts=texts) for item in data]
    if isinstance(data, dict):
        packed = {key: value for key, value in data.items() if texts or not _TEXT_KEYS.fullmatch(key)}
        return {redact(key): _clean(value, texts=texts) for key, value in packed.items()}
    return data
