"""Manages the cache of prepared bases on disk.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorameter.errors import LorameterError
from lorameter.models import catalogue
from lorameter.records import codec, fileio
from lorameter.records.record import BaseSummary

ENV_BASES = "LORAMETER_BASES"
DESCRIPTION = "lorameter.json"
"""The summary of a base. Written last; its modification time is the time of the last use."""
TENSORS = "base.pt"
UNUSED_DAYS = 30
MAX_BYTES = 64 * 2**30
"""Maximum total size of all bases."""
DAY_S = 24 * 3600.0


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


def prune(*, most_bytes: int = MAX_BYTES) -> None:
    """Remove bases that were not used for a month, and the least recently used ones until the rest has at most
    `most_bytes`. Bases of running measurements, which were used within a day, are kept."""
    bases: list[tuple[float, Path]] = []
    for folder in bases_dir().glob("*/"):
        with contextlib.suppress(OSError):  # another process may also be removing it
            used = folder if folder.name.endswith(fileio.DRAFT_SUFFIX) else folder / DESCRIPTION
            bases.append((time.time() - used.stat().st_mtime, folder))
    total = sum(file.stat().st_size for _, folder in bases for file in folder.iterdir())
    for idle_s, folder in sorted(bases, reverse=True):
        if idle_s > UNUSED_DAYS * DAY_S or (total > most_bytes and idle_s > DAY_S):
            total -= sum(file.stat().st_size for file in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)
