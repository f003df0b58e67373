"""Records are looked at when they are read: one that cannot serve is refused with its file and line."""

from __future__ import annotations

import gzip
import json

import pytest

from lorameter.errors import UsageError
from lorameter.studies.workload import Workload
from lorameter.trial.data.records import describe_data, read_records

GOOD = {"instruction": "say it", "context": "", "response": "it"}


def read(path):
    records, label = read_records(Workload(data=str(path)))
    return list(records), label


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], "no records are in it"),
        (["{}", json.dumps(GOOD)], "line 1: no columns that are known. There are none"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "instruction": None})],
            "line 2: instruction = null: a text is expected",
        ),
        ([json.dumps({**GOOD, "response": None})], "line 1: response = null"),
        ([json.dumps(GOOD), "", json.dumps({**GOOD, "response": 3})], "line 3: response = 3"),
        ([json.dumps({**GOOD, "context": ["x"]})], "line 1: context ="),
        ([json.dumps({"instruction": "a", "context": ""})], "line 1: no column 'response'"),
        (["null"], "line 1: None: a table"),
        ([json.dumps([GOOD])], "line 1"),
        ([json.dumps(GOOD), "{"], "line 2: cannot be read as JSON"),
        ([json.dumps({**GOOD, "response": "\ud800"})], "line 1: response ="),
        (["[" * 5000], "line 1: cannot be read as JSON: it is nested too deeply"),
    ],
    ids=lambda value: str(value)[-30:],
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_record_that_cannot_serve_is_named(tmp_path, lines, words, ending):
    """An empty file, a text that is none, a line that is no record."""
    path = tmp_path / f"mine{ending}"
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert words in str(caught.value)
    assert path.name in str(caught.value)
    with pytest.raises(UsageError):  # and so before anything is started
        describe_data(Workload(data=str(path)))


def test_what_is_held_out_is_not_all(tmp_path):
    """Or nothing is left to train on."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 16))
    with pytest.raises(UsageError, match="16 records, and held_out_records = 16: none is left to train on"):
        describe_data(Workload(data=str(path)))
    assert describe_data(Workload(data=str(path), held_out_records=15)).startswith("mine.jsonl, 16 records")
