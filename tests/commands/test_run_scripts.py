"""Tests of `lorameter run ENGINE --command`: accepted and refused arguments, and a whole run of two scripts."""

from __future__ import annotations

import json
import sys

import pytest

COMMAND = "python scripted.py {slow|plain}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "--command", "python scripted.py plain"], "nothing differs"),
        (["compile", "--command", "python scripted.py {"], "a brace without its partner"),
        (["compile", "--command", "python scripted.py {}"], "an empty brace"),
        (["training-step", "--command", COMMAND], "it claims nothing of an engine"),
        (["--command", COMMAND], "no study named"),
        (["compile", "--command", COMMAND, "--model", "tiny-llama"], "model = 'tiny-llama'"),
        (["compile", "--command", COMMAND, "--variant", "eager"], "--variant: both are needed"),
        (["compile", "--command", COMMAND, "--profile", "cpu"], "--profile cpu: a script has none"),
        (["compile", "--command", COMMAND, "--phase", "cold"], "training is measured"),
        (
            ["compile", "--command", COMMAND, "--steps", "3"],
            "2 steps are timed in a turn. Use a multiple of 2, 2 or more.",
        ),
        (["compile", "--command", "python other.py {--flag}"], "no file 'other.py'"),
        (["compile", "--command", COMMAND, "--cwd", "missing"], "no folder"),
        (["compile", "--command", COMMAND, "--cwd", "x" * 260], "no folder"),
        (["compile", "--command", "python " + "x" * 260 + " {--flag}"], "no file"),
        (["compile", "--steps", "4"], "--steps: it belongs to --command"),
        (["compile", "--cwd", "."], "--cwd: it belongs to --command"),
        (["liger-kernel", "--command", COMMAND], "Liger Kernel runs on a GPU only"),
        (["flash-attention"], "FlashAttention runs on a GPU only"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_started(scripted, words, said, monkeypatch):
    """The command exits with 2, the fault and the remedy, on a machine without a GPU."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    code, out, err = scripted("run", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_an_engine_of_the_workload_has_no_sides(scripted):
    """An A/B measures one variant on one workload on two sides, which cannot show such an engine."""
    for words in (("ab", "packing", "--base", sys.executable, "--candidate", sys.executable), ("calibrate", "packing")):
        code, _, err = scripted(*words)
        assert (code, "Measure it with `lorameter run packing`" in err) == (2, True)


def test_the_plan_of_a_gpu_study_is_shown_without_a_gpu(scripted, monkeypatch):
    """Its time and memory are unknown on this machine."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    code, out, _ = scripted("run", "liger-kernel", "--command", COMMAND, "--dry-run")
    assert code == 0
    for words in ("plain-control", "needs-gpu", "time    unknown (it cannot be measured on this machine)"):
        assert words in out
    code, out, _ = scripted("run", "flash-attention", "--dry-run", "--json")
    assert (code, json.loads(out)["time_s"], json.loads(out)["memory_bytes"]) == (0, None, None)


def test_a_claim_about_two_scripts_is_not_judged_without_proof(scripted, tmp_path):
    """Two commands run in lockstep; a ratio is measured, but no claim is judged without proof that the engine ran."""
    words = ("--replicates", "1", "--steps", "4", "--interleave", "lockstep", "--allow-disturbed", "--json")
    code, out, _ = scripted("run", "compile", "--command", COMMAND, *words)
    run = json.loads(out)["run"]
    assert (code, json.loads(out)["trials"]) == (0, {"ok": 3})
    manifest = json.loads((tmp_path / "runs" / run / "manifest.json").read_text())
    assert [one["command"] for one in manifest["study"]["variants"]] == [
        "python scripted.py slow", "python scripted.py plain",
    ]  # fmt: skip
    assert manifest["interleaving"] == "lockstep"
    code, out, _ = scripted("claims", run, "--json")
    found = json.loads(out)
    assert (code, {one["verdict"] for one in found["claims"]}) == (0, {"not judged"})
    assert found["engine"]["commands"] == {"eager": "python scripted.py slow", "compiled": "python scripted.py plain"}
    (shown,) = found["engine"]["proof"]
    assert (shown["path"], shown["found"]) == ("compile", "unknown")
    code, out, _ = scripted("report", run)
    assert code == 0
    assert "whether torch.compile ran is unknown" in " ".join(out.replace("│", " ").split())
    code, out, err = scripted("run", "--resume", run, "--steps", "8")
    assert (code, "--steps would change the study" in err) == (2, True)
