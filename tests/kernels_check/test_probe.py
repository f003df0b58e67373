"""The probe counts a path as run only by what ran, and its exit code says whether anything misleads."""

import json
import math
import warnings

import pytest
import torch

from kernels_check import probe
from kernels_check.__main__ import main
from kernels_check.probe import PATHS, Attempt, attempt

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU answers")


def ran(error=0.1):
    return lambda device: Attempt(ran=True, evidence="aten::op", errors={"output": 0.0, "dq": error}, bound=0.2)


def silent(device):
    return Attempt(ran=False, evidence="aten::bmm")


def raises(device):
    raise ImportError("the package is not\n installed")


@pytest.fixture
def document(monkeypatch, capsys):
    """The JSON document of some paths, and the exit code."""

    def probed(**paths):
        monkeypatch.setattr(probe, "PATHS", paths)
        code = main(["--json"])
        return json.loads(capsys.readouterr().out), code

    return probed


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [(ran(), "exact", 0), (ran(0.3), "inexact", 4), (ran(math.nan), "inexact", 4), (silent, "claimed", 4),
     (lambda device: Attempt(ran=True, evidence="aten::op"), "inexact", 4), (raises, "unavailable", 0)],
)  # fmt: skip
def test_the_exit_code_follows_the_worst_path(document, path, status, code):
    """4 for wrong numbers, none at all, and silent claims; an exception is the reason of its own path only."""
    found, exit_code = document(other=path, good=ran())
    assert exit_code == code
    assert [path["status"] for path in found["paths"]] == [status, "exact"]
    assert found["failed"] == (["other"] if code else [])
    if status == "unavailable":
        assert found["paths"][0]["reason"] == "ImportError: the package is not installed"


def test_a_warning_that_admits_it_is_no_silent_claim():
    """A fallback that is announced is unavailable; a warning about something else excuses nothing."""

    def announced(device):
        warnings.warn("Paged optimizers are not supported on CPU.", stacklevel=1)
        return silent(device)

    def unrelated(device):
        warnings.warn("the year is young", stacklevel=1)
        warnings.warn("use the new name instead", FutureWarning, stacklevel=1)
        return silent(device)

    found = attempt(announced, "cpu")
    assert (found.status, found.reason) == ("unavailable", "Paged optimizers are not supported on CPU.")
    assert attempt(unrelated, "cpu").status == "claimed"


def test_the_table_has_a_row_a_path(monkeypatch, capsys):
    """Verdict, evidence or reason, and the largest error; progress goes to stderr."""
    monkeypatch.setattr(probe, "PATHS", {"first": ran(0.19), "second": silent})
    assert main([]) == 4
    captured = capsys.readouterr()
    assert all(words in captured.out for words in ("ran, exact", "dq: 0.19 ≤ 0.2", "CLAIMED, did not run"))
    assert captured.out.rstrip().endswith("1 of 2 paths ran; wrong: second")
    assert captured.err.splitlines() == ["kernels_check probe: first", "kernels_check probe: second"]


@pytest.mark.parametrize(
    ("name", "evidence"),
    [("SDPA flash", "flash"), ("SDPA math", "math"), ("NF4", "nf4, 4.500 bits a weight"), ("FP4", "fp4"),
     ("int8", "int8 weights"), ("double quantisation", "4.127 bits"), ("fused optimizer", "10 updates, aten::_fused")],
)  # fmt: skip
def test_a_real_path_runs_and_is_exact(name, evidence):
    """On any device, by the operators or stored bytes that the report names."""
    found = attempt(PATHS[name], "cpu")
    assert found.status == "exact", found
    assert evidence in found.evidence


def test_the_fused_product_runs_or_is_refused():
    """It runs on a CPU with AVX512_BF16, and says so where there is none."""
    found = attempt(PATHS["fused 4-bit GEMM"], "cpu")
    assert (found.status, found.evidence) == ("exact", "bitsandbytes::gemv_4bit") if found.ran else found.reason


@ON_CPU
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SDPA cuDNN", "No viable backend"),
        ("flash-attn 2 package", "FlashAttention2"),
        ("flex attention", "does not support backward on CPU"),
        ("paged optimizer", "Paged optimizers are not supported on CPU"),
        ("tf32", "CUDA" if torch.version.cuda is None else "Found no NVIDIA driver"),
    ],
)
def test_what_a_cpu_cannot_run_is_explained_by_the_library(name, words):
    """The exception or warning, word for word."""
    found = attempt(PATHS[name], "cpu")
    assert found.status == "unavailable"
    assert words in found.reason


def test_math_in_place_of_flash_is_a_claim():
    """A backend that was switched off is accepted in silence; the operator shows it."""
    found = attempt(lambda device: probe._attention(device, backend="flash", only="MATH"), "cpu")
    assert found.status == "claimed"
    assert "_scaled_dot_product_attention_math" in found.evidence


def test_another_format_and_wrong_numbers_are_found(monkeypatch):
    """FP4 weights in an NF4 layer are claimed; attention of another scale and another learning rate are inexact."""
    build, attend, adamw = probe._fourbit, probe._attend_exactly, probe._adamw
    monkeypatch.setattr(probe, "_fourbit", lambda device, kind, *, double: build(device, "fp4", double=double))
    assert attempt(PATHS["NF4"], "cpu").status == "claimed"
    monkeypatch.setattr(probe, "_attend_exactly", lambda query, key, value: attend(query * 1.1, key, value))
    assert attempt(PATHS["SDPA flash"], "cpu").status == "inexact"

    def faster(values, **options):
        optimizer = adamw(values, **options)
        optimizer.param_groups[0]["lr"] *= 2 if options["fused"] else 1
        return optimizer

    monkeypatch.setattr(probe, "_adamw", faster)
    assert attempt(PATHS["fused optimizer"], "cpu").status == "inexact"
