"""``python -m kernels_check trace`` and ``rules``: one document or tables on stdout, the rest on stderr, exit codes."""

import json
import subprocess
import sys

import pytest

from kernels_check import rules_report
from kernels_check.__main__ import main
from kernels_check.rules import load_operator_rules, load_rules, validated_against
from kernels_check.trace import report as trace_report

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


def test_tables_show_what_the_document_holds(recording, capsys, monkeypatch):
    """Names of kernels are text and no markup."""
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
    """The message is on stderr, stdout stays empty."""
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": [')
    assert main(["trace", str(path), *form]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kernels_check: {path}: the JSON ends early")


def test_an_unexpected_error_exits_with_70(recording, capsys, monkeypatch):
    """Never 1 or 2, which say something about the recording."""
    monkeypatch.setattr(trace_report, "read_trace", lambda path: 1 / 0)
    assert main(["trace", str(recording)]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert "ZeroDivisionError" in err
    assert "unexpected error" in err


def test_a_reader_that_closes_the_pipe_is_no_error(recording):
    """``| head -c 1`` ends without a word of it, with the code of a program that SIGPIPE ended; notices of other
    versions than the validated ones are another matter."""
    command = f"{sys.executable} -m kernels_check rules --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)  # all of it fits into a pipe, if that is still open
    assert not [line for line in done.stderr.splitlines() if not line.startswith("notice: ")]


def test_the_rules_are_printed_in_order_with_evidence(capsys):
    """Pattern, meaning, category, grades, GPU only or not, and versions, for each."""
    assert main(["rules", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [rule["name"] for rule in document["rules"]] == [rule.name for rule in load_rules()]
    assert [rule["name"] for rule in document["operators"]] == [rule.name for rule in load_operator_rules()]
    flash = next(rule for rule in document["rules"] if rule["name"] == "ATT-SDPA-FLASH")
    assert flash["evidence"] == ["B", "G"]
    assert flash["gpu_only"] is True
    assert flash["validated_against"] == {"torch": validated_against()["torch"]}
    assert {"pattern", "meaning", "category"} <= set(flash)
    assert document["validated_against"] == validated_against()

    assert main(["rules"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f" {rule.name} ·") for rule in load_rules()]
    assert places == sorted(places)
    assert "evidence B, G · GPU only · torch 2.13.0+cu130" in out
    assert "CPU and GPU" in out
    assert all(rule.pattern in out for rule in (*load_rules(), *load_operator_rules()))


@pytest.mark.parametrize(
    ("installed", "standing"),
    [("2.13.0+cpu", "same"), ("2.13.0", "same"), ("2.14.0", "other"), (None, "not installed")],
)
def test_versions_that_differ_are_a_notice(capsys, monkeypatch, installed, standing):
    """A build of the same release has the same names; another release may not, which is no error."""
    monkeypatch.setattr(rules_report, "_installed", lambda library: installed if library == "torch" else None)
    assert main(["rules", "--check", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["installed"]["torch"]["standing"] == standing
    notice = "torch 2.14.0 is installed, its rules were validated against 2.13.0+cu130: kernels may have been renamed"
    assert (notice in err) == (standing == "other")
    assert [text.startswith(notice) for text in document["notices"]] == [True] * (standing == "other")
    assert main(["rules", "--check"]) == 0
    out = capsys.readouterr().out
    assert standing in out
    assert "ATT-SDPA-FLASH" not in out


def test_the_installed_version_is_that_of_its_distribution():
    """A library may come under another name, such as cuDNN's, or not at all; a distribution may leave out which build
    it is, as PyPI's of torch does."""
    versions = {one.library: one for one in rules_report.installed_versions()}
    assert set(versions) == set(validated_against())
    torch = versions["torch"].installed
    assert torch is not None
    import torch as imported

    assert torch.partition("+")[0] == imported.__version__.partition("+")[0]
