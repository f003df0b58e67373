"""Manages prepared bases on disk.

A base is read, converted and quantised once, and every process of every run then maps the result. It is a folder, named
by a hash of everything that determines its content, with tensors, configuration and a description. A folder is complete
or absent: it is written under another name, under a lock, then synced and renamed.

A base can be made again, so old ones are removed: those that no run has used for a month, and the least recently used
beyond a total size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorameter.errors import LorameterError
from lorameter.models import catalogue
from lorameter.records import codec, fileio
from lorameter.records.fileio import write_document

ENV_BASES = "LORAMETER_BASES"
DESCRIPTION = "lorameter.json"
"""Written last; its modification time is the time of the last use."""
TENSORS = "base.safetensors"
UNUSED_DAYS = 30
MOST_BYTES = 64 * 2**30
"""Maximum total size of all bases."""
DAY_S = 24 * 3600.0
_DRAFT = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDescription:
    """A prepared base."""

    digest: str
    """XXH3 of the tensor file; SHA-256 would take half a minute for 14 GB."""
    bytes: int
    """Size of the tensor file."""
    name_or_path: str
    """`name_or_path` of the model's configuration."""
    frozen: tuple[str, ...] = ()
    """Names of parameters that require no gradient after loading."""
    device_map: dict[str, str] | None = None
    """The attribute `hf_device_map` of the model; None if it has none."""
    marks: dict[str, bool] = field(default_factory=dict)
    """Other boolean attributes that transformers sets on a loaded model."""
    generation: dict[str, Any] = field(default_factory=dict)
    """The model's generation settings."""
    load_s: float = 0.0
    """Seconds spent on reading, converting and quantising."""


def bases_dir() -> Path:
    """$LORAMETER_BASES, else `bases` in the cache; not created here."""
    own = os.environ.get(ENV_BASES)
    return Path(own) if own else catalogue.cache_dir() / "bases"


def folder_of(facts: Mapping[str, Any]) -> Path:
    """The folder of the base determined by these facts."""
    content = codec.dumps(codec.to_json(facts))
    return bases_dir() / hashlib.sha256(content.encode()).hexdigest()[:16]


def read_description(folder: Path) -> BaseDescription | None:
    """The description of the base in a folder; None if there is none, or if its tensor file has another size."""
    try:
        data = fileio.read_json(folder / DESCRIPTION, fileio.MANIFEST_BYTES)
        description = codec.from_json(BaseDescription, data, "description of a base")
        return description if (folder / TENSORS).stat().st_size == description.bytes else None
    except (OSError, ValueError, LorameterError):  # the file is missing or damaged
        return None


def write_description(folder: Path, description: BaseDescription) -> None:
    """Write the description, which completes the base."""
    write_document(folder / DESCRIPTION, description)


def touch(folder: Path) -> None:
    """Mark a base as used now."""
    with contextlib.suppress(OSError):  # a read-only cache
        (folder / DESCRIPTION).touch()


@contextlib.contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
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


def prune(*, most_bytes: int = MOST_BYTES) -> None:
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
