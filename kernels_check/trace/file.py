"""Opens a recording, finds out what it is, and says exactly what is wrong with one that cannot be read.

Content decides, not the file's name: traces are renamed, and gzip is taken off by browsers on the way.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

RecordingKind: TypeAlias = Literal["kineto", "nsys"]

EXPECTED = "a Kineto/Chrome trace (.json, .json.gz) or an nsys cuda_gpu_kern_sum table (.csv)"
_HEAD_BYTES = 4096
_GZIP = b"\x1f\x8b"
UNPACKED_FREELY_BYTES = 256 << 20
MOST_EXPANSION = 100
"""Traces unpack to some twenty times their size; gzip can make a thousand times of what is no recording."""
_FOREIGN = (
    (b"SQLite format 3\0", "an SQLite database, as nsys exports it"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xff\xfe", "UTF-16 text, as a PowerShell redirection writes it"),
    (b"\xfe\xff", "UTF-16 text"),
)
_REMEDY = (
    "Pass the file that torch.profiler's export_chrome_trace() wrote, or the output of "
    "`nsys stats --report cuda_gpu_kern_sum --format csv RECORDING`, as UTF-8"
)


class TraceError(ValueError):
    """The file cannot be judged; the message says what was found, how far it was read, and what to do."""


class TraceFile:
    """An open recording: bytes after decompression, counted."""

    def __init__(self, path: Path, stream: BinaryIO | io.RawIOBase, *, compressed: bool) -> None:
        self.path = path
        self.compressed = compressed
        self.bytes_read = 0
        self._stream = io.BufferedReader(stream, 1 << 16)  # type: ignore[type-var]

    def head(self) -> bytes:
        """First bytes, without consuming them."""
        return self._stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]

    def skip(self, count: int) -> None:
        """Consume bytes that are no part of the text, such as a byte order mark."""
        self._stream.read(count)

    def read(self, size: int = -1) -> bytes:
        """Next bytes, empty at the end."""
        part = self._stream.read(size)
        self.bytes_read += len(part)
        return part

    def text(self) -> io.TextIOWrapper:
        """The rest as strict UTF-8 text."""
        return io.TextIOWrapper(self._stream, encoding="utf-8-sig", errors="strict", newline="")

    @property
    def progress(self) -> str:
        """How far the file was read, for messages."""
        return f"{self.bytes_read:,} {'unpacked ' if self.compressed else ''}bytes"


class _Unpacked(io.RawIOBase):
    """What a gzip file unpacks to, up to a multiple of its size."""

    def __init__(self, path: Path, packed: BinaryIO) -> None:
        self._path = path
        self._stream = gzip.GzipFile(fileobj=packed)
        self._packed_bytes = os.fstat(packed.fileno()).st_size
        self._most_bytes = max(UNPACKED_FREELY_BYTES, MOST_EXPANSION * self._packed_bytes)
        self._unpacked_bytes = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack into ``buffer``; 0 at the end.

        Raises:
            TraceError: more came out than any recording of this size holds.
        """
        count = self._stream.readinto(buffer)
        self._unpacked_bytes += count
        if self._unpacked_bytes > self._most_bytes:
            raise TraceError(
                f"{self._path}: {self._packed_bytes:,} bytes unpack to more than {self._most_bytes:,}, over "
                f"{MOST_EXPANSION} times as many: no recording is that empty; expected {EXPECTED}. If it is one, "
                "unpack it and pass the unpacked file"
            )
        return count


@contextmanager
def open_recording(path: Path) -> Iterator[tuple[TraceFile, RecordingKind]]:
    """Open ``path`` and tell its kind; failures to read it, also later ones, become a ``TraceError``.

    Raises:
        TraceError: the file is missing, empty, damaged, or neither of the kinds.
    """
    recording = None
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as raw:  # noqa: PTH123 a descriptor
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):  # it may never begin, or never end
                raise TraceError(f"{path}: is no plain file; expected {EXPECTED}. Write it to one")
            start = raw.read(_HEAD_BYTES)
            raw.seek(0)
            if not start:
                raise TraceError(f"{path}: the file is empty (0 bytes); expected {EXPECTED}. Record it again")
            compressed = start.startswith(_GZIP)
            stream = _Unpacked(path, raw) if compressed else raw
            recording = TraceFile(path, stream, compressed=compressed)
            yield recording, _kind(recording)
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file; expected {EXPECTED}") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a directory; name one file in it, {EXPECTED}") from None
    except EOFError:
        raise TraceError(_damaged(path, recording, "the gzip stream ends early: the file was cut off")) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(_damaged(path, recording, f"the gzip stream is corrupt ({error})")) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TraceError(_damaged(path, recording, f"not UTF-8 text (byte 0x{byte:02x})")) from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _damaged(path: Path, recording: TraceFile | None, what: str) -> str:
    read = recording.progress if recording is not None else "0 bytes"
    return f"{path}: {what}, after {read}. Copy or export it again; nothing of a damaged file is reported"


def _kind(recording: TraceFile) -> RecordingKind:
    head = recording.head()
    if not head:
        raise TraceError(f"{recording.path}: nothing is left after unpacking; expected {EXPECTED}. Record it again")
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise TraceError(f"{recording.path}: is {what}; expected {EXPECTED}. {_REMEDY}")
    if head.startswith(b"\xef\xbb\xbf"):
        recording.skip(3)
        head = head[3:]
    text = head.lstrip()
    if not text:
        raise TraceError(f"{recording.path}: begins with blank space only; expected {EXPECTED}. {_REMEDY}")
    # nsys prefixes its progress with "[3/8] ", which is no JSON array.
    if text.startswith(b"{") or (text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"]", b"")):
        return "kineto"
    if b"\0" in head:
        raise TraceError(f"{recording.path}: is binary (begins with {head[:8]!r}); expected {EXPECTED}. {_REMEDY}")
    return "nsys"
