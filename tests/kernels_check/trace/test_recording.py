"""Tests of files that cannot be judged: the error says what was found and what to do, without a partial result.

Tests that the tables of nsys are found by their headings among other output.

Tests of ``python -m kernels_check trace``: one document or tables on stdout, messages on stderr, and exit codes.
"""

import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_check import TraceError, read_trace
from kernels_check.__main__ import main
from kernels_check.trace import summary

EVENTS = [
    {"ph": "X", "cat": "kernel", "name": "ampere_sgemm_128x64_tn", "ts": 10.5 * i, "dur": 2, "args": {"stream": 7}}
    for i in range(4)
]
TRACE = json.dumps({"schemaVersion": 1, "traceEvents": EVENTS, "traceName": "t.json"}).encode()
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
    assert message.startswith(f"{path}: ")  # the place
    return message


def refusal_of(tmp_path, content):
    path = tmp_path / "recording"
    path.write_bytes(content)
    return refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (gzip.compress(b" \n", mtime=0), "the file is empty"),
        (b"# Notes\n", "nsys writes it with `nsys stats --report cuda_gpu_kern_sum"),
        (TABLE.decode().encode("utf-16"), "is neither JSON nor CSV"),
        (TABLE.replace(b"void k", b"void \xe4"), "is neither JSON nor CSV"),
        (b"{}", "has no event of a GPU kernel or an operator"),
        (b"[]", "has no event of a GPU kernel"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "cat": "renderer"}]}', "another program's trace?"),
        (b'{"traceEvents": {"a": 1}}', "is not a trace: Expected `array`, got `object` - at `$.traceEvents`"),
        (b'{"traceEvents": [1, null, "x"]}', "is not a trace: Expected `object`, got `int`"),
        (json.dumps({"traceEvents": [EVENTS[0] | {"dur": None}]}).encode(), "no event has a usable duration"),
        (TABLE.replace(b"void k", b"void \0"), "is binary"),
        (json.dumps({"traceEvents": [EVENTS[0] | {"dur": 0}]}).encode(), "the events have 0.0 ms in total"),
        (TRACE[:300], "the JSON ends early: the file was cut off"),
        (TRACE + b"{}", "is not a trace: JSON is malformed"),
        (TRACE.replace(b"10.5", b"NaN", 1), "is not a trace: JSON is malformed"),
        (TRACE.replace(b'{"stream"', 50_000 * b"[" + b'{"stream"', 1), "is not a trace"),
        (b"a,b\n1,2\n", "has no table of kernels"),
        (b"Processing ...\nSKIPPED: r.sqlite does not contain CUDA kernel data.\n", "where it says SKIPPED"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, says):
    """The message says what was found, and what to do."""
    message = refusal_of(tmp_path, content)
    assert says in message
    assert any(remedy in message for remedy in ("Record", "export", "Export", "expected"))


@pytest.mark.parametrize(
    "odd", [{"name": 5}, {"cat": []}, {"args": 3}, {"ts": {}}, {"dur": "soon"}, {"args": {"correlation": 2**70}}]
)
def test_an_invalid_value_in_an_event_does_not_stop_the_judgement(tmp_path, odd):
    """The event is used as far as possible or left out, and the rest of the trace is judged."""
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [EVENTS[0] | odd, *EVENTS]}))
    assert read_trace(path).categories["matmul"] == 1.0


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    """The test covers a missing file, a directory, a pipe without a writer, and a file without permission."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "pipe"):
        assert "there is no such file" in refusal(path)
    if os.geteuid() != 0:
        path = tmp_path / "secret.json"
        path.write_bytes(TRACE)
        path.chmod(0)
        assert "cannot be read: Permission denied" in refusal(path)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(1, len(TRACE) - 1))
def test_a_trace_cut_anywhere_is_refused(tmp_path_factory, cut):
    """A cut after the last event is refused as well, since the missing part is unknown."""
    assert "no part of a damaged file is reported" in refusal_of(tmp_path_factory.mktemp("cut"), TRACE[:cut])


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(1, len(TABLE) - 2))
def test_a_table_cut_anywhere_is_refused(tmp_path_factory, cut):
    """Either a row is incomplete, or the percentages do not add up to 100."""
    refusal_of(tmp_path_factory.mktemp("cut"), TABLE[:cut])


@settings(deadline=None, max_examples=30)
@given(content=st.binary(max_size=200))
def test_any_other_file_is_refused_with_a_message(tmp_path_factory, content):
    """Any file that is not a recording is refused with a message."""
    refusal_of(tmp_path_factory.mktemp("noise"), content)


@pytest.mark.parametrize("packed", [TRACE + 40_000_000 * b" ", TABLE + 40_000_000 * b" "], ids=["trace", "table"])
def test_a_small_gzip_of_gigabytes_is_refused(tmp_path, monkeypatch, packed):
    """The file could unpack to gigabytes."""
    monkeypatch.setattr("kernels_check.trace.recording.UNPACKED_FREELY_BYTES", 32 << 20)
    message = refusal_of(tmp_path, gzip.compress(packed, compresslevel=1))
    assert "unpack to more than 33,554,432, over 100 times as many" in message
    assert "pass the unpacked file" in message


STEP = '{"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#%d", "pid": 9, "tid": 9, "ts": %d, "dur": 10000},\n'
THREE = (
    '{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 9, "tid": 9, "ts": %d.125, "dur": 5.5, "args": '
    '{"External id": %d, "Record function id": 0, "Input Dims": [[2, 2048, 4096], [4096, 4096]]}},\n'
    '{"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 9, "ts": %d.5, "dur": 2, '
    '"args": {"External id": 1, "cbid": 211, "correlation": %d}},\n'
    '{"ph": "X", "cat": "kernel", "name": "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "pid": 0, "tid": 7, "ts": %d, '
    '"dur": 5, "args": {"External id": 1, "queued": 0, "device": 0, "context": 1, "stream": 7, "correlation": %d, '
    '"registers per thread": 168, "shared memory": 213320, "grid": [132, 1, 1], "block": [384, 1, 1]}},\n'
)
READ = """
import json, re, sys
import kernels_check
from kernels_check.trace import summary

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

before = peak()
found = kernels_check.read_trace(sys.argv[1])
heavy = [name for name in ("torch", "pandas", "scipy", "rich") if name in sys.modules]
print(json.dumps([found.calls, found.busy_share, found.kernels_per_step.median, peak() - before, heavy]))
"""


def test_a_large_trace_takes_up_to_three_times_its_size_in_memory(tmp_path):
    """Kernels run 5 ms after their launch, half of them in the next step, and count for the launching step. torch is
    not imported."""
    path, steps = tmp_path / "large.json", 60
    with path.open("w") as file:
        file.write('{"schemaVersion": 1,\n "traceEvents": [\n')
        for step in range(steps):
            file.write(STEP % (step, 10_000 * step))
            for index in range(1000):
                at, correlation = 10_000 * step + 10 * index, 1000 * step + index
                file.write(THREE % (at, correlation, at, correlation, at + 5_003, correlation))
        file.write(" {}\n]}\n")
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    calls, busy_share, median, grown_bytes, heavy = json.loads(done.stdout)
    assert (calls, median, heavy) == (1000 * steps, 1000, [])
    assert busy_share == pytest.approx(0.5, rel=1e-3)
    assert grown_bytes < 3 * path.stat().st_size


HEADING = "Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name\n"
FLASH = (
    '60.0,6000000,6,1.0,1.0,1,1,0.0,"void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<'
    "(int)64, (int)128, (int)128, (int)4, (bool)0, (bool)0, cutlass::bfloat16_t>, (bool)0, (bool)1, (bool)0, (bool)0, "
    '(bool)1, (bool)1, (bool)0, (bool)0>(pytorch_flash::Flash_fwd_params)"\n'
)  # fmt: skip
NF4 = (
    '30.0,3000000,3,1.0,1.0,1,1,0.0,"void kDequantizeBlockwise<__nv_bfloat16, (int)512, (int)64, (int)8, (int)2>'
    '(float *, unsigned char *, float *, T1 *, int, int)"\n'
)
NEW = "10.0,1000000,2,1.0,1.0,1,1,0.0,renamed_kernel\n"
MEMORY = (
    "\nTime (%),Total Time (ns),Count,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Operation\n"
    "75.0,750000,5,1.0,1.0,1,1,0.0,[CUDA memcpy Host-to-Device]\n25.0,250000,5,1.0,1.0,1,1,0.0,[CUDA memset]\n"
)


@pytest.fixture
def judge(tmp_path):
    def judged(text, pack=bytes):
        path = tmp_path / "kernels.csv"
        path.write_bytes(pack(text.encode()))
        return read_trace(path)

    return judged


@pytest.mark.parametrize(
    ("before", "newline", "pack"),
    [("Processing [a.sqlite] with [b.py]...\n", "\r\n", gzip.compress), ("[3/8] Executing 'x'\n\n", "\n", bytes)],
)
def test_a_table_is_judged(judge, before, newline, pack):
    """Casts, preceding progress lines, Windows line ends and compression change nothing."""
    summary = judge((before + HEADING + FLASH + NF4 + NEW).replace("\n", newline), pack)
    assert summary.source == "nsys"
    assert summary.time_ms == pytest.approx(10.0)
    flash = summary.attention.backends["flash"]
    assert (flash.calls, flash.time_share, flash.dtypes, flash.causal_calls) == (6, 0.6, {"bfloat16": 6}, 6)
    assert summary.fourbit.paths["dequantize"].calls == 3
    assert summary.fourbit.quant_types["nf4"].time_share == pytest.approx(0.3)
    assert summary.unclassified.names == ("renamed_kernel",)
    assert summary.unclassified.time_share == pytest.approx(0.1)


def test_a_table_has_no_intervals(judge):
    """Busy share and kernels a step are unknown, and a notice gives the reason."""
    summary = judge(HEADING + FLASH + NF4 + NEW)
    assert summary.busy_share is None
    assert summary.kernels_per_step is None
    assert (
        "an nsys summary has sums and no intervals: neither busy share nor kernels per step can be computed"
        in summary.notices
    )


def test_memory_operations_count_where_their_table_is_there(judge):
    """nsys lists copies in a separate table with its own 100 %."""
    summary = judge(HEADING + FLASH + NF4 + NEW + MEMORY)
    assert summary.time_ms == pytest.approx(11.0)
    assert summary.categories["copy"] == pytest.approx(1 / 11)


def test_other_tables_do_not_count(judge):
    """API calls are on the host; a second kernel table lists the same launches by another key."""
    api = "\nTime (%),Total Time (ns),Num Calls,Avg (ns),Name\n100.0,9000000,5,1.0,cudaLaunchKernel\n"
    once = judge(HEADING + FLASH + NF4 + NEW)
    both = judge(HEADING + FLASH + NF4 + NEW + api + "\n" + HEADING + FLASH + NF4 + NEW)
    assert both.time_ms == once.time_ms


def test_rounded_percentages_are_not_missing_rows(judge):
    """Many small kernels may each show 0.0 %."""
    rows = "".join(f"0.0,100,1,1.0,1.0,1,1,0.0,kernel_{i}\n" for i in range(40))
    assert judge(HEADING + "98.1,210000,1,1.0,1.0,1,1,0.0,ampere_sgemm_128x64_tn\n" + rows).calls == 41


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("100.0,1000,1\n", "the row ['100.0', '1000', '1'] is damaged"),
        ("100.0,many,1,1,1,1,1,1,k\n", "is damaged (could not convert string to float: 'many')"),
        ("100.0,1000,0,1,1,1,1,1,k\n", "has no name, calls or time"),
        ("100.0,nan,1,1,1,1,1,1,k\n", "has no name, calls or time"),
        ("100.0,1000,1,1,1,1,1,1,\n", "has no name, calls or time"),
        ('100.0,1000,1,1,1,1,1,1,"k\n', "is neither JSON nor CSV"),
        ("", "has no table of kernels"),
        ("100.0,0,1,1,1,1,1,1,k\n", "the events have 0.0 ms in total"),
        (FLASH + NF4, "2 rows add up to 90.0 % of their time: rows are missing"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, row, says):
    """The error shows the row; no row is skipped, and a table that was cut between two rows would give wrong shares."""
    assert says in refusal_of(tmp_path, (HEADING + row).encode())


FLASH_REPORT = (
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t>, false, true, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)"
)


@pytest.fixture
def recording(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": 10 * i, "dur": 5, "args": {"device": 0, "stream": 7}}
        for i, name in enumerate([FLASH_REPORT, "ampere_sgemm_128x64_tn", "renamed [bold] kernel", FLASH_REPORT])
    ]
    events.append({"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 50})
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events + events[:1]}))
    return path


def test_tables_show_the_document(recording, capsys, monkeypatch):
    """The tables show launches, GPU time and categories, and print a kernel name that looks like markup as plain
    text."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["trace", str(recording)]) == 0
    out = capsys.readouterr().out
    assert "4 kernel launches, 0.020 ms of GPU time" in out
    assert "busy share 57.1%" in out
    assert "kernels a step: median 4, 4 to 4 over 1 step" in out
    for shown in ("flash", "2 bfloat16", "2 causal", "matmul", "renamed [bold] kernel", "Names that no rule knows: 1"):
        assert shown in out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_bad_input_exits_with_2(tmp_path, capsys, form):
    """For bad input the message goes to stderr and stdout stays empty."""
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": [')
    assert main(["trace", str(path), *form]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kernels_check: {path}: the JSON ends early")


def test_an_unexpected_error_exits_with_70(recording, capsys, monkeypatch):
    """An unexpected error exits with 70; codes 1 and 2 are reserved for findings about the recording."""
    monkeypatch.setattr(summary, "read_trace", lambda path: 1 / 0)
    assert main(["trace", str(recording)]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert "ZeroDivisionError" in err
    assert "unexpected error" in err
