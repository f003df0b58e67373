"""Shared by the tests of data: tokenizers with and without a chat template, and files of every kind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lorameter.models import catalogue, shapes
from lorameter.trial.data.chat import Conversation
from lorameter.trial.data.tokens import load_tokenizer


@pytest.fixture
def tokenizer():
    """The byte tokenizer, a new one each time."""
    source = catalogue.resolve("tiny-llama")
    return load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)[0]


@pytest.fixture
def chat():
    """A function that makes a conversation of pairs of role and content."""

    def make(*turns: tuple[str, str]) -> Conversation:
        return Conversation(place="line 7", messages=tuple({"role": role, "content": text} for role, text in turns))

    return make


@pytest.fixture
def write(tmp_path):
    """A function that writes rows as a file of the kind that its name says; returns its path."""

    def write_file(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        kind = Path(name.removesuffix(".gz")).suffix
        if kind == ".jsonl":
            content = "\n".join(map(json.dumps, rows)).encode()
        elif kind == ".json":
            content = json.dumps(rows, indent=1).encode()
        elif kind == ".csv":
            content = _csv(rows)
        elif kind == ".txt":
            content = "\n".join(row["text"] for row in rows).encode()
        else:
            content = _parquet(rows)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_file


def _csv(rows: list[dict]) -> bytes:
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict]) -> bytes:
    import io

    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()
