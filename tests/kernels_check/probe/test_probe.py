"""The probe counts a path as run only by what ran, and its exit status says whether anything misleads."""

import json
import math
import warnings

import pytest
import torch
from negative_controls.small_run import only_math

from kernels_check.__main__ import main
from kernels_check.probe import attention as probe_attention
from kernels_check.probe import base as probe_base
from kernels_check.probe import probe
from kernels_check.probe import training as probe_training
from kernels_check.probe.attempt import (
    UnavailableError,
    report,
)
from kernels_check.probe.result import Attempt, Exactness

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU answers")
GOOD = Exactness(what="error", error=0.1, bound=0.2, source="here")


def ran(*comparisons, evidence="aten::op"):
    return lambda device: Attempt(ran=True, evidence=evidence, exactness=comparisons)


def silent(device):
    return Attempt(ran=False, evidence="aten::bmm")


@pytest.fixture
def paths(monkeypatch):
    """Probe some paths instead of all."""
    return lambda **tried: monkeypatch.setattr(probe, "all_paths", lambda: tried)


@pytest.mark.parametrize(
    ("attempt", "status", "code"),
    [
        (ran(GOOD), "exact", 0),
        (ran(GOOD, Exactness(what="gradient", error=0.3, bound=0.2, source="here")), "inexact", 4),
        (ran(Exactness(what="error", error=math.nan, bound=0.2, source="here")), "inexact", 4),
        (ran(), "inexact", 4),
        (silent, "claimed", 4),
    ],
)
def test_the_exit_status_follows_the_worst_path(paths, capsys, attempt, status, code):
    """0 for what agrees with its reference, 4 for wrong numbers, none at all, and silent claims."""
    paths(good=ran(GOOD), other=attempt)
    assert main(["--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert [path["status"] for path in document["paths"]] == ["exact", status]
    assert document["failed"] == (["other"] if code else [])


def test_an_exception_is_the_reason_of_its_own_path_only(paths, capsys):
    """In the library's words, and the paths after it are tried all the same."""

    def raises(device):
        raise ImportError("the package is not\n installed")

    paths(bad=raises, good=ran(GOOD))
    assert main(["probe", "--json"]) == 0
    bad, good = json.loads(capsys.readouterr().out)["paths"]
    assert (bad["status"], bad["can_run"], bad["ran"]) == ("unavailable", False, False)
    assert bad["reason"] == "ImportError: the package is not installed"
    assert good["status"] == "exact"


def test_a_fault_of_the_probe_does_not_pass_for_one_of_the_machine(monkeypatch):
    """An exception of its own code tells nothing, and fails; one that it raises on purpose does not."""
    monkeypatch.setattr(probe_base, "_batch", lambda device: {})
    broken = report("int8", probe_base.TRIES["int8"], "cpu")
    assert broken.status == "broken"
    assert broken.failed

    def refuses(device):
        raise UnavailableError("another CPU is needed")

    assert report("x", refuses, "cpu").status == "unavailable"


def test_a_warning_that_admits_it_is_no_silent_claim():
    """A fallback that is announced is unavailable; a warning about something else excuses nothing."""

    def announced(device):
        warnings.warn("Paged optimizers are not supported on CPU.", stacklevel=1)
        return silent(device)

    def unrelated(device):
        warnings.warn("the year is young", stacklevel=1)
        warnings.warn("use the new name instead", FutureWarning, stacklevel=1)
        return silent(device)

    told = report("x", announced, "cpu")
    assert (told.status, told.reason, told.evidence) == (
        *("unavailable", "Paged optimizers are not supported on CPU."),
        "aten::bmm",
    )
    assert report("x", unrelated, "cpu").status == "claimed"


def test_the_table_has_a_row_a_path(paths, capsys):
    """Verdict, evidence or reason, and the worst comparison; progress goes to stderr."""
    paths(first=ran(GOOD, Exactness(what="gradient", error=0.19, bound=0.2, source="here")), second=silent)
    assert main([]) == 4
    captured = capsys.readouterr()
    assert "ran, exact" in captured.out
    assert "gradient: 0.19 ≤ 0.2" in captured.out
    assert "CLAIMED, did not run" in captured.out
    assert "wrong: second" in captured.out
    assert captured.err.splitlines() == ["kernels_check probe: first", "kernels_check probe: second"]


def test_an_error_without_a_number_is_null_in_json(paths, capsys):
    """JSON has no NaN."""
    paths(bad=ran(Exactness(what="error", error=math.nan, bound=0.2, source="here")))
    assert main(["--json"]) == 4
    compared = json.loads(capsys.readouterr().out)["paths"][0]["exactness"][0]
    assert (compared["error"], compared["holds"]) == (None, False)


@pytest.mark.parametrize("name", ["SDPA flash", "SDPA math", "NF4", "FP4", "int8", "double quantisation"])
def test_a_real_path_runs_and_is_exact(name):
    """On any device, by the operators or stored bytes that the report names."""
    found = report(name, probe.all_paths()[name], "cpu")
    assert found.status == "exact", found
    assert found.speed.low <= found.speed.speedup <= found.speed.high
    assert {comparison.source != "" for comparison in found.exactness} == {True}


def test_the_fused_optimizer_runs_and_is_exact():
    """Told by its operator."""
    found = report("fused optimizer", probe_training.TRIES["fused optimizer"], "cpu")
    assert found.status == "exact", found
    assert "10 updates, aten::_fused_adamw_" in found.evidence


def test_the_fused_product_is_told_or_refused():
    """It runs on a CPU with AVX512_BF16, and says so where there is none."""
    found = report("fused 4-bit GEMM", probe_base.TRIES["fused 4-bit GEMM"], "cpu")
    if found.ran:
        assert (found.status, found.evidence) == ("exact", "bitsandbytes::gemv_4bit")
    else:
        assert "AVX512_BF16" in found.reason


@ON_CPU
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SDPA cuDNN", "No viable backend"),
        ("SDPA memory-efficient", "No viable backend"),
        ("flash-attn 2 package", "FlashAttention2"),
        ("flex attention", "does not support backward on CPU"),
        ("paged optimizer", "Paged optimizers are not supported on CPU"),
        ("tf32", "CUDA" if torch.version.cuda is None else "Found no NVIDIA driver"),  # as its build says it
    ],
)
def test_what_a_cpu_cannot_run_is_explained_by_the_library(name, words):
    """The exception or warning, word for word."""
    found = report(name, probe.all_paths()[name], "cpu")
    assert (found.status, found.ran) == ("unavailable", False)
    assert words in found.reason


def test_math_in_place_of_flash_is_a_claim():
    """A backend that was switched off is accepted in silence; the operator tells."""

    def attempt(device):
        return probe_attention._try(device, backend="flash", implementation="sdpa", around=only_math)

    found = report("SDPA flash", attempt, "cpu")
    assert found.status == "claimed"
    assert "_scaled_dot_product_attention_math" in found.reason


def test_fp4_in_place_of_nf4_is_a_claim(monkeypatch):
    """By the state of the stored weights."""
    real = probe_base._fourbit
    monkeypatch.setattr(probe_base, "_fourbit", lambda device, kind, *, double: real(device, "fp4", double=double))
    found = report("NF4", probe_base.TRIES["NF4"], "cpu")
    assert found.status == "claimed"
    assert "fp4" in found.reason


def test_wrong_attention_is_inexact(monkeypatch):
    """The right operator with a wrong scale does not agree with the reference."""
    real = probe_attention._function

    def scaled(implementation, device):
        attend = real(implementation, device)
        return attend if implementation == "eager" else lambda q, k, v: attend(q * 1.1, k, v)

    monkeypatch.setattr(probe_attention, "_function", scaled)
    found = report("SDPA flash", probe_attention.TRIES["SDPA flash"], "cpu")
    assert (found.status, found.ran) == ("inexact", True)


def test_an_optimizer_that_does_something_else_is_inexact(monkeypatch):
    """Fused, as asked, but with another rate."""
    real = probe_training._adamw

    def adamw(parameters, **options):
        optimizer = real(parameters, **options)
        if options["fused"]:
            optimizer.param_groups[0]["lr"] = 2e-3
        return optimizer

    monkeypatch.setattr(probe_training, "_adamw", adamw)
    assert report("fused optimizer", probe_training.TRIES["fused optimizer"], "cpu").status == "inexact"


def test_a_quantisation_error_below_its_window_is_wrong_too():
    """Too exact for its format means another format."""
    window = Exactness(what="error", error=0.05, least=0.07, bound=0.08, source="here")
    assert not window.holds
    assert window.strain == math.inf


def test_probing_leaves_the_number_of_threads_alone():
    """One thread while it runs, as many as before afterwards."""
    before = torch.get_num_threads()
    threads = []

    def attempt(device):
        threads.append(torch.get_num_threads())
        return Attempt(ran=True, evidence="", exactness=(GOOD,))

    probe.probe({"x": attempt}, "cpu")
    assert threads == [1]
    assert torch.get_num_threads() == before
