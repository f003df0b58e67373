"""A run as one file to send: what was measured and under what, and nothing of whose machine it was.

Paths become the names at their end; names of hosts, users and GPUs, and addresses, become words; texts of records (the
examples of the data, and the answers of a model to them) are left out; all unless it is asked for. What remains is
every sample, every check, every verdict. Logs and tokens are never packed.

How these are recognised is in `lorameter.results.private`. A run whose model or data was named by a path is no more
comparable to one that has that path in it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, get_args

from lorameter.errors import UsageError, redact
from lorameter.records import codec, fileio, store
from lorameter.records.fileio import replacing, write_document
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.packed import SUFFIX, is_packed, write_packed
from lorameter.records.record import TrialRecord
from lorameter.records.store import MANIFEST, TRIALS, Manifest
from lorameter.records.tempdirs import scratch_folder
from lorameter.records.trials import EvidenceFile, line_of, read_trials
from lorameter.results.private import without_hosts, without_paths

Private = Literal["paths", "hosts", "texts"]
"""What is left out unless it is asked for."""
PRIVATE: tuple[Private, ...] = get_args(Private)
DAMAGED = '{"damaged\n'
"""Stands for a line that was damaged: it must stay one, or a run that has lost a trial would read as whole."""

_OF_TEXT = re.compile(r"(?:answer|base_answer)_\d+|(?:cold_)?completion")


def pack(name: str, runs: Path, output: Path | None = None, include: Collection[Private] = ()) -> Path:
    """Write a run as one file, which every command reads in place of a run; the file.

    Args:
        name: a run id or a run directory.
        runs: where ids are looked for.
        output: the file; None for the run's name with `.lorameter.zip` in the working folder.
        include: what else goes in.

    Raises:
        UsageError, InvalidRunError: no such run, one that is being measured, or a place that cannot be written.
    """
    path = Path(name) if fileio.is_file(Path(name) / MANIFEST) else runs / name
    if is_packed(Path(name)) or is_packed(path):
        raise UsageError(f"run {name!r}: it is packed already. Send that file.")
    if not fileio.is_file(path / MANIFEST):
        store.read_run(name, runs)  # says that there is none, and which there are
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        raise UsageError(f"run {manifest.run}: it is being measured. Wait for its end, and pack it then.")
    clean = _cleaner(manifest, path, include)
    target = output or Path(f"{clean(manifest.run)}{SUFFIX}")
    if os.path.lexists(target):
        raise UsageError(f"{target}: there is a file of that name. Remove it, or give another --output.")
    with scratch_folder() as folder:
        _write_manifest(folder, manifest, clean, texts="texts" in include)
        _write_records(folder, path, manifest, clean, texts="texts" in include)
        with translate_write_errors(str(target), "Give another --output."), replacing(target, anew=True) as draft:
            write_packed(draft, folder)
    return target


def _write_manifest(folder: Path, manifest: Manifest, clean: Callable[[Any], Any], *, texts: bool) -> None:
    data = codec.to_json(manifest)
    if not texts:
        for tokens in (data["tokens"], *data["tokens"].get("own", {}).values()):
            if "examples" in tokens:
                tokens["examples"] = []
    write_document(folder / MANIFEST, clean(data))


def _write_records(folder: Path, path: Path, manifest: Manifest, clean: Callable[[Any], Any], *, texts: bool) -> None:
    """Every line, earlier attempts included; the checks anew, since their names are hashes of what they say."""
    evidence = EvidenceFile(folder)
    with (folder / TRIALS).open("w", encoding="utf-8", errors="replace") as file:
        for record in read_trials(path, path.name):
            if not isinstance(record, TrialRecord):
                file.write(DAMAGED)
                continue
            cleaned = _cleaned(record, clean, texts=texts)
            file.write(line_of(cleaned, evidence.add(cleaned.checks)))


def _cleaned(record: TrialRecord, clean: Callable[[Any], Any], *, texts: bool) -> TrialRecord:
    data = codec.to_json(record)
    if not texts:
        data["tokens"] = {key: value for key, value in data["tokens"].items() if not _OF_TEXT.fullmatch(key)}
    return codec.from_json(TrialRecord, clean(data), f"trial {record.trial}")


def _cleaner(manifest: Manifest, run: Path, include: Collection[Private]) -> Callable[[Any], Any]:
    """What to do to plain data before it is sent. Credentials are left out whatever is included: an earlier version may
    have written them."""
    steps: list[Callable[[str], str]] = [redact]
    if "paths" not in include:
        steps.append(without_paths(manifest, run))
    if "hosts" not in include:
        steps.append(without_hosts(manifest, run))

    @functools.lru_cache(maxsize=4096)
    def change(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    def clean(data: Any) -> Any:
        if isinstance(data, str):
            return change(data)
        if isinstance(data, dict):
            return {change(key): _log_of(value) if key == "log" else clean(value) for key, value in data.items()}
        return [clean(item) for item in data] if isinstance(data, list) else data

    def _log_of(value: Any) -> Any:
        """The name of a log, in the folder of a run."""
        folder, slash, name = str(value).rpartition("/")
        return f"{folder}{slash}{change(name)}"

    return clean
