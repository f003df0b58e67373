"""Tests that files are read within limits: the result is plain data, or an error with a reason."""

from __future__ import annotations

import os

import pytest

from lorameter.records import fileio
from lorameter.records.fileio import NotReadableError, read_json, read_text, read_toml


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ('{"a": ', "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"", "Expecting value"),
    ],
    ids=["deep", "digits", "cut", "utf-16", "empty"],
)
def test_json_beyond_the_bounds_is_refused(tmp_path, content, words):
    """JSON is limited in depth, digits and bytes."""
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NotReadableError, match=words):
        read_json(path, fileio.MANIFEST_BYTES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = 1" + "0" * 5000, "not a TOML file: Exceeds"),
        ("a =", "not a TOML file"),
    ],
    ids=lambda value: value[:20],
)
def test_toml_beyond_the_bounds_is_refused(tmp_path, content, words):
    """TOML is limited in depth and digits; other text is refused as no TOML."""
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(NotReadableError, match=words):
        read_toml(path)


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "x" * 300, "a\0b"])
def test_paths_that_are_not_regular_files_are_refused_at_once(tmp_path, name):
    """A pipe without a writer, a folder and an impossible name are refused at once, with a reason."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotReadableError):
        read_text(tmp_path / name, 10)
    assert not fileio.is_file(tmp_path / name)


def test_a_file_without_end_is_not_read_to_it(tmp_path):
    """At most one byte more than the limit is read, whatever the size."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotReadableError, match="more than the 1 MiB"):
        read_text(path, fileio.STUDY_BYTES)
