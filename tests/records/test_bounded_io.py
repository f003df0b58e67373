"""What comes in is read within bounds: whatever a file is, it is plain data, or a refusal with a reason."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorameter.records import bounded_io, codec
from lorameter.records.bounded_io import NotReadableError, read_json, read_text, read_toml


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested too deeply"),
        ("[" + "[]," * codec.MOST_PARTS + "[]]", "lists and tables"),
        ("9" * 5000, "digits"),
        ('{"a": ', "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"", "Expecting value"),
    ],
    ids=["deep", "too-deep", "tables", "many", "digits", "cut", "utf-16", "empty"],
)
def test_json_beyond_the_bounds_is_refused(tmp_path, content, words):
    """By depth, by number of parts, by digits and by bytes, before anybody rests on it."""
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NotReadableError, match=words):
        read_json(path, bounded_io.MANIFEST_BYTES)


def test_json_within_the_bounds_is_read(tmp_path):
    """A depth of 64; a whole number beyond 63 bits is the float that it is to others."""
    path = tmp_path / "a.json"
    path.write_text(f'{{"deep": {"[" * 60}{"]" * 60}, "large": 1{"0" * 30}, "most": {2**63 - 1}}}')
    read = read_json(path, 1000)
    assert (read["large"], read["most"]) == (1e30, 2**63 - 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a" + ".a" * 200_000 + " = 1", "64 parts or more .at line 1"),
        ("[" + '"a" . ' * 100 + "a]", "64 parts or more"),
        ("a = " + "[" * 70 + "]" * 70, "64 deep"),
        ("a = " + "[" * 100_000, "64 deep"),
        ("a = " + "{a = " * 100 + "1" + "}" * 100, "64 deep"),
        ("a = 1" + "0" * 5000, "not a TOML file: Exceeds"),
        ("a = 0x1" + "0" * 4000, "a whole number of 16001 bits"),
        ("[a]\nb = 2020-01-01", "a.b = 2020-01-01: a date"),
        ("a = [{b = 07:32:00}]", r"a\[0\].b = 07:32:00: a date"),
        ("a = 1979-05-27T07:32:00Z", "a date"),
        ("a =", "not a TOML file"),
    ],
    ids=lambda value: value[:20],
)
def test_toml_beyond_the_bounds_is_refused(tmp_path, content, words):
    """Where tomllib would take the square of a key's length, call itself without end, or give what no key takes."""
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(NotReadableError, match=words):
        read_toml(path)


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "x" * 300, "a\0b"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, name):
    """A pipe that nobody writes to, a folder, a name that no file can have: a reason, at once."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotReadableError):
        read_text(tmp_path / name, 10)
    assert not bounded_io.is_file(tmp_path / name)


def test_a_file_without_end_is_not_read_to_it(tmp_path):
    """One byte more than the bound is read, whatever the size."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotReadableError, match="more than the 1 MiB"):
        read_text(path, bounded_io.STUDY_BYTES)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(plain)
def test_what_lies_within_the_bounds_is_read_as_it_is(data):
    """The bounds take nothing from what is within them."""
    assert codec.parse(json.dumps(data)) == data


@given(st.binary(max_size=60))
def test_any_bytes_are_data_or_a_refusal(content):
    """Nothing but `NotJsonError`, whatever the bytes are."""
    with contextlib.suppress(codec.NotJsonError):
        codec.check_depth(codec.parse(content))
