"""Fixtures of the tests of data: tokenizers with and without a chat template, and files of every kind."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from lorameter.models import catalogue, shapes
from lorameter.trial.data.chat import Conversation
from lorameter.trial.data.tokens import load_tokenizer


@pytest.fixture
def tokenizer():
    """A new byte tokenizer."""
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
    """A function that writes rows as a file of the kind in its name, compressed if it ends in .gz."""

    def write_file(name: str, rows: list[dict]) -> Path:
        path, table = tmp_path / name, pandas.DataFrame(rows)
        if ".parquet" in name:
            table.to_parquet(path, compression=None)
        elif ".csv" in name:
            table.to_csv(path, index=False)
        else:
            table.to_json(path, orient="records", lines=".jsonl" in name)
        return path

    return write_file
