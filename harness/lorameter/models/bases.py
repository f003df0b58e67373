"""Bases that were prepared once and are kept: where they lie, which are whole, and which have to go.

A base is read, converted and quantised once, and every process of every run then maps the result. What is kept is a
folder a base, named by a hash of all that its content follows from: tensors, configuration, and a description with the
size and the SHA-256 of the tensors, which is written last. Like the models in the cache a folder is whole or absent: it
is made beside its place, under a lock, and renamed. Nothing in it is trusted for being there: a run that takes a base
first reads it all and compares the hash, and one that is not what was written is made anew.

A base can always be made again, so the disk is not theirs. One that no run has asked for in a month goes, the ones that
were used longest ago go where they are too many together or the disk is full, and none that a run holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from lorameter.records import bounded_io, codec
from lorameter.records.atomic_json import write_document
from lorameter.records.locks import is_locked

ENV_BASES = "LORAMETER_BASES"
DESCRIPTION = "lorameter.json"
"""Written last; its time is when the base was used last."""
TENSORS = "base.safetensors"
UNUSED_DAYS = 30
MOST_BYTES = 64 * 2**30
"""Of all bases together."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DRAFT = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDescription:
    """What a prepared base is, and how to tell that it is still what was written."""

    sha256: str
    """Of the file of tensors."""
    bytes: int
    """Size of that file."""
    name_or_path: str
    """As the model that was loaded itself says it."""
    frozen: tuple[str, ...] = ()
    """Parameters that ask for no gradient as they are loaded."""
    device_map: dict[str, str] | None = None
    """As transformers leaves it on the model; None where it leaves none."""
    marks: dict[str, bool] = field(default_factory=dict)
    """What else transformers leaves on the model itself when it has loaded one."""
    generation: dict[str, Any] = field(default_factory=dict)
    """The model's settings for generation."""
    load_s: float = 0.0
    """That reading, converting and quantising took when it was made."""
    follows_from: dict[str, Any] = field(default_factory=dict)
    """All that the content follows from; the folder's name is a hash of it."""


def bases_dir() -> Path:
    """$LORAMETER_BASES, else `bases` in the cache; not created here."""
    own = os.environ.get(ENV_BASES)
    return Path(own) if own else catalogue.cache_dir() / "bases"


def folder_of(follows_from: Mapping[str, Any]) -> Path:
    """Where the base lies, or is to lie, whose content follows from this."""
    content = codec.dumps(codec.to_json(follows_from))
    return bases_dir() / hashlib.sha256(content.encode()).hexdigest()[:16]


def read_description(folder: Path) -> BaseDescription | None:
    """What is said of the base in a folder; None where there is none, or one whose file has not the size that was
    written. That the bytes are those is `verify`'s to say."""
    try:
        data = bounded_io.read_json(folder / DESCRIPTION, bounded_io.MANIFEST_BYTES)
        description = codec.from_json(BaseDescription, data, "description of a base")
        return description if (folder / TENSORS).stat().st_size == description.bytes else None
    except (OSError, ValueError, LorameterError):  # whatever is written there
        return None


def verify(folder: Path) -> BaseDescription | None:
    """The description of a base that is byte for byte what was written; None for any other. Reads all of it."""
    description = read_description(folder)
    if description is None:
        return None
    try:
        with (folder / TENSORS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    return description if found == description.sha256 else None


def write_description(folder: Path, description: BaseDescription) -> None:
    """Say that the base in a folder is whole."""
    write_document(folder / DESCRIPTION, description)


def touch(folder: Path) -> None:
    """Say that a base is used now."""
    with contextlib.suppress(OSError):  # a cache that may only be read is nobody's to tidy
        (folder / DESCRIPTION).touch()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Meanwhile nobody removes this base, if it is there."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not there, or a disk without locks
            file = stack.enter_context((folder / DESCRIPTION).open("rb"))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A draft beside `folder`, to be filled; it takes its place at the end, and nothing is left of one that fails.

    The caller holds the lock of `folder`.

    Raises:
        OSError: the disk refuses.
    """
    draft = folder.with_name(f"{folder.name}{_DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)  # of one that was killed; the lock says that nobody is at it
    try:
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(folder, ignore_errors=True)  # there, and not whole
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def prune(*, most_bytes: int = MOST_BYTES, unused_days: float = UNUSED_DAYS) -> int:
    """Remove bases that nobody holds: those unused for so long, and the longest unused until the rest has at most so
    many bytes. Returns the bytes that were freed."""
    found: list[tuple[float, int, Path]] = []
    with contextlib.suppress(OSError):
        for draft in bases_dir().glob(f"*{_DRAFT}"):  # of a process that was killed, unless one is at it
            if not is_locked(draft.with_name(draft.name.removesuffix(_DRAFT))):
                shutil.rmtree(draft, ignore_errors=True)
        for description in bases_dir().glob(f"*/{DESCRIPTION}"):
            with contextlib.suppress(OSError):  # another process removes it as well
                if not description.parent.name.endswith(_DRAFT):
                    found.append((description.stat().st_mtime, _size(description.parent), description.parent))
    total, freed = sum(size for _, size, _ in found), 0
    for used, size, folder in sorted(found):
        old = time.time() - used > unused_days * 24 * 3600
        if (old or total - freed > most_bytes) and _remove(folder):
            freed += size
    return freed


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _remove(folder: Path) -> bool:
    """Whether a base could be removed, which nobody may hold then."""
    try:
        with (folder / DESCRIPTION).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:
        return False
    return True
