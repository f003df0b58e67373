"""Rows of one file of records, read within bounds, each with its place for whoever has to say what is wrong with it.

JSON and CSV are read by the standard library: a table reader that guesses types would make a number of the answer "3"
and nothing of the answer "null", and knows no line. Parquet is read by pyarrow, a few rows at a time.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lorameter.errors import UsageError, shorten
from lorameter.records import bounded_io, codec
from lorameter.studies.data_source import PACKED

LINE_BYTES = 16 << 20
"""Of a line of text, and of a cell of a table."""
FILE_BYTES = 4 << 30
"""Of what a file unpacks to; its records are held in memory to be shuffled."""
MOST_UNPACKED = 1000
"""Times its size that a file may unpack to: no text is packed more tightly unless it is the same again and again."""
LEAST_UNPACKED = 256 << 20
"""That any file may."""
ROWS = 256
"""Rows of a table that are unpacked at once."""
Placed = tuple[str, Any]
"""Where a row stands, and the row."""
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """What the columns of a file or data set are called, and its rows: a table each, of at least the columns asked for.

    Of JSON the names are those of the first record. Rows raise `UsageError` for what cannot be read, with its place.
    """

    names: tuple[str, ...] | None
    """None where there is not one record."""
    place: str
    """Where the names stand."""
    rows: Callable[[Sequence[str]], Iterator[Placed]]


def most_unpacked(size_bytes: int) -> int:
    """What files of this size may unpack to, in bytes or in characters."""
    return max(LEAST_UNPACKED, MOST_UNPACKED * size_bytes)


def open_table(path: Path, where: str) -> DataTable:
    """The table in a file, by the ending of its name. Raises `UsageError` where there is none, with its place."""
    return _KINDS[Path(path.name.removesuffix(PACKED)).suffix](path, where)


@contextlib.contextmanager
def _open(path: Path, where: str) -> Iterator[BinaryIO]:
    """The file, unpacked where its name says that it is packed."""
    try:
        with gzip.open(path) if path.name.endswith(PACKED) else path.open("rb") as file:
            yield cast(BinaryIO, file)  # a gzip file reads as any other
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{where}: cannot be read: {said_by(error)}. Restore it, or take another file.") from None


def said_by(error: Exception) -> str:
    """The first line of what an error says."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return shorten(text.splitlines()[0], 300).rstrip(".")


# --- lines ------------------------------------------------------------------------------------------------------------


def _texts(file: BinaryIO, where: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, and its text with what ends it."""
    read = number = 0
    while True:
        place = f"{where}, line {number + 1}"
        try:
            line = file.readline(LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{place}: cannot be read: {said_by(error)}. Restore the file.") from None
        if not line:
            return
        number, read = number + 1, read + len(line)
        if read > FILE_BYTES:
            raise UsageError(f"{place}: more than {FILE_BYTES >> 30} GiB. Use a part of it.")
        if len(line) > LINE_BYTES:
            raise UsageError(f"{place}: more than {LINE_BYTES >> 20} MiB in one line. Part it, or take it out.")
        yield place, _decoded(line.removeprefix(_BOM) if number == 1 else line, place)


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if content.startswith(_GZIP):
            said = f"it is packed by gzip. Let its name end in {PACKED}."
        elif content.startswith(_UTF16):
            said = "it is UTF-16. Save the file as UTF-8."
        else:
            said = (
                f"byte {content[error.start]:#04x} at position {error.start + 1} is no UTF-8. Save the file as UTF-8."
            )
        raise UsageError(f"{place}: {said}") from None


def _plain_text(path: Path, where: str) -> DataTable:
    """A record a line; blank ones are passed over."""

    def rows(_: Sequence[str]) -> Iterator[Placed]:
        with _open(path, where) as file:
            for place, line in _texts(file, where):
                if line.strip():
                    yield place, {"text": line.rstrip("\r\n")}

    return DataTable(names=("text",), place=where, rows=rows)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, where: str) -> DataTable:
    """A record a line; blank ones are passed over."""

    def rows(_: Sequence[str] = ()) -> Iterator[Placed]:
        with _open(path, where) as file:
            yield from _records_of_lines(file, where, "Mend it, or take the line out.")

    return _json_table(rows)


def _json(path: Path, where: str) -> DataTable:
    """A list of records; or a record a line, where the file does not begin with a bracket."""

    def rows(_: Sequence[str] = ()) -> Iterator[Placed]:
        with _open(path, where) as file:
            if not _begin(file).startswith(b"["):
                remedy = "A .json file holds a list of records, or a record a line."
                yield from _records_of_lines(file, where, remedy)
                return
            for number, record in enumerate(_listed(file.read(bounded_io.BENCHMARK_BYTES + 1), where), 1):
                yield f"{where}, record {number}", record

    return _json_table(rows)


def _begin(file: BinaryIO) -> bytes:
    """The first bytes, left where they are."""
    content: bytes = file.peek(4096)  # type: ignore[attr-defined]  # of a buffered file, as both are
    return content.removeprefix(_BOM).lstrip()


def _listed(content: bytes, where: str) -> list[Any]:
    if len(content) > bounded_io.BENCHMARK_BYTES:
        most = bounded_io.BENCHMARK_BYTES >> 20
        raise UsageError(f"{where}: a list of more than {most} MiB. Write a record a line, as .jsonl.")
    content = content.removeprefix(_BOM)
    try:
        listed: list[Any] = codec.parse(content.decode("utf-8"), once=True)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        said = f"byte {content[error.start]:#04x} is no UTF-8. Save the file as UTF-8."
        raise UsageError(f"{where}, line {line}: {said}") from None
    except codec.NotJsonError as error:
        raise UsageError(f"{where}: cannot be read as JSON: {error}. Mend it.") from None
    return listed


def _records_of_lines(file: BinaryIO, where: str, remedy: str) -> Iterator[Placed]:
    for place, line in _texts(file, where):
        if not line.strip():
            continue
        try:
            yield place, codec.parse(line, once=True)
        except codec.NotJsonError as error:
            listed = _LISTED if line.startswith("[") else ""
            raise UsageError(f"{place}: cannot be read as JSON: {error}. {remedy}{listed}") from None


_LISTED = " A list of records lies in a file whose name ends in .json."


def _json_table(rows: Callable[[Sequence[str]], Iterator[Placed]]) -> DataTable:
    placed = next(rows(()), None)
    if placed is None:
        return DataTable(names=None, place="", rows=rows)
    place, first = placed
    if not isinstance(first, dict):
        raise no_record(place, first)
    return DataTable(names=tuple(first), place=place, rows=rows)


def no_record(place: str, row: Any) -> UsageError:
    """What to say of a row that is no table of columns."""
    listed = _LISTED if isinstance(row, list) else ""
    return UsageError(f"{place}: {shorten(repr(row), 60)}: a table of columns is expected. Mend it.{listed}")


# --- tables -----------------------------------------------------------------------------------------------------------


def _csv(path: Path, where: str) -> DataTable:
    """A record a row, under a row of names; an empty cell is null, since CSV tells the two apart in no way."""

    def cells() -> Iterator[tuple[str, list[str]]]:
        most = csv.field_size_limit(LINE_BYTES)
        try:
            with _open(path, where) as file:
                reader = csv.reader((text for _, text in _texts(file, where)), strict=True)
                while True:
                    place = f"{where}, line {reader.line_num + 1}"
                    try:
                        row = next(reader, None)
                    except csv.Error as error:
                        raise UsageError(f"{place}: cannot be read as CSV: {error}. Mend its quotes.") from None
                    if row is None:
                        return
                    if row:
                        yield place, row
        finally:
            csv.field_size_limit(most)

    def rows(_: Sequence[str]) -> Iterator[Placed]:
        for place, row in itertools.islice(cells(), 1, None):
            if len(row) != len(names):
                raise UsageError(f"{place}: {len(row)} cells, and the first row names {len(names)} columns. Mend it.")
            yield place, {name: cell or None for name, cell in zip(names, row, strict=True)}

    place, names = next(cells(), (where, []))
    _check_names(names, place)
    return DataTable(names=tuple(names) or None, place=place, rows=rows)


def _parquet(path: Path, where: str) -> DataTable:
    """A record a row."""
    import pyarrow
    from pyarrow import parquet

    wrong = (pyarrow.ArrowException, OSError, ValueError, NotImplementedError)

    def read(file: IO[bytes]) -> Any:
        """A text that a column says often is held once, as it is in the file."""
        try:
            schema = parquet.ParquetFile(file).metadata.schema
            leaves = map(schema.column, range(len(schema)))
            texts = [leaf.path for leaf in leaves if leaf.converted_type == "UTF8"]
            return parquet.ParquetFile(file, page_checksum_verification=True, read_dictionary=texts)
        except wrong as error:
            raise UsageError(f"{where}: no Parquet file: {said_by(error)}. Restore it, or name its kind.") from None

    def rows(columns: Sequence[str]) -> Iterator[Placed]:
        number = 0
        with _seekable(path, where) as file:
            batches = read(file).iter_batches(batch_size=ROWS, columns=list(columns))
            while True:
                place = f"{where}, row {number + 1}"
                try:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    for index in range(batch.num_rows):
                        place = f"{where}, row {number + 1}"
                        row = batch.slice(index, 1).to_pylist()[0]
                        number += 1
                        yield place, row
                except wrong as error:
                    raise UsageError(f"{place}: cannot be read: {said_by(error)}. Restore the file.") from None

    with _seekable(path, where) as file:
        found = read(file)
        unpacked = sum(
            found.metadata.row_group(group).total_byte_size for group in range(found.metadata.num_row_groups)
        )
        names = tuple(found.schema_arrow.names)
        holds = found.metadata.num_rows
        most = min(FILE_BYTES, most_unpacked(file.seek(0, 2)))
    if unpacked > most:
        raise UsageError(f"{where}: more than {most >> 20} MiB unpacked. Use a part of it.")
    _check_names(names, where)
    return DataTable(names=names if holds else None, place=where, rows=rows)


@contextlib.contextmanager
def _seekable(path: Path, where: str) -> Iterator[IO[bytes]]:
    """The file, unpacked into a temporary one where it is packed: Parquet is read from its end."""
    with _open(path, where) as file:
        if not path.name.endswith(PACKED):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            read = 0
            while content := file.read(shutil.COPY_BUFSIZE):  # type: ignore[attr-defined]
                read += unpacked.write(content)
                if read > FILE_BYTES:
                    raise UsageError(f"{where}: more than {FILE_BYTES >> 30} GiB unpacked. Use a part of it.")
            unpacked.seek(0)
            yield unpacked


def _check_names(names: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{place}: two columns are called {shorten(repr(twice[0]), 60)}. Rename one.")


_KINDS: dict[str, Callable[[Path, str], DataTable]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _plain_text,
}  # fmt: skip
"""What reads a file, by the ending of its name."""
