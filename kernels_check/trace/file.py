"""What no recorder writes, refused before it costs more than the file is worth.

A parser keeps the path to where it is, so nesting takes memory by the square of its depth; a token that spans the parts
in which a file is read is looked at again with each of them, and the digits of an integer take time by the square of
their number. So a small file of brackets would take gigabytes, and one of digits minutes. Real traces nest six levels,
their longest strings are names of kernels, and their numbers have twenty digits.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np

from kernels_check.rules import Rule, normalise

MOST_LEVELS = 256
LONGEST_STRING_BYTES = 1 << 20
LONGEST_NUMBER_BYTES = 10_000

_NUMBER = b"0123456789+-.eE"
_NO_NUMBER = re.compile(rb"[^0-9+\-.eE]+")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CLOSES = 4
"""The bit in which a closing bracket differs from an opening one, both of lists and of objects."""


class JsonLimits:
    """Follows the text of a JSON document, part by part; whether it is JSON is for the parser to say."""

    def __init__(self) -> None:
        self._levels = 0
        self._in_string = False
        self._escaped = False
        self._string_bytes = 0
        self._number_bytes = 0

    def problem(self, part: bytes) -> str | None:
        """Take the next part and say what is beyond a limit in it, or None."""
        pieces = self._unescaped(part).split(b'"')
        outside = b'"'.join(pieces[1 if self._in_string else 0 :: 2])
        begun = self._string_bytes + len(pieces[0]) if self._in_string else 0
        ends_inside = self._in_string == (len(pieces) % 2 == 1)
        self._string_bytes = (begun if len(pieces) == 1 else len(pieces[-1])) if ends_inside else 0
        if max(begun, self._string_bytes) > LONGEST_STRING_BYTES:
            return f"a string is longer than {LONGEST_STRING_BYTES >> 20} MiB"
        self._in_string = ends_inside
        return self._number_problem(outside) or self._nesting_problem(outside)

    def _unescaped(self, part: bytes) -> bytes:
        """The part with what is escaped blotted out; only quotation marks matter."""
        if self._escaped and part:
            part, self._escaped = b"_" + part[1:], False
        if b"\\" in part:
            part = part.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            self._escaped = part.endswith(b"\\")
        return part

    def _number_problem(self, outside: bytes) -> str | None:
        """Numbers end at whatever is none of their letters; one may have begun in the part before."""
        first = len(outside) - len(outside.lstrip(_NUMBER))
        last = len(outside) - len(outside.rstrip(_NUMBER))
        longest = self._number_bytes + first
        self._number_bytes = longest if first == len(outside) else last
        if max(map(len, outside.split(b","))) > LONGEST_NUMBER_BYTES:  # seldom: blank space, or a long number
            longest = max(longest, *map(len, _NO_NUMBER.split(outside)))
        if longest > LONGEST_NUMBER_BYTES:
            return f"a number has more than {LONGEST_NUMBER_BYTES:,} digits"
        return None

    def _nesting_problem(self, outside: bytes) -> str | None:
        brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), dtype=np.uint8)
        if not len(brackets):
            return None
        levels = self._levels + np.cumsum(np.where(brackets & _CLOSES, -1, 1))
        self._levels = int(levels[-1])
        return f"it nests deeper than {MOST_LEVELS} levels" if levels.max() > MOST_LEVELS else None


# Position of Is_causal after the template's name; the kernel traits come first in flash-attn 2.
_IS_CAUSAL = (
    ("flash_fwd_kernel", 2),
    ("flash_fwd_splitkv_kernel", 1),
    ("flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", 2),
    ("CollectiveMainloopFwdSm90", 7),
)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_DTYPES = (
    ("bfloat16", re.compile(r"\b(?:__nv_bfloat16|bfloat16_t|BFloat16|bf16)\b|_bf16[_x]|_Q(?:kv)?Bfloat16")),
    ("float16", re.compile(r"\b(?:__half|half_t|Half|half|f16)\b|_f(?:p16x|16_)|_Q(?:kv)?Fp16")),
    ("float8", re.compile(r"\b(?:__nv_fp8\w*|float_e[45]m[23]_t|Float8_e[45]m[23]\w*)\b|_Q(?:kv)?E4m3")),
    ("float32", re.compile(r"\bfloat\b|_f32_")),
    ("float64", re.compile(r"\bdouble\b")),
)
_BACKWARD = re.compile(
    r"bwd|bprop|backward|fmha_cutlassB_|_grad_|cudnn::fusion::(?:compute_dot_do_o|convert_dq|fmha_reduce_head)",
    re.IGNORECASE,
)
_FORWARD = re.compile(r"fwd|fprop|forward|fmha_cutlassF_|decoding|splitkv|lean_reduction|^fmhaSm\d+", re.IGNORECASE)
_OPERANDS = re.compile(r"cublasGemvTensor\w*<(?:const )?([\w:]+)")
"""Of cuBLAS' small products, whose first template argument is what they add up in."""
_TENSILE = re.compile(r"Cijk_A[a-z]+_B[a-z]+_(F8|B8|[BHSD])(?!\d)")
_TENSILE_DTYPES = {"F8": "float8", "B8": "float8", "B": "bfloat16", "H": "float16", "S": "float32", "D": "float64"}
_CAUSAL_WORD = re.compile(r"^fmhaSm\d+\w*?(Causal|Dense)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNameFacts:
    """What one kernel's name proves about it."""

    dtype: str | None
    """What it computes in; None where the name does not say."""
    causal: bool | None
    direction: Literal["forward", "backward"] | None


@cache
def read_facts(kernel: str, rule: Rule) -> KernelNameFacts:
    """Read the name of a kernel that ``rule`` matched."""
    name = normalise(kernel)
    backward, forward = _BACKWARD.search(name), _FORWARD.search(name)
    return KernelNameFacts(
        dtype=_dtype(name, rule),
        causal=_causal(name) if rule.category == "attention" else None,
        direction="backward" if backward else "forward" if forward else None,
    )


def template_arguments(name: str, template: str) -> list[str]:
    """Arguments of the first ``template<...>`` in a name, outermost commas only; empty where it has none.

    A name that was cut off in the middle gives the arguments that are complete.
    """
    found = re.search(rf"\b{re.escape(template)}<", name)
    if found is None:
        return []
    arguments, depth, start = [], 0, found.end()
    for position in range(found.end(), len(name)):
        letter = name[position]
        if letter in "<([{":
            depth += 1
        elif letter in ">)]}" and depth:
            depth -= 1
        elif letter == ">" or (letter == "," and not depth):
            arguments.append(name[start:position].strip())
            start = position + 1
            if letter == ">":
                break
    return arguments


def _causal(name: str) -> bool | None:
    if said := _CAUSAL_WORD.search(name):
        return said.group(1) == "Causal"
    for template, position in _IS_CAUSAL:
        arguments = template_arguments(name, template)
        if len(arguments) > position:
            return _BOOLEANS.get(arguments[position])
    return None


def _dtype(name: str, rule: Rule) -> str | None:
    if rule.dtype is not None:
        return rule.dtype
    if rule.backend == "cudnn" or rule.category not in ("attention", "dequantize", "matmul"):
        return None  # cuDNN writes f16 for bfloat16 as well
    if rule.name.startswith("ATT-FA3"):
        for mainloop in ("CollectiveMainloopFwdSm90", "CollectiveMainloopBwdSm90"):
            elements = [dtype for argument in template_arguments(name, mainloop)[4:7] if (dtype := _named(argument))]
            if elements:
                return elements[0]  # the element type comes before the accumulator's
    if rule.name == "GEMM-AMD":
        letters = _TENSILE.search(name)
        return None if letters is None else _TENSILE_DTYPES[letters.group(1)]
    if re.match(r"gemm(SN|k1)_|dot_kernel<|reduce_1Block_kernel<", name):
        operand = _OPERANDS.search(name)
        return None if operand is None else _named(operand.group(1))
    if rule.name.startswith(("BNB-", "ATT-SOFTMAX")):
        return _named(_first_argument(name))
    named = _named(name)
    # Every flash kernel refuses float32, so the word can only come from its parameters.
    return None if named == "float32" and (rule.backend or "").startswith("flash") else named


def _first_argument(name: str) -> str:
    """Of the innermost function: the argument list's own types say nothing of what it computes in."""
    found = re.search(r"\b(?:k?\w*(?:Blockwise|4bit\w*|softmax_warp_\w+))<([^,<>]+)", name)
    if found is not None:
        return found.group(1)
    found = re.search(r"\bcunn_\w*<\w+, ([^,<>]+)", name)  # the vector width comes first
    return found.group(1) if found is not None else ""


def _named(text: str) -> str | None:
    return next((dtype for dtype, pattern in _DTYPES if pattern.search(text)), None)


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
    """Open ``path`` and find its kind; failures to read it, also later ones, become a ``TraceError``.

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
