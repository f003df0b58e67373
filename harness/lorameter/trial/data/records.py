"""Reads the records of a workload from data files and data sets, recognises their columns, and validates every record.

JSON and CSV are read with the standard library: `datasets` infers types (the answer "2024-01-01" becomes a date, "3" a
number and "null" None) and does not report line numbers. Parquet is read with pyarrow, folders of `save_to_disk` and
hub data sets with `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorameter.errors import UsageError, format_error, require, shorten
from lorameter.models import catalogue
from lorameter.studies.workload import PACKED, REMEDY, DataColumns, DataSource, Workload, resolve
from lorameter.trial.data.chat import REPAIR, Conversation, check_text, read_conversation

Record = dict[str, str]
AnyRecord = Record | Conversation

PREVIEW_RECORDS = 20_000
"""Maximum number of records that are validated before a run; more would take seconds."""
BATCH_ROWS = 256

OPTIONAL = "context"
"""The optional part of a record."""
_KNOWN: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "context": "context", "response": "response"},
    {"instruction": "instruction", "context": "input", "response": "output"},
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"messages": "conversations"},
    {"text": "text"},
)
"""Column of each part: databricks-dolly-15k, Alpaca, prompts with completions, chats, ShareGPT, plain text."""
_KNOWN_WORDS = "; ".join(", ".join(columns.values()) for columns in _KNOWN)
_MAP_THEM = 'Map them in the study: [workload] columns = { instruction = "question", response = "answer" }.'


def read_records(workload: Workload) -> tuple[Iterator[AnyRecord], str]:
    """The records of a workload in an order fixed by `data_seed`, and a description of them.

    Raises:
        UsageError: the data cannot be read or is empty, or a record lacks a text or does not suit the workload; the
            message names file and row.
    """
    source = resolve(workload.data)
    if source.kind == "synthetic":
        return synthetic_records(workload.data_seed), f"synthetic instruction records, seed {workload.data_seed}"
    pairs = list(_records(source, workload))
    records = [record for _, record in pairs]
    random.Random(workload.data_seed).shuffle(records)
    return iter(records), f"{source.label}, {len(records)} records of {pairs[0][0].title}"


def describe_data(workload: Workload) -> str:
    """A description of the data from its first records; a hub data set, which may have to be downloaded, is only named.

    Raises:
        UsageError: `read_records` would refuse the data, as far as it is read here.
    """
    source = resolve(workload.data)
    if source.kind == "synthetic":
        return f"synthetic instruction records, seed {workload.data_seed}"
    if source.kind == "hub":
        return f"{source.label} of the hub, checked when it is downloaded"
    pairs = list(itertools.islice(_records(source, workload), PREVIEW_RECORDS))
    count, title = len(pairs), pairs[0][0].title
    if count == PREVIEW_RECORDS:
        return f"{source.label}, records of {title}; the first {count} were checked"
    require(
        count > workload.held_out_records,
        f"data {workload.data!r}: {count} records, and held_out_records = {workload.held_out_records}: none is left to "
        "train on. Hold out fewer, or use more data.",
    )
    return f"{source.label}, {count} records of {title}"


def _records(source: DataSource, workload: Workload) -> Iterator[tuple[RecordForm, AnyRecord]]:
    """The records of all files in order, each with the form of the first one."""
    where = f"data {shorten(repr(workload.data))}"
    first: tuple[str, RecordForm] | None = None
    for place, rows in _tables(source, where):
        form = None
        for row_place, row in rows:
            if not isinstance(row, dict):
                why = "a record with named columns is expected"
                raise UsageError(f"{row_place}: {shorten(repr(row), 60)}: {why}. {REPAIR}")
            if form is None:
                form = recognise(tuple(row), workload.columns, place)
                _check_use(form, workload)
                first = first or (place, form)
                different = f"{form.title}, and {first[0]} has {first[1].title}"
                require(form == first[1], f"{place}: {different}. Use one at a time.")
            yield form, form.read(row, row_place)
    if first is None:
        raise UsageError(f"{where}: it has no records. Known are records of {_KNOWN_WORDS}.")


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordForm:
    """The column of each part of a record; a record may lack the optional one."""

    columns: dict[str, str]
    title: str
    """The columns of the first record as text, with their parts if the study names them."""

    def read(self, row: dict[str, Any], place: str) -> AnyRecord:
        """The record in a row. Raises `UsageError` with the place for a row that does not have this form."""
        for part, column in self.columns.items():
            if column not in row and part != OPTIONAL:
                raise UsageError(f"{place}: no column {_quote(column)}. The first record has {self.title}. {REPAIR}")
        if "messages" in self.columns:
            column = self.columns["messages"]
            return read_conversation(row[column], place, column)
        return {
            part: "" if part == OPTIONAL and row.get(column) is None else check_text(row[column], f"{place}: {column}")
            for part, column in self.columns.items()
        }


def recognise(names: Sequence[str], columns: DataColumns, place: str) -> RecordForm:
    """The form of the records in a table with these column names.

    Raises:
        UsageError: a required column is missing, no known form fits, or several forms fit.
    """
    available = f"There are {shorten(', '.join(map(repr, names)), 200) or 'none'}."
    remedy = _MAP_THEM
    if columns.family is not None:
        parts = {part: columns.parts.get(part, part) for part in columns.family}
        needed = [column for part, column in parts.items() if part != OPTIONAL or part in columns.parts]
        remedy = "Correct [workload] columns."
    else:
        fitting = [one for one in _KNOWN if all(name in names for part, name in one.items() if part != OPTIONAL)]
        fitting = [one for one in fitting if "text" not in one] or fitting  # a text column repeats the others
        kinds = " and as ".join("/".join(column for column in one.values() if column in names) for one in fitting)
        require(len(fitting) < 2, f"{place}: its columns can be read as {kinds}. {_MAP_THEM}")
        parts = max(fitting or _KNOWN, key=lambda one: sum(column in names for column in one.values()))
        needed = [column for part, column in parts.items() if part != OPTIONAL]
        known = set(needed) & set(names)
        require(known, f"{place}: no known columns. {available} Known: {_KNOWN_WORDS}. {_MAP_THEM}")
    if missing := [column for column in needed if column not in names]:
        need = f"which records of {', '.join(parts.values())} need"
        raise UsageError(f"{place}: no column {_quote(missing[0])}, {need}. {available} {remedy}")
    present = {part: column for part, column in parts.items() if column in names}
    title = "/".join(present.values())
    if columns.family is not None:
        title = ", ".join(f"{column} as {part}" for part, column in present.items())
    return RecordForm(columns=parts, title=title)


def _quote(name: str) -> str:
    return shorten(repr(name), 60)


def _check_use(form: RecordForm, workload: Workload) -> None:
    """Raise `UsageError` for records that do not suit the workload."""
    has_parts = "text" not in form.columns
    require(
        has_parts or workload.loss == "all",
        f"workload: loss = 'answer': {form.title} has no separate answer. Use loss = \"all\".",
    )
    require(
        has_parts or not workload.open_ended_tokens,
        f"workload: open_ended_tokens = {workload.open_ended_tokens}: {form.title} has no prompts that a model could "
        "answer. Use open_ended_tokens = 0.",
    )
    require(
        "instruction" in form.columns or workload.prompt_format == "answer-instruction",
        f"workload: prompt_format = {workload.prompt_format!r}: it is for instructions with responses, and the data "
        f"has {form.title}. Leave it out.",
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(source: DataSource, where: str) -> Iterator[tuple[str, Iterator[tuple[str, Any]]]]:
    """Each file, or the data set, by name, with its rows and their places."""
    if source.kind in ("hub", "saved"):
        yield where, _place_rows(where, "row", 1, _read_data_set(source, where))
    for path in source.files if source.kind in ("file", "folder") else ():
        place = f"{where}, {path.name}" if source.kind == "folder" else where
        unit, number, read = _READERS[Path(path.name.removesuffix(PACKED)).suffix]
        yield place, _place_rows(place, unit, number, read(path))


def _place_rows(where: str, unit: str, first: int, rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """Each row with its place. An exception of the reader is reported with the row at which it occurred."""
    for number in itertools.count(first):
        place = f"{where}, {unit} {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except UsageError:
            raise
        except Exception as error:  # the exception's type depends on the library
            raise UsageError(
                f"{place}: cannot be read: {format_error(error).rstrip('.')}. Correct or restore it."
            ) from None
        if row is not _BLANK:
            yield place, row


_BLANK = object()
"""A line without a record."""


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.endswith(PACKED) else path.open("rb")


def _read_lines(path: Path, read: Callable[[bytes], Any] = json.loads) -> Iterator[Any]:
    with _open(path) as file:
        for line in file:
            yield read(line) if line.strip() else _BLANK


def _read_text(path: Path) -> Iterator[Any]:
    return _read_lines(path, lambda line: {"text": line.decode("utf-8-sig").rstrip("\r\n")})


def _read_json(path: Path) -> Iterator[Any]:
    """The records of a list, or one record per line if the file does not begin with a bracket."""
    with _open(path) as file:
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        yield from json.load(file) if is_list else _read_lines(path)


def _read_csv(path: Path) -> Iterator[Any]:
    """Rows as dicts; an empty cell becomes None, since CSV does not distinguish them."""
    csv.field_size_limit(1 << 30)  # characters of a cell; the library's default is 131,072
    with _open(path) as file:
        rows = csv.reader((line.decode("utf-8-sig") for line in file), strict=True)
        names = next(rows, [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two columns have the name {_quote(twice[0])}")
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"{len(row)} cells, and the first row names {len(names)} columns")
            yield {name: cell or None for name, cell in zip(names, row, strict=True)} if row else _BLANK


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with _open(path) as file, parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()


_READERS: dict[str, tuple[str, int, Callable[[Path], Iterator[Any]]]] = {
    ".jsonl": ("line", 1, _read_lines),
    ".json": ("record", 1, _read_json),
    ".csv": ("row", 2, _read_csv),
    ".txt": ("line", 1, _read_text),
    ".parquet": ("row", 1, _read_parquet),
}
"""By file suffix: the name of a row, the number of the first row, and the function that reads rows."""


def _read_data_set(source: DataSource, where: str) -> Iterator[Any]:
    """Read a folder of `save_to_disk`, or a split of a hub data set, which is downloaded into its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.kind == "saved":
            data: Any = datasets.load_from_disk(str(Path(source.name) / source.split))
        else:
            if not catalogue.hub_answers(f"datasets/{source.name}"):
                datasets.config.HF_HUB_OFFLINE = True  # `datasets` would retry for six minutes before it uses its cache
            data = datasets.load_dataset(source.name, source.config or None, split=source.split)
    except Exception as error:  # see above
        remedy = REMEDY if source.kind == "hub" else "Save it again."
        raise UsageError(f"{where}: cannot be read: {format_error(error).rstrip('.')}. {remedy}") from None
    for batch in data.with_format("arrow").iter(batch_size=BATCH_ROWS):  # the Arrow format does not decode images
        yield from batch.to_pylist()


# --- synthetic records ------------------------------------------------------------------------------------------------
# A model of a few million parameters can learn these tasks. Their lengths are log-normal like those of real records,
# because the costs of packing and padding depend on lengths.

_NOUNS = tuple(
    "river harbour lantern orchard violin glacier market bridge garden engine library meadow kettle island compass "
    "tower forest canvas mirror station valley feather hammer window letter planet copper saddle anchor basket".split()
)  # fmt: skip
_TRAITS = tuple(
    "old quiet narrow bright heavy distant wooden hollow gentle broken early silver round steep warm dry".split()
)
_VERBS = tuple("crosses holds guards feeds lights follows carries hides opens meets turns covers shows keeps".split())


def synthetic_records(seed: int) -> Iterator[Record]:
    """Endless records of an instruction, in some with a context, and a response; equal seeds give equal records."""
    source = random.Random(seed)
    makers: tuple[Callable[[random.Random], Record], ...] = (_addition, _ordering, _closed, _summary, _list)
    while True:
        yield source.choice(makers)(source)


def _sentence(source: random.Random) -> str:
    first, second = source.sample(_NOUNS, 2)
    return f"The {source.choice(_TRAITS)} {first} {source.choice(_VERBS)} the {source.choice(_TRAITS)} {second}."


def _length(source: random.Random, median: float, most: int) -> int:
    return max(1, min(most, round(source.lognormvariate(0, 0.7) * median)))


def _addition(source: random.Random) -> Record:
    left, right = source.randrange(100), source.randrange(100)
    return {"instruction": f"What is {left} plus {right}?", "response": f"{left} plus {right} is {left + right}."}


def _ordering(source: random.Random) -> Record:
    words = source.sample(_NOUNS, min(len(_NOUNS), 2 + _length(source, 3, 12)))
    question = f"Put these words in alphabetical order: {', '.join(words)}."
    return {"instruction": question, "response": ", ".join(sorted(words)) + "."}


def _closed(source: random.Random) -> Record:
    sentences = [_sentence(source) for _ in range(_length(source, 3, 14))]
    answer = source.choice(sentences).split()
    question = f"What does the {answer[1]} {answer[2]} do?"
    return {"instruction": question, "context": " ".join(sentences), "response": " ".join(answer)}


def _summary(source: random.Random) -> Record:
    sentences = [_sentence(source) for _ in range(2 + _length(source, 4, 20))]
    nouns = sorted({sentence.split()[2] for sentence in sentences})
    answer = f"It is about the {', the '.join(nouns)}."
    return {"instruction": "Name what this passage is about.", "context": " ".join(sentences), "response": answer}


def _list(source: random.Random) -> Record:
    trait = source.choice(_TRAITS)
    items = [f"a {trait} {noun}" for noun in source.sample(_NOUNS, 1 + _length(source, 4, 16))]
    return {"instruction": f"List {len(items)} things that can be {trait}.", "response": "; ".join(items) + "."}
