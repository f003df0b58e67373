"""Inputs that nobody should be able to do harm with: good ones with something odd in them, drawn by a seeded generator.

Most mutations know the form of what they spoil (a JSON document, a TOML file, a line of a table), since a file that is
merely noise is refused by the first reader and says nothing of the others. The rest spoil bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1.5, -1.5, -0.0, 1e-320, 1e308, 1e39, 2**31, 2**63, -(2**63), 2**64,
    10**30, 10**13, float("nan"), float("inf"), float("-inf"), "", "NaN", "Infinity", "1", "null", "x" * 300,
    "é" * 130, "\x1b[2J\x1b]0;t\x07", "a [/b] c", "[red]", "\ud800", "\u202egnp.exe", "\x00", "\x9b31m", "a\nb\rc",
    "../../etc/passwd", "/dev/zero", "%s%n{0}", "=1+1", "ok", "invalid", "cuda", "cpu", "train", "cold",
    "step_time_s", "replicates", "lockstep", "complete", "baseline", [], {}, [[]], [None], [0], ["a", "a"], {"": {}},
    {"a": None}, [1, "NaN", 2.5], [0.0] * 40, [1e308] * 3,
)  # fmt: skip
RAW = {
    "@deep": "[" * 5000 + "]" * 5000,
    "@tables": '{"a":' * 700 + "1" + "}" * 700,
    "@nested": "[" * 60 + "]" * 60,
    "@digits": "1" + "0" * 400,
    "@many": "9" * 5000,
    "@exponent": "1e999",
    "@long": "[" + "0," * 20000 + "0]",
    "@text": '"' + "y" * 70000 + '"',
    "@twice": '{"schema": 5, "schema": "5"}',
}
"""What no library writes, put in by text."""
TOML_ODD: tuple[str, ...] = (
    "nan", "inf", "-inf", "-1", "0", "1", "1e11", "100000000000", "1e308", "9223372036854775808", "0x" + "f" * 4000,
    "2020-01-01", "07:32:00", "1979-05-27T07:32:00Z", '""', '"a [/b] c"', '"\\u001b[2J"', '"\\u0000"', '"\\u202e"',
    '"' + "n" * 260 + '"', "[]", "{}", "[[]]", "[1, 2]", '["a", "b"]', "true", "false", '"none"', '"nf4"',
    '"random:"', '"random:tiny-llama"', '"llama2-70b"', '"."', "[" * 70 + "]" * 70, "{a = 1}", "[nan]",
    '["all-linear"]', "1.5", '"1"', "3", "512", '"packed"', '"padded"', '"replicates"',
)  # fmt: skip
BYTES = (
    b"\x00", b"\xff", b"\xfe\xff", b"\x1b[2J", b"\xed\xa0\x80", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n",
    b"\r", b"\\u", b"9" * 400,
)  # fmt: skip


def spoil_bytes(source: random.Random, content: bytes) -> bytes:
    """One to four changes of bytes: put in, taken out, doubled, cut short."""
    spoilt = bytearray(content)
    for _ in range(source.randint(1, 4)):
        at, length = source.randint(0, len(spoilt)), source.choice((1, 1, 2, 8, 64))
        kind = source.randrange(6)
        if kind == 0:
            spoilt[at:at] = source.choice(BYTES)
        elif kind == 1:
            del spoilt[at : at + length]
        elif kind == 2:
            spoilt[at:at] = spoilt[at : at + length] * source.randint(1, 3)
        elif kind == 3 and spoilt:
            spoilt[at % len(spoilt)] ^= 1 << source.randrange(8)
        elif kind == 4:
            del spoilt[at:]
        else:
            spoilt[at : at + length] = source.randbytes(length)
    return bytes(spoilt)


def spoil_json(source: random.Random, content: bytes) -> bytes:
    """One to three parts of a document replaced, taken out, renamed or moved; or its bytes."""
    if source.random() < 0.15:
        return spoil_bytes(source, content)
    data = json.loads(content)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        data = _spoil_part(source, data)
    text = json.dumps(data, ensure_ascii=source.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", errors="surrogatepass")


def _spoil_part(source: random.Random, data: Any) -> Any:
    places = list(_places(data))
    if not places:
        return _odd(source)
    owner, key = source.choice(places)
    kind = source.randrange(10)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[source.choice(("", "x", "schema", "name", f"{key}_", "\x1b"))] = owner.pop(key)
    elif kind == 2:
        other, place = source.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            owner[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == 4:
        owner[key] = [owner[key]]
    else:
        owner[key] = _odd(source)
    return data


def _odd(source: random.Random) -> Any:
    if source.random() < 0.15:
        return source.choice(tuple(RAW))
    return json.loads(json.dumps(source.choice(ODD)))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every owner and key of a document."""
    left = [data] if isinstance(data, (dict, list)) else []
    while left:
        owner = left.pop()
        keys: Sequence[Any] = list(owner) if isinstance(owner, dict) else range(len(owner))
        for key in keys:
            yield owner, key
            if isinstance(owner[key], (dict, list)):
                left.append(owner[key])


def spoil_lines(source: random.Random, content: bytes) -> bytes:
    """Lines of JSON: one or two of them spoilt, doubled, swapped or cut."""
    lines = content.splitlines()
    for _ in range(source.choice((1, 1, 2))):
        at = source.randrange(len(lines))
        kind = source.randrange(8)
        if kind == 0:
            lines.insert(source.randrange(len(lines)), lines[at])
        elif kind == 1:
            lines[at] = lines[at][: source.randrange(len(lines[at]) + 1)]
        elif kind == 2:
            lines[at] = source.choice((b"null", b"[]", b"3", b'"x"', b"{}", RAW["@deep"].encode(), b"", b"\xff"))
        else:
            try:
                lines[at] = spoil_json(source, lines[at])
            except (ValueError, RecursionError):  # spoilt before
                lines[at] = spoil_bytes(source, lines[at])
    return b"\n".join(lines) + b"\n" * source.randrange(2)


KEYS = ("x", "r", "name", "title", "extends", "a.b", "notes", '"\\u001b"', "a" + ".a" * 70, "devices")
HEADS = ("[axes]", "[[variant]]", "[profile.x]", "[sweeps]", "[controls]", "[", "[[claim]]", "[requirements]")
CELLS = ("", "nan", "inf", "-1", "1e999", '"', "9" * 400, "x", "\x1b[2J", "0", "1,5")
_VALUE = re.compile(r"^(\s*[\w.\"-]+\s*=\s*)(.*)$", re.MULTILINE)


def spoil_toml(source: random.Random, content: bytes) -> bytes:
    """One to three values replaced, lines doubled, taken out or put in; or the bytes."""
    chance = source.random()
    if chance < 0.1:
        return spoil_bytes(source, content)
    if chance < 0.6:
        return _spoil_tables(source, content)
    lines = content.decode().splitlines()
    for _ in range(source.choice((1, 1, 2, 3))):
        at = source.randrange(len(lines)) if lines else 0
        kind = source.randrange(24)
        if kind == 0 and lines:
            del lines[at]
        elif kind == 1 and lines:
            lines.insert(source.randrange(len(lines)), lines[at])
        elif kind == 2:
            lines.insert(at, f"{source.choice(KEYS)} = {source.choice(TOML_ODD)}")
        elif kind == 3:
            lines.insert(at, source.choice(HEADS))
        elif lines:
            values = [number for number, line in enumerate(lines) if _VALUE.match(line)]
            if values:
                number = source.choice(values)
                odd = source.choice(TOML_ODD)
                lines[number] = _VALUE.sub(lambda found, odd=odd: found.group(1) + odd, lines[number], count=1)
    return "\n".join(lines).encode()


def _spoil_tables(source: random.Random, content: bytes) -> bytes:
    """One or two values of the tables replaced, taken out or moved, and all of it written as TOML again."""
    data = json.loads(json.dumps(tomllib.loads(content.decode())))
    for _ in range(source.choice((1, 1, 2))):
        data = _spoil_part(source, data)
    if not isinstance(data, dict):
        return content
    return "\n".join(f"{json.dumps(key)} = {_inline(value)}" for key, value in data.items()).encode()


def _inline(value: Any) -> str:
    """A value as TOML writes it in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return RAW.get(value, json.dumps(value)) if isinstance(value, str) else json.dumps(value)


def spoil_table(source: random.Random, content: bytes) -> bytes:
    """A table of text: cells and lines replaced; or the bytes."""
    if source.random() < 0.4:
        return spoil_bytes(source, content)
    lines = content.decode().splitlines()
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(lines))
        cells = lines[at].split(",")
        cells[source.randrange(len(cells))] = source.choice(CELLS)
        lines[at] = ",".join(cells)
    return "\n".join(lines).encode()


def packed(spoil: Mutator) -> Mutator:
    """The same, packed with gzip; of a third the packed bytes are spoilt as well."""

    def spoilt(source: random.Random, content: bytes) -> bytes:
        found = gzip.compress(spoil(source, content), mtime=0)
        return spoil_bytes(source, found) if source.random() < 0.35 else found

    return spoilt


WORDS = (
    "peft", "torch", "peft==0.19.1", "peft>=0", "peft @ https://user:secret@example.org/peft-1.0-py3-none-any.whl",
    "==", "@", "--", "-r", "HEAD", "HEAD~1", "main", "v1.0", "python3.11", "/bin/true", "./x", "~nobody/x", "\x1b[2J",
    "\x00", "[x]", "peft[extra]", ";", "#", "git+https://user:secret@example.org/x.git", "file:///etc/passwd",
    "peft;python_version<'4'", "", " ", "é", "x" * 300, "..", "$(x)", "--upload-pack=x", "HEAD:harness",
    "HEAD^{tree}", "@{-1}", "-", "=", "peft==", "==1", "peft==1.0,<2", "numpy", "lorameter",
)  # fmt: skip


def spoil_words(source: random.Random, content: bytes) -> bytes:
    """Words of a specification, put together."""
    if source.random() < 0.1:
        return spoil_bytes(source, content)
    between = source.choice((" ", "", "  ", "\t", "\n", " @ "))
    return between.join(source.choice(WORDS) for _ in range(source.randint(0, 4))).encode()
