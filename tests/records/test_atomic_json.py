"""Tests that a document is written completely or not at all."""

from __future__ import annotations

import json

import pytest

from lorameter.records.fileio import write_document


def test_a_write_replaces_the_document_and_leaves_no_temporary_file(tmp_path):
    """Only one file remains, with the last document."""
    path = tmp_path / "a.json"
    for value in ({"a": 1}, {"a": 2}):
        write_document(path, value)
    assert json.loads(path.read_text()) == {"a": 2}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_previous_document(tmp_path):
    """A failed write leaves the previous document unchanged."""
    path = tmp_path / "a.json"
    write_document(path, {"a": 1})
    with pytest.raises(TypeError):
        write_document(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
