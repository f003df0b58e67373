"""Packs a run into one file to send: every sample, every check and every verdict.

Logs and credentials are never packed, and texts of records (examples from the data, and the model's answers to them)
only with `texts`. Paths and machine names stay, since they are part of the measurement.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, redact
from lorameter.records import codec, fileio, store
from lorameter.records.fileio import replacing, write_document
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.packed import SUFFIX, is_packed, write_packed
from lorameter.records.record import TrialRecord
from lorameter.records.store import MANIFEST, TRIALS
from lorameter.records.tempdirs import scratch_folder
from lorameter.records.trials import EvidenceFile, line_of, read_trials

DAMAGED = '{"damaged\n'
"""Replaces a damaged line, which must stay damaged: otherwise a run with a lost trial would look complete."""
_TEXTS = re.compile(r"(?:base_)?answer_\d+|(?:cold_)?completion|examples")
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
    path = Path(name) if fileio.is_file(Path(name) / MANIFEST) else runs / name
    if is_packed(Path(name)) or is_packed(path):
        raise UsageError(f"run {name!r}: it is packed already. Send that file.")
    if not fileio.is_file(path / MANIFEST):
        store.read_run(name, runs)  # raises an error that lists the existing runs
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        raise UsageError(f"run {manifest.run}: it is being measured. Wait for its end, and pack it then.")
    target = output or Path(f"{manifest.run}{SUFFIX}")
    if os.path.lexists(target):
        raise UsageError(f"{target}: there is a file of that name. Remove it, or give another --output.")
    with scratch_folder() as folder:
        write_document(folder / MANIFEST, _clean(codec.to_json(manifest), texts=texts))
        evidence = EvidenceFile(folder)  # a new file, since checks are named by hashes of their content
        with (folder / TRIALS).open("w", encoding="utf-8", errors="replace") as file:
            for record in read_trials(path, path.name):  # including earlier attempts
                if not isinstance(record, TrialRecord):
                    file.write(DAMAGED)
                    continue
                data = _clean(codec.to_json(record), texts=texts)
                cleaned = codec.from_json(TrialRecord, data, f"trial {record.trial}")
                file.write(line_of(cleaned, evidence.add(cleaned.checks)))
        with translate_write_errors(str(target), "Give another --output."), replacing(target, anew=True) as draft:
            write_packed(draft, folder)
    return target


def _clean(data: Any, *, texts: bool) -> Any:
    """Plain data without credentials, and without texts of records unless `texts`."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, list):
        return [_clean(item, texts=texts) for item in data]
    if isinstance(data, dict):
        kept = {key: value for key, value in data.items() if texts or not _TEXTS.fullmatch(key)}
        return {redact(key): _clean(value, texts=texts) for key, value in kept.items()}
    return data
