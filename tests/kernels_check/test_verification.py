"""Tests of verify() end to end: exactly the requirements that hold are active."""

import os
import subprocess
import sys

import pytest
import torch

import kernels_check
from kernels_check.judges.paths import PATHS

COMMON = {
    "attention.backend": "flash",
    "attention.mask": "causal",
    "base.frozen": True,
    "peft.attached": True,
    "peft.learning": True,
    "peft.dtype": "float32",
    "peft.dropout": 0.05,
    "optimizer.class": "torch.optim.AdamW",
    "optimizer.fused": True,
    "optimizer.paged_share": 0.0,
    "checkpointing": False,
    "compile": False,
    "mode": "train",
} | ({} if torch.cuda.is_available() else {"tf32": False})  # a CPU step does not show it on a machine with a GPU
STORED = {
    "nf4": {
        **{"attention.dtype": "bfloat16", "base.bits": 4, "base.quant_type": "nf4", "base.double_quant": True},
        **{"base.compute_dtype": "bfloat16", "base.gemm_path": "dequantize"},
    },
    "float32": {
        **{"attention.dtype": "float32", "base.bits": 32, "base.quant_type": "none", "base.double_quant": False},
        "base.compute_dtype": "float32",
    },
}


@pytest.mark.parametrize("base", STORED)
def test_a_sound_configuration_is_active_throughout(training, base):
    """Every requirement of a correct run is met, with a reason."""
    run = training(
        quant="nf4" if base == "nf4" else None,
        dtype="float32" if base == "float32" else "bfloat16",
        targets="all-linear",
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    )
    requirements = {**COMMON, **STORED[base]}
    checks = run.verify(requirements)
    asked = [check for check in checks if check.required is not None]
    assert [(check.path, check.reason) for check in asked if not check.met] == []
    assert {check.path for check in asked} == set(requirements)
    assert all(check.reason for check in checks)


def test_paths_without_a_requirement_are_reported(training):
    """Without requirements all paths are reported in order, except those on request, and none is a failure."""
    run = training()
    checks = run.verify({})
    assert [check.path for check in checks] == [path for path, judged in PATHS.items() if not judged.on_request]
    assert {check.required for check in checks} == {None}
    assert {check.status for check in checks} == {"active", "not_applicable"}


def test_a_model_without_adapter_is_absent_not_active():
    """Without an adapter no check of an adapter or its base passes."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    requirements = {"peft.attached": True, "peft.learning": True, "peft.dropout": 0.1, "base.bits": 4}
    checks = {check.path: check for check in kernels_check.verify(model, step, requirements)}
    assert {checks[path].status for path in requirements} == {"absent"}
    assert checks["attention.backend"].status == "unknown"


def test_importing_the_package_loads_no_torch():
    """`import kernels_check` and its requirement table are cheap and import nothing of lorameter."""
    code = (
        "import sys, kernels_check; kernels_check.REQUIREMENTS; kernels_check.classify('x');"
        "print([m for m in ('torch', 'numpy', 'lorameter') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_profile_writes_nothing_to_stderr(training, capfd, monkeypatch):
    """Kineto's messages are silenced, and its environment variable is restored."""
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    run = training()
    capfd.readouterr()
    run.verify({})
    assert "USDT" not in capfd.readouterr().err
    assert "KINETO_LOG_LEVEL" not in os.environ
