"""Tests of `kernels_check selftest`: twelve faults are found on this machine, and a missed fault fails the command.

Tests of the probe: a path ran only if the check of a real step says so, and a path that is accepted but does not run
fails the command.
"""

import dataclasses
import json

import pytest
import torch

from kernels_check import probe, selftest
from kernels_check.__main__ import main
from kernels_check.probe import PATHS, try_path
from kernels_check.small_run import build

EAGER = selftest.CONTROLS[0]
MISSED = dataclasses.replace(EAGER, name="missed", fault=EAGER.healthy)


@pytest.fixture
def use_controls(monkeypatch):
    """A function that replaces the twelve controls."""
    return lambda *controls: monkeypatch.setattr(selftest, "CONTROLS", controls)


def test_every_fault_is_found_and_every_healthy_run_passes(capsys):
    """The twelve controls each test another path; the command exits with 0."""
    assert main(["selftest"]) == 0
    output = capsys.readouterr().out
    assert len({control.path for control in selftest.CONTROLS}) == 12
    assert "fallback (eager)" in output
    assert "active (flash)" in output
    assert output.rstrip().endswith("12 of 12 hold")
    assert all(control.name in output for control in selftest.CONTROLS)


def test_a_fault_that_is_not_found_fails_the_command(use_controls, capsys):
    """A missed fault, a failing healthy run and an exception exit with 4 and the reason."""
    broken = dataclasses.replace(EAGER, name="broken", healthy=EAGER.fault)
    raises = dataclasses.replace(EAGER, name="raises", fault=lambda: selftest.build(attention="none"))
    use_controls(EAGER, MISSED, broken, raises)
    assert main(["selftest"]) == 4
    output = capsys.readouterr().out
    assert "FAILED: missed: the fault is active" in output
    assert "FAILED: broken: the healthy run is fallback" in output
    assert "FAILED: raises: ValueError" in output
    assert "1 of 4 hold" in output


def test_json_is_one_document_with_both_checks(use_controls, capsys):
    """stdout has only the document, and progress goes to stderr."""
    use_controls(EAGER, MISSED)
    assert main(["selftest", "--json"]) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["schema"], document["held"], document["counts"]) == (1, False, {"held": 1, "failed": 1})
    first = document["outcomes"][0]
    assert (first["control"], first["path"]) == (EAGER.name, "attention.backend")
    assert (first["fault"]["status"], first["healthy"]["status"]) == ("fallback", "active")
    assert EAGER.name in captured.err


BY_NAME = {path.name: path for path in PATHS}
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="expects the errors of a machine without a GPU")


def test_a_path_that_is_accepted_but_does_not_run_fails_the_command(monkeypatch, capsys):
    """Such a path exits with 4 and is named with the reason; a refused path does not fail the command."""
    claimed = dataclasses.replace(BY_NAME["NF4"], name="claimed", make=lambda device: build(quant="fp4"))
    refused = dataclasses.replace(BY_NAME["SDPA math"], name="refused", make=lambda device: build(attention="none"))
    monkeypatch.setattr(probe, "PATHS", (BY_NAME["SDPA math"], claimed, refused))
    assert main(["--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [path["status"] for path in document["paths"]] == ["ran", "claimed", "unavailable"]
    assert document["failed"] == ["claimed"]
    assert "fp4" in document["paths"][1]["reason"]
    assert document["paths"][2]["reason"].startswith("ValueError")
    monkeypatch.setattr(probe, "PATHS", (BY_NAME["SDPA math"], refused))
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "cannot run" in captured.out
    assert captured.out.rstrip().endswith("1 of 2 paths ran")
    assert captured.err.splitlines() == ["kernels_check probe: SDPA math", "kernels_check probe: refused"]


@pytest.mark.parametrize(
    ("name", "evidence"),
    [("SDPA math", "math"), ("FP4", "fp4"), ("int8", "8"), ("fused optimizer", "aten::_fused_adamw_")],
)  # fmt: skip
def test_a_real_path_runs(name, evidence):
    """The path runs on any device, shown by the operators or stored bytes that the check names."""
    found = try_path(BY_NAME[name], "cpu")
    assert found.status == "ran", found
    assert evidence in found.reason


@ON_CPU
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SDPA cuDNN", "No viable backend"),
        ("flash-attn 2 package", "FlashAttention2"),
        ("paged optimizer", "needs a GPU"),
        ("tf32", "needs a GPU"),
    ],
)
def test_paths_that_a_cpu_cannot_run_are_explained(name, words):
    """The reason is the message of the library that refuses the path, if there is one."""
    found = try_path(BY_NAME[name], "cpu")
    assert found.status == "unavailable"
    assert words in found.reason


@pytest.mark.selftest
def test_the_probe_compiles_into_its_own_cache(monkeypatch, tmp_path):
    """The shared cache gets no library that an interruption could leave half written, and none is read from it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(probe, "PATHS", (BY_NAME["compile"],))
    torch.compiler.reset()
    assert main(["probe", "--json"]) == 0
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
