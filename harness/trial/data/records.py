"""Instruction records: read from a file or the hub in an order fixed by the seed, and each held against its form.

A record that lacks its text would be trained on as the word "None", or end the run in a traceback long after it was
read. So each is looked at when it is read, and one that cannot serve is refused with its line.
"""

from __future__ import annotations

import contextlib
import gzip
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import UsageError, shorten
from harness.records import codec, inputs
from harness.studies.workload import SYNTHETIC, Workload
from harness.trial.data.synthetic import Record, synthetic_records

COLUMNS = ("instruction", "context", "response")
EMPTY = ("context",)
"""Columns that need not hold a text: a record without one has none."""
LINE_BYTES = 16 << 20
FILE_BYTES = 4 << 30
"""Of what a file unpacks to; its records are held in memory to be shuffled."""
CHECKED_BYTES = 32 << 20
_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_REMEDY = "Give a .jsonl or .jsonl.gz file, a hub id that this machine can reach, or 'synthetic'."


def read_records(workload: Workload) -> tuple[Iterator[Record], str]:
    """The records of a workload in an order fixed by `data_seed`, and what they are in words.

    Raises:
        UsageError: a file or data set that cannot be read, is empty, or holds a record without a text that it needs;
            the file and the line are named.
    """
    if workload.data == SYNTHETIC:
        return synthetic_records(workload.data_seed), f"synthetic instruction records, seed {workload.data_seed}"
    where = f"data {workload.data!r}"
    path = Path(workload.data)
    if path.name.endswith(_ENDINGS):
        records, label = list(_of_file(path, where)), path.name
    else:
        records, label = list(_of_hub(workload.data, where)), workload.data
    if not records:
        raise UsageError(f"{where}: no records are in it. Records need {', '.join(COLUMNS)}.")
    random.Random(workload.data_seed).shuffle(records)
    return iter(records), f"{label}, {len(records)} records"


def check_file(data: str) -> None:
    """Raises `UsageError` for a file of records that `read_records` would refuse; looks at no other data, nor at a file
    so large that it would take seconds."""
    path = Path(data)
    if path.name.endswith(_ENDINGS) and inputs.is_file(path) and path.stat().st_size <= CHECKED_BYTES:
        read_records(Workload(data=data))


def _of_file(path: Path, where: str) -> Iterator[Record]:
    """One record a line; or, in a file that begins with a bracket, a list of them."""
    try:
        with _open(path) as file:
            whole = not path.name.endswith((".jsonl", ".jsonl.gz")) and file.peek(1)[:1] == b"["  # type: ignore[attr-defined]
            if whole:
                listed = codec.parse(_bounded(file.read(inputs.BENCHMARK_BYTES + 1), inputs.BENCHMARK_BYTES))
                yield from _checked(((f"{where}, record {n}", one) for n, one in enumerate(listed, 1)))
                return
            yield from _checked(_lines(file, where))
    except (OSError, EOFError, zlib.error) as error:
        said = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{where}: cannot be read: {said}. {_REMEDY}") from None
    except codec.NotJsonError as error:
        raise UsageError(f"{where}: cannot be read: {error}. {_REMEDY}") from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if not inputs.is_file(path):  # what is no plain file may never begin, or never end
        raise FileNotFoundError(2, "there is no such file" if not inputs.is_there(path) else "it is no plain file")
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        yield file  # type: ignore[misc]  # a gzip file reads as any other


def _lines(file: BinaryIO, where: str) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and its content; blank ones are passed over."""
    read = number = 0
    while line := file.readline(LINE_BYTES + 1):
        number, read = number + 1, read + len(line)
        place = f"{where}, line {number}"
        if read > FILE_BYTES:
            raise UsageError(f"{place}: more than {FILE_BYTES >> 30} GiB. Use a part of it.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace() or not line:
            continue
        try:
            yield place, codec.parse(_bounded(line, LINE_BYTES))
        except codec.NotJsonError as error:
            raise UsageError(f"{place}: cannot be read as JSON: {error}. Mend it, or take the line out.") from None


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise codec.NotJsonError(f"it has more than {most >> 20} MiB")
    return content


def _of_hub(name: str, where: str) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split="train").to_list()
    except Exception as error:  # which exception depends on the library beneath
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(f"{where}: cannot be read: {type(error).__name__}: {said}. {_REMEDY}") from error
    yield from _checked((f"{where}, record {number}", row) for number, row in enumerate(rows, 1))


def _checked(found: Iterable[tuple[str, Any]]) -> Iterator[Record]:
    """The records as texts. Raises `UsageError` for one that is none, with its place."""
    for place, row in found:
        if not isinstance(row, dict):
            raise UsageError(
                f"{place}: {shorten(repr(row), 60)}: a table of {', '.join(COLUMNS)} is expected. Mend it."
            )
        record: Record = {}
        for column in COLUMNS:
            if column not in row:
                raise UsageError(f"{place}: no column {column!r}. Records need instruction, context and response.")
            text = row[column]
            if text is None and column in EMPTY:
                text = ""
            if not isinstance(text, str) or (not text.isascii() and not _is_text(text)):
                said = "null" if text is None else shorten(repr(text), 60)
                raise UsageError(f"{place}: {column} = {said}: a text is expected. Mend it, or take the record out.")
            record[column] = text
        yield record


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it, as halves of characters cannot be."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
