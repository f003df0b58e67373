"""Resolves the data of a workload by name: synthetic records, a file, a folder, or a hub data set.

    synthetic
    FILE                              .jsonl, .json, .csv, .parquet or .txt, each also with .gz appended
    FOLDER, FOLDER[SPLIT]             saved by `datasets` (save_to_disk), or with such files in it
    OWNER/NAME, OWNER/NAME:CONFIG     of the hub, either with [SPLIT] behind it

The default split is "train", or the only one. Names are resolved in many places, so no data file is opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorameter.errors import UsageError, require, shorten
from lorameter.records import fileio

SYNTHETIC = "synthetic"
"""Name of the embedded data source: seeded instruction records, no download."""
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PACKED = ".gz"
ENDINGS = tuple(f"{kind}{packed}" for kind in KINDS for packed in ("", PACKED))
REMEDY = (
    f"Give a file ({', '.join(KINDS)}, also with {PACKED}), a folder of such files or saved by datasets, "
    f"a hub id such as owner/name:config[split], or {SYNTHETIC!r}."
)
DEFAULT_SPLIT = "train"
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Words in a file name that name its split, as in `datasets`."""
_NO_DATA = ("dataset_info.json", "dataset_infos.json")
"""Files that `datasets` writes next to data."""
_SPLIT = re.compile(r"(?P<name>.+)\[(?P<split>[\w.-]+)\]")
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[^\[\]:/]+))?")

Kind = Literal["synthetic", "file", "folder", "saved", "hub"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """The source of a workload's records."""

    kind: Kind
    """"saved" is a folder saved by `datasets`, "folder" one with files of records."""
    name: str
    """Path, or hub id."""
    config: str = ""
    split: str = ""
    """Name of the split; "" if there is only one."""
    files: tuple[Path, ...] = ()
    """The data files in order; empty for a hub data set."""

    @property
    def label(self) -> str:
        """Its name, without the path of its folder."""
        name = self.name if self.kind in ("hub", "synthetic") else Path(os.path.abspath(self.name)).name  # noqa: PTH100 unresolved
        return f"{name}{f':{self.config}' if self.config else ''}{f'[{self.split}]' if self.split else ''}"


def resolve(data: str) -> DataSource:
    """Resolve the name of a data source. An existing file or folder takes precedence over a hub data set.

    Raises:
        UsageError: the data or the split does not exist, the file type is unknown, or the folder contains no data.
    """
    where = f"data {shorten(repr(data))}"
    if data == SYNTHETIC:
        return DataSource(kind="synthetic", name=data)
    name, split = data, ""
    if not fileio.is_there(data) and (found := _SPLIT.fullmatch(data)):
        name, split = found["name"], found["split"]
    if fileio.is_folder(name):
        return _folder(Path(name), split, where)
    if fileio.is_there(name):
        require(not split, f"{where}: a file has no splits. Leave [{split}] out.")
        require(fileio.is_file(name), f"{where}: it is no plain file. {REMEDY}")  # a pipe would block
        ends = f"its name ends in none of {', '.join(ENDINGS)}"
        require(name.endswith(ENDINGS), f"{where}: a file of no known kind: {ends}. {REMEDY}")
        return DataSource(kind="file", name=name, files=(Path(name),))
    if name.endswith(ENDINGS) or name.startswith((".", "/", "~")):
        raise UsageError(f"{where}: no such file or folder. {REMEDY}")
    if found := _HUB.fullmatch(name):
        return DataSource(kind="hub", name=found["name"], config=found["config"] or "", split=split or DEFAULT_SPLIT)
    raise UsageError(f"{where}: no such file or folder, and no id of the hub. {REMEDY}")


def make_absolute(data: str) -> str:
    """The name of the same data with an absolute path."""
    found = _SPLIT.fullmatch(data)
    name, behind = (found["name"], f"[{found['split']}]") if found and not fileio.is_there(data) else (data, "")
    return f"{Path(name).absolute()}{behind}" if data != SYNTHETIC and fileio.is_there(name) else data


def _folder(path: Path, split: str, where: str) -> DataSource:
    try:
        names = sorted(entry.name for entry in os.scandir(path))
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}. {REMEDY}") from None
    if "dataset_dict.json" in names:
        chosen = _choose(sorted(state.parent.name for state in path.glob("*/state.json")), split, where)
        return _saved(path, path / chosen, chosen)
    if {"state.json", "dataset_info.json"} <= set(names):
        require(not split, f"{where}: it was saved without splits. Leave [{split}] out.")
        return _saved(path, path, "")
    data = [name for name in names if name.endswith(ENDINGS) and name not in _NO_DATA and (path / name).is_file()]
    return _files(path, data, split, where)


def _saved(path: Path, folder: Path, split: str) -> DataSource:
    files = tuple(sorted(file for file in folder.glob("*.arrow") if file.is_file()))
    return DataSource(kind="saved", name=str(path), split=split, files=files)


def _files(path: Path, names: Sequence[str], split: str, where: str) -> DataSource:
    require(names, f"{where}: no file in it is of a known kind ({', '.join(ENDINGS)}). {REMEDY}")
    splits = {name: set(_splits_in(name)) for name in names}
    known = sorted(set().union(*splits.values()))
    chosen = _choose(known, split, where) if known or split else ""
    require(
        not chosen or split or chosen == DEFAULT_SPLIT or all(chosen in words for words in splits.values()),
        f"{where}: files of {chosen} and others are in it. Name the split, as in …[{chosen}], or a file.",
    )
    taken = [name for name in names if not chosen or chosen in splits[name]]
    kinds = sorted({ending for name in taken if (ending := Path(name.removesuffix(PACKED)).suffix)})
    different = f"files of different kinds are in it: {', '.join(kinds)}"
    require(len(kinds) < 2, f"{where}: {different}. Name one file, or separate them.")
    return DataSource(kind="folder", name=str(path), split=chosen, files=tuple(path / name for name in taken))


def _splits_in(name: str) -> Iterator[str]:
    ending = next(ending for ending in reversed(ENDINGS) if name.endswith(ending))
    words = re.split(r"[^a-z]+", name.removesuffix(ending).lower())
    return (word for word in _SPLIT_WORDS if word in words)


def _choose(splits: Sequence[str], requested: str, where: str) -> str:
    listed = f"There {'are' if splits else 'is'} {', '.join(splits) or 'none'}."
    require(not requested or requested in splits, f"{where}: no split {requested!r}. {listed}")
    require(splits, f"{where}: it has no split. Save it again.")
    only = requested or (DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0])
    several = f"{where}: it has the splits {', '.join(splits)}. Name one, as in …[{splits[0]}]."
    require(requested or only == DEFAULT_SPLIT or len(splits) == 1, several)
    return only
