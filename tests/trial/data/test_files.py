"""Files of every kind give the same rows, and what is wrong with one is said with its line."""

from __future__ import annotations

import gzip

import pytest

from lorameter.errors import UsageError
from lorameter.trial.data.files import open_table

ROWS = [
    {"prompt": "a, b", "completion": 'say "x"\nand y'},
    {"prompt": "Größe", "completion": "3"},
    {"prompt": "q", "completion": "null"},
]


def read(path):
    table = open_table(path, "data")
    return list(table.rows(table.names or ()))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_gives_the_same_rows(write, kind, packed):
    """Quotes, line ends in cells and letters of any script; no text becomes a number or nothing."""
    assert [row for _, row in read(write(f"mine{kind}{packed}", ROWS))] == ROWS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_plain_text_is_a_record_a_line(write, packed):
    """Blank lines are none."""
    rows = [{"text": "one"}, {"text": "  "}, {"text": ""}, {"text": " two"}]
    found = read(write(f"mine.txt{packed}", rows))
    assert found == [("data, line 1", {"text": "one"}), ("data, line 4", {"text": " two"})]


GOOD_LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", GOOD_LINE + b'{"text": "a", "text": "b"}', "data, line 2: cannot be read as JSON: it says 'text'"),
        ("x.jsonl", GOOD_LINE + b'{"m": {"a": 1, "a": 1}}', "line 2: .* it says 'a' twice"),
        ("x.jsonl", GOOD_LINE + b'\xef\xbb\xbf{"text": "a"}', "line 2: cannot be read as JSON"),
        ("x.jsonl", GOOD_LINE + b'{"text": "caf\xe9"}', "line 2: byte 0xe9 at position 14 is no UTF-8"),
        ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: it is UTF-16. Save the file as UTF-8"),
        ("x.jsonl", gzip.compress(GOOD_LINE, mtime=0), r"line 1: it is packed by gzip. Let its name end in \.gz"),
        ("x.jsonl", b'[{"text": "a"}]', r"line 1: .*a table of columns is expected.* ends in \.json"),
        ("x.jsonl", b'[\n{"text": "a"}]', r"line 1: cannot be read as JSON.* ends in \.json"),
        ("x.jsonl.gz", GOOD_LINE, "line 1: cannot be read: Not a gzipped file"),
        ("x.json", b'[{"text": "a"},\n{"text": }]', "cannot be read as JSON: Expecting value: line 2"),
        ("x.json", b'[{"text": "a"},\n{"text": "\xff"}]', "data, line 2: byte 0xff is no UTF-8"),
        ("x.json", b'[{"text": "a", "text": "b"}]', "it says 'text' twice"),
        ("x.json", b'{\n "text": "a"\n}', "line 1: cannot be read as JSON.*a list of records, or a record a line"),
        ("x.csv", b"text,text\na,b", "line 1: two columns are called 'text'"),
        ("x.csv", b'text,b\na,"c\nd"\n"e', "line 4: cannot be read as CSV: unexpected end of data"),
        ("x.csv", b'text,b\na,"c"d\n', "line 2: cannot be read as CSV"),
        ("x.csv", b"text,b\na,c\nd\n", "line 3: 1 cells, and the first row names 2 columns"),
        ("x.csv", b"text,b\na,c\nd,\xe9\n", "line 3: byte 0xe9 at position 3 is no UTF-8"),
        ("x.txt", b"a\nb\xff", "line 2: byte 0xff"),
        ("x.parquet", b"PAR1 and nothing behind it", "no Parquet file"),
        ("x.parquet", b"", "no Parquet file"),
        ("x.parquet.gz", b"PAR1", "cannot be read: Not a gzipped file"),
        ("x.parquet.gz", gzip.compress(b"PAR1", mtime=0), "no Parquet file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, words):
    """And with what to do about it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s){words}"):
        read(path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.txt.gz", "x.json.gz", "x.parquet.gz"])
@pytest.mark.parametrize("keep", [0.4, 0.95])
def test_a_file_cut_short_is_refused(write, name, keep):
    """Wherever it is cut: what was read of it before does not count."""
    path = write(name, [{"text": f"{number} {number**7}"} for number in range(2000)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UsageError, match=r"data.*cannot be read.*Restore|data: no Parquet file"):
        read(path)


@pytest.mark.parametrize("place", [0.1, 0.5])
def test_a_parquet_file_with_a_damaged_page_is_refused(write, place):
    """Its footer is whole, so that only reading tells."""
    path = write("x.parquet", [{"text": f"{number} {number**7}"} for number in range(500)])
    content = bytearray(path.read_bytes())
    begin = int(len(content) * place)
    content[begin : begin + 64] = b"\xff" * 64
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match=r"data, row [0-9]+: cannot be read"):
        read(path)
