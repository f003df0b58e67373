"""Tests that a document is written completely or not at all."""

from __future__ import annotations

import json

import pytest

from lorameter.records.fileio import write_document


def test_it_replaces_what_was_there_and_leaves_no_draft(tmp_path):
    """Only one file remains, with the last document."""
    path = tmp_path / "a.json"
    for value in ({"a": 1}, {"a": 2}):
        write_document(path, value)
    assert json.loads(path.read_text()) == {"a": 2}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    """A failed write leaves the previous document unchanged."""
    path = tmp_path / "a.json"
    write_document(path, {"a": 1})
    with pytest.raises(TypeError):
        write_document(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
