"""Files of every kind, saved data sets and the hub give the same records; errors name file and row."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest

from lorameter.errors import UsageError
from lorameter.studies.workload import DataColumns, Workload
from lorameter.trial.data.records import describe_data, read_records, recognise

SAMPLE = [
    {"prompt": "a, b", "completion": 'say "x"\nand y'},
    {"prompt": "Größe", "completion": "3"},
    {"prompt": "q", "completion": "null"},
]


def read(data, **changes):
    records, label = read_records(Workload(data=str(data), **changes))
    return list(records), label


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_gives_the_same_rows(write, kind, packed):
    """Quotes, line ends in cells and letters of any script; no text becomes a number or nothing."""
    records, _ = read(write(f"mine{kind}{packed}", SAMPLE))
    assert sorted(map(str, records)) == sorted(map(str, SAMPLE))


GOOD_LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", GOOD_LINE + b'{"text": "caf\xe9"}', "line 2: cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("x.jsonl", GOOD_LINE + b'{"text": ', "line 2: cannot be read: Expecting value"),
        ("x.jsonl", gzip.compress(GOOD_LINE, mtime=0), "line 1: cannot be read: 'utf-8' codec"),
        ("x.jsonl", b'[{"text": "a"}]', "line 1: .*a record with named columns is expected"),
        ("x.jsonl.gz", GOOD_LINE, "line 1: cannot be read: Not a gzipped file"),
        ("x.json", b'[{"text": "a"},\n{"text": }]', "cannot be read: Expecting value: line 2"),
        ("x.json", b'{\n "text": "a"\n}', "record 1: cannot be read"),
        ("x.csv", b"text,text\na,b", "row 2: cannot be read: two columns have the name 'text'"),
        ("x.csv", b'text,b\na,"c\nd"\n"e', "row 3: cannot be read: unexpected end of data"),
        ("x.csv", b'text,b\na,"c"d\n', "row 2: cannot be read"),
        ("x.csv", b"text,b\na,c\nd\n", "row 3: cannot be read: 1 cells, and the first row names 2 columns"),
        ("x.csv", b"text,b\na,c\nd,\xe9\n", "row 3: cannot be read: 'utf-8' codec"),
        ("x.txt", b"a\nb\xff", "line 2: cannot be read: 'utf-8' codec"),
        ("x.parquet", b"PAR1 and nothing behind it", "row 1: cannot be read: Parquet magic bytes not found"),
        ("x.parquet.gz", b"PAR1", "row 1: cannot be read: Not a gzipped file"),
    ],
)  # fmt: skip
def test_an_unreadable_row_is_named(tmp_path, name, content, words):
    """With its file, and with the reader's reason."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s){words}"):
        read(path)


GOOD = {"instruction": "say it", "context": "", "response": "it"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], "it has no records"),
        (["{}", json.dumps(GOOD)], "no known columns. There are none"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "instruction": None})],
            "line 2: instruction = null: a text is expected",
        ),
        ([json.dumps({**GOOD, "response": None})], "line 1: response = null"),
        ([json.dumps(GOOD), "", json.dumps({**GOOD, "response": 3})], "line 3: response = 3"),
        ([json.dumps({**GOOD, "context": ["x"]})], "line 1: context ="),
        ([json.dumps({"instruction": "a", "context": ""})], "no column 'response'"),
        (["null"], "line 1: None: a record"),
        ([json.dumps([GOOD])], "line 1"),
        ([json.dumps(GOOD), "{"], "line 2: cannot be read"),
        ([json.dumps({**GOOD, "response": "\ud800"})], "line 1: response ="),
        (["[" * 5000], "line 1: cannot be read"),
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


datasets.disable_progress_bars()
ROWS = [{"prompt": f"p{number}", "completion": "c", "score": number} for number in range(600)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def test_a_saved_data_set_is_read_whole(tmp_path):
    """In several shards and with its order changed; only the columns that are trained on."""
    data = datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(500))
    data.save_to_disk(tmp_path / "mine", num_shards=3)
    records, label = read(str(tmp_path / "mine"))
    assert label == "mine, 500 records of prompt/completion" == describe_data(Workload(data=str(tmp_path / "mine")))
    expected = [{"prompt": row["prompt"], "completion": row["completion"]} for row in data]
    assert sorted(map(str, records)) == sorted(map(str, expected))


def test_a_folder_of_files_is_one_data_set(write, tmp_path):
    """Of the files of the split, in the order of their names; other files there are ignored."""
    for part in (1, 0):
        write(f"train-{part}.jsonl.gz", ROWS[2 * part : 2 * part + 2])
    write("test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(str(tmp_path))[1].endswith("[train], 4 records of prompt/completion")
    assert read(f"{tmp_path}[test]")[1].endswith("[test], 1 records of prompt/completion")


def test_a_data_set_of_the_hub_is_asked_for_by_configuration_and_split(monkeypatch):
    """It is read like a saved one; what the library says of one that cannot be had is said."""
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "owner/gone":
            raise ConnectionError("Couldn't reach it.\nat all")
        return datasets.Dataset.from_list([{"messages": CHAT}] * 40)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert (
        describe_data(Workload(data="owner/name:main"))
        == "owner/name:main[train] of the hub, checked when it is downloaded"
    )
    assert asked == []
    assert read("owner/name:main[test]")[1] == "owner/name:main[test], 40 records of messages"
    with pytest.raises(
        UsageError, match=r"data 'owner/gone': cannot be read: ConnectionError: Couldn't reach it\. Give"
    ):
        read("owner/gone")
    assert asked == [("owner/name", "main", "test"), ("owner/gone", None, "train")]


@pytest.mark.parametrize(
    ("names", "title", "parts"),
    [
        ("instruction context response id", "instruction/context/response", {"instruction", "context", "response"}),
        ("instruction response", "instruction/response", {"instruction", "response"}),
        ("instruction input output", "instruction/input/output", {"instruction", "context", "response"}),
        ("instruction input output text", "instruction/input/output", {"instruction", "context", "response"}),
        ("output instruction", "instruction/output", {"instruction", "response"}),
        ("prompt completion", "prompt/completion", {"prompt", "completion"}),
        ("messages prompt prompt_id", "messages", {"messages"}),
        ("id conversations", "conversations", {"messages"}),
        ("text label", "text", {"text"}),
    ],
)  # fmt: skip
def test_columns_that_people_have_are_recognised(names, title, parts):
    """Of dolly, Alpaca, prompts with completions, chats, ShareGPT and plain text, in any order, among other columns."""
    form = recognise(names.split(), DataColumns(), "data")
    assert (form.title, set(form.columns)) == (title, parts)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("question answer", "no known columns. There are 'question', 'answer'"),
        ("instruction context", "no column 'response'"),
        ("instruction input", "no column 'output'"),
        ("prompt", "no column 'completion'"),
        ("messages conversations", "can be read as messages and as conversations"),
        ("prompt completion messages", "can be read as prompt/completion and as messages"),
        ("instruction response output", "instruction/response and as instruction/output"),
        ("", "no known columns"),
    ],
)
def test_what_is_not_recognised_or_twice_is_refused(names, words):
    """With the columns that are there, and with how to name them."""
    with pytest.raises(UsageError, match=words) as caught:
        recognise(names.split(), DataColumns(), "data 'x', line 1")
    assert "data 'x', line 1" in str(caught.value)
    assert "columns = { instruction" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "row", "words"),
    [
        (["prompt", "completion"], {"prompt": "a"}, "no column 'completion'. The first record has prompt/completion"),
        (["text"], {"instruction": "a", "response": "b"}, "no column 'text'. The first record has text"),
        (["text"], {"text": None}, "text = null: a text is expected"),
        (["text"], {"text": 3}, "text = 3: a text"),
        (["text"], {"text": ["a"]}, r"text = \['a'\]: a text"),
        (["text"], {"text": "\ud800"}, "text = .*: a text"),
        (["text"], ["a"], r"\['a'\]: a record with named columns is expected"),
        (["instruction", "output"], {"instruction": "a", "input": "b", "output": "c"}, "it has 'input', and the first"),
        (["instruction", "input", "output"], {"instruction": "a", "output": "c"}, "no column 'input'"),
        (["messages"], {"messages": "[]"}, r"messages = '\[\]': a list of messages is expected"),
    ],
)
def test_a_row_that_differs_from_the_first_is_refused(names, row, words):
    """A column too few, one more that would be lost, a value that is no text."""
    form = recognise(names, DataColumns(), "data")
    with pytest.raises(UsageError, match=f"line 9: {words}"):
        form.read(row, "line 9")
