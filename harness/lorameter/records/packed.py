"""Reads and writes packed runs: a zip archive of the files in a run's folder, made by `lorameter pack`.

A reader gets a temporary folder, so that all runs are read in the same way. Only the known files of a run are
extracted, under fixed names and up to a maximum size, because a file from another user may contain anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.records import fileio
from lorameter.records.fileio import scratch_folder
from lorameter.records.os_errors import OF_THE_MACHINE, translate_write_errors

SUFFIX = ".lorameter.zip"
MEMBERS = ("manifest.json", "trials.jsonl", "checks.jsonl")
"""The measurement files of a run; every run has the first one."""
MAX_BYTES = 4 << 30
"""Limit of their total size: three times that of a run with a hundred thousand trials."""
_REMEDY = "Ask for the file again, or for the run's directory."


def is_packed(path: Path) -> bool:
    """Whether a file exists and contains an archive."""
    return fileio.is_file(path) and zipfile.is_zipfile(path)


def list_packed(folder: Path) -> list[Path]:
    """The packed runs in a folder, by name."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if is_packed(path))


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a packed run into a temporary folder, which is removed at the end.

    Inside the block, errors about the folder name the packed file instead, because the user knows only the file.

    Raises:
        UsageError: the file contains no run, is damaged, or is too large for a run.
        InvalidRunError: there is no disk space to unpack it.
    """
    with scratch_folder() as folder:
        with translate_write_errors(f"{path}, unpacked into {folder.parent}", "Name another folder with TMPDIR."):
            try:
                with zipfile.ZipFile(path) as archive:
                    _extract(archive, path, folder)
            # zipfile raises RuntimeError for an encrypted member, and a subclass of it for an unknown compression.
            except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
                if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                    raise
                raise UsageError(f"{path}: cannot be unpacked: {error}. {_REMEDY}") from None
        try:
            yield folder
        except UsageError as error:
            message = str(error).replace(f"{folder}{os.sep}", f"{path}: ")
            raise UsageError(message if path.name in message else f"{path}: {message}") from None


def _extract(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    entries = {info.filename: info for info in archive.infolist()}
    if MEMBERS[0] not in entries:
        raise UsageError(f"{path}: an archive without {MEMBERS[0]} is no packed run. {_REMEDY}")
    left = MAX_BYTES
    for name in MEMBERS:
        if name not in entries:
            continue
        if entries[name].file_size > left:  # reading stops at the stated size, whatever follows
            raise UsageError(f"{path}: it holds more than the {MAX_BYTES >> 30} GiB that are read. {_REMEDY}")
        left -= entries[name].file_size
        with archive.open(entries[name]) as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target)


def write_packed(target: Path, folder: Path) -> None:
    """Write the run in a folder as one file; equal runs give identical files.

    Raises:
        OSError: the file cannot be written.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in MEMBERS:
            if (folder / name).is_file():
                info = zipfile.ZipInfo(name)  # the default time, 1980, does not reveal when it was packed
                info.compress_type = zipfile.ZIP_DEFLATED
                with (folder / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                    shutil.copyfileobj(source, member)
