"""Tests of ``python -m kernels_check trace``: one document or tables on stdout, messages on stderr, and exit codes."""

import json

import pytest

from kernels_check.__main__ import main
from kernels_check.trace import summary

FLASH = (
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t>, false, true, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)"
)


@pytest.fixture
def recording(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": 10 * i, "dur": 5, "args": {"device": 0, "stream": 7}}
        for i, name in enumerate([FLASH, "ampere_sgemm_128x64_tn", "renamed [bold] kernel", FLASH])
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
