"""A file that cannot be judged says what was found, how far it was read, and what to do; it never half-answers."""

import gzip
import json
import os
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_check import TraceError, read_trace

EVENTS = [
    {"ph": "X", "cat": "kernel", "name": "ampere_sgemm_128x64_tn", "ts": 10.5 * i, "dur": 2, "args": {"stream": 7}}
    for i in range(4)
]
TRACE = json.dumps({"schemaVersion": 1, "traceEvents": EVENTS, "traceName": "t.json"}).encode()
PACKED = gzip.compress(TRACE)
TABLE = (
    b"Processing [r.sqlite] with [cuda_gpu_kern_sum.py]...\n"
    b"Time (%),Total Time (ns),Instances,Avg (ns),Name\n"
    b'60.0,600,3,200.0,"void k<(int)1, (int)2>(int)"\n'
    b'40.0,400,1,400.0,"void l<(int)3, (int)4>(int)"\n'
)


def refusal(path):
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")  # where
    return message


def refusal_of(tmp_path, content):
    path = tmp_path / "recording"
    path.write_bytes(content)
    return refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b" \n \n", "begins with blank space only"),
        (gzip.compress(b"", mtime=0), "nothing is left after unpacking"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"SQLite format 3\0rest", "is an SQLite database, as nsys exports it"),
        (b"\x28\xb5\x2f\xfdrest", "is a zstd archive"),
        (b"\x00\x01\x02\x03", "is binary (begins with b'\\x00\\x01\\x02\\x03')"),
        ("{}".encode("utf-16"), "is UTF-16 text, as a PowerShell redirection writes it"),
        (TABLE.decode().encode("utf-16"), "is UTF-16 text"),
        (b"{}", "is JSON, but holds no trace events (2 bytes read"),
        (b"[]", "is JSON, but holds no trace events"),
        (b'{"traceEvents": []}', "is JSON, but holds no trace events"),
        (b'{"traceEvents": {"a": 1}}', "is JSON, but holds no trace events"),
        (b'{"other": [{"ph": "X", "cat": "kernel"}]}', "is JSON, but holds no trace events"),
        (b'{"traceEvents": [1, null, "x"]}', "3 trace events, none of them a GPU kernel or an operator"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "cat": "renderer"}]}', "1 trace events, none of them"),
        (b'{"traceEvents": [{"ph": "X", "name": 3, "cat": "kernel"}]}', "1 trace events, none of them"),
        (json.dumps({"traceEvents": [EVENTS[0] | {"dur": 0}]}).encode(), "what ran has 0.0 ms in all"),
        (json.dumps({"traceEvents": [EVENTS[0] | {"dur": None}]}).encode(), "no event has a usable duration"),
        (TRACE[:-1] + b", x}", "the JSON is corrupt"),
        (TRACE + b"{}", "the JSON is corrupt"),
        (TRACE.replace(b'"ph"', b'ph"', 1), "the JSON is corrupt"),
        (TRACE.replace(b"10.5", b"NaN", 1), "the JSON is corrupt"),
        (TRACE.replace(b"sgemm", b"\xff\xfe", 1), "the JSON is corrupt"),
        (b"# Notes\n\nNothing of interest.\n", "no table of kernels in 30 bytes of text"),
        (b"a,b\n1,2\n", "no table of kernels"),
        (b"Processing ...\nSKIPPED: r.sqlite does not contain CUDA kernel data.\n", "where it says SKIPPED"),
        (TABLE.replace(b"void k", b"void \xe4"), "not UTF-8 text (byte 0xe4)"),
    ],
)  # fmt: skip
def test_what_is_no_recording_is_refused(tmp_path, content, says):
    """Each wrong file has its own message, with what to do."""
    message = refusal_of(tmp_path, content)
    assert says in message
    remedies = ("Record", "Pass", "export", "Export", "expected")
    assert any(remedy in message for remedy in remedies)


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    """Missing, a directory, without permission."""
    assert "there is no such file" in refusal(tmp_path / "missing.json")
    assert "is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # that nobody writes into
    assert "is no plain file" in refusal(tmp_path / "pipe")
    if os.geteuid() != 0:
        path = tmp_path / "secret.json"
        path.write_bytes(TRACE)
        path.chmod(0)
        assert "cannot be read: Permission denied" in refusal(path)


def test_a_cut_says_how_far_it_was_read(tmp_path):
    """The number of complete events and of bytes tell whether a copy or the recording itself was cut."""
    message = refusal_of(tmp_path, TRACE[:300])
    assert "the JSON ends early: the file was cut off, after 2 events and 300 bytes" in message
    assert "nothing of a damaged file is reported" in message


@settings(deadline=None)
@given(cut=st.integers(1, len(TRACE) - 1))
def test_a_trace_cut_anywhere_is_refused(tmp_path_factory, cut):
    """Even behind the last event: what is missing is unknown."""
    refusal_of(tmp_path_factory.mktemp("cut"), TRACE[:cut])


@settings(deadline=None)
@given(cut=st.integers(1, len(PACKED) - 1))
def test_a_gzip_cut_anywhere_is_refused(tmp_path_factory, cut):
    """Also within its checksum."""
    message = refusal_of(tmp_path_factory.mktemp("cut"), PACKED[:cut])
    if cut > 20:
        assert "the gzip stream ends early" in message


@settings(deadline=None)
@given(cut=st.integers(1, len(TABLE) - 2))
def test_a_table_cut_anywhere_is_refused(tmp_path_factory, cut):
    """A row breaks off, or the percentages do not add up to 100."""
    refusal_of(tmp_path_factory.mktemp("cut"), TABLE[:cut])


@settings(deadline=None)
@given(position=st.integers(10, len(PACKED) - 1).filter(lambda at: at != len(PACKED) - 9), bits=st.integers(1, 255))
def test_a_corrupt_gzip_is_refused(tmp_path_factory, position, bits):
    """The checksum notices a changed bit anywhere behind the header but in what fills up the byte before it."""
    packed = bytearray(PACKED)
    packed[position] ^= bits
    message = refusal_of(tmp_path_factory.mktemp("corrupt"), bytes(packed))
    assert "gzip stream" in message or "JSON" in message


@settings(deadline=None)
@given(content=st.binary(max_size=200))
def test_no_file_raises_anything_else(tmp_path_factory, content):
    """Whatever is in it, a file that is no recording is refused in words."""
    refusal_of(tmp_path_factory.mktemp("noise"), content)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from(["ph", "cat", "name", "pid", "tid", "ts", "dur", "args"]), json_values))
@example(values={"ph": -(2**63)})
@example(values={"args": {"correlation": 2**63}})
@example(values={"id": 2**64 + 1})
def test_odd_values_in_an_event_do_no_harm(tmp_path_factory, values):
    """Any JSON value in any field: the event is used or left out, and the rest of the trace is judged."""
    path = tmp_path_factory.mktemp("odd") / "trace.json"
    path.write_text(json.dumps({"traceEvents": [EVENTS[0] | values, *EVENTS]}))
    assert sum(read_trace(path).categories.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("number", ["1" + 5000 * "0", "1e400", f"0.{5000 * '1'}"])
def test_a_number_of_any_length_is_read(tmp_path, number):
    """One that is no finite time leaves its event without one; Python's limit on digits is as before."""
    path = tmp_path / "trace.json"
    content = json.dumps({"traceEvents": [*EVENTS, EVENTS[0] | {"ts": "HERE", "pid": 3}]})
    path.write_text(content.replace('"HERE"', number))
    limit = sys.get_int_max_str_digits()
    assert read_trace(path).calls == len(EVENTS) + 1
    assert sys.get_int_max_str_digits() == limit


DEEP = 50_000 * "["
LONG = 2 << 20


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (DEEP, "it nests deeper than 256 levels"),
        (50_000 * '{"a":', "it nests deeper than 256 levels"),
        (3_000_000 * "7", "a number has more than 10,000 digits"),
        ("0." + 20_000 * "7", "a number has more than 10,000 digits"),
        ('"' + LONG * "a" + '"', "a string is longer than 1 MiB"),
        ('"' + LONG * "\\\\" + '"', "a string is longer than 1 MiB"),
    ],
    ids=["lists", "objects", "integer", "fraction", "string", "escapes"],
)
def test_what_no_recorder_writes_is_refused(tmp_path, value, says):
    """Before it costs gigabytes or minutes; what was read until then is told."""
    event = json.dumps(EVENTS[0] | {"args": "HERE"}).replace('"HERE"', value)
    message = refusal_of(tmp_path, f'{{"traceEvents": [{json.dumps(EVENTS[1])}, {event}]}}'.encode())
    assert f"is no trace: {says}" in message
    assert "export_chrome_trace()" in message


@pytest.mark.parametrize("packed", [TRACE + 40_000_000 * b" ", TABLE + 40_000_000 * b" "], ids=["trace", "table"])
def test_a_small_gzip_of_much_nothing_is_refused(tmp_path, monkeypatch, packed):
    """It could unpack to gigabytes; one below the limit is read to its end."""
    monkeypatch.setattr("kernels_check.trace.file.UNPACKED_FREELY_BYTES", 32 << 20)
    message = refusal_of(tmp_path, gzip.compress(packed, compresslevel=1))
    assert "unpack to more than 33,554,432, over 100 times as many" in message
    assert "pass the unpacked file" in message


def test_nothing_heavy_is_loaded(tmp_path):
    """A recording is judged on a laptop: torch stays out."""
    import subprocess

    path = tmp_path / "trace.json"
    path.write_bytes(TRACE)
    code = (
        "import sys, kernels_check; kernels_check.read_trace(sys.argv[1]);"
        "print([name for name in ('torch', 'pandas', 'scipy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
