"""Tests of verify() end to end: exactly the requirements that hold are active.

Tests of the validation of requirements and of the rule that makes checks of findings.

Tests that each fault is found for the right reason and that the healthy control passes.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from negative_controls.catalogue import CONTROLS
from negative_controls.faults import Verifier
from torch.profiler import ProfilerActivity, profile

import kernels_check
from kernels_check.check import PathObservation
from kernels_check.judges.paths import PATHS, validate

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


def test_only_the_programs_own_profiles_write_to_stderr(training, capfd):
    """The profile of a check writes nothing, also after a profile of the program, which writes the same lines again
    after the check."""

    def count_lines(profiled):
        capfd.readouterr()
        profiled()
        return len(capfd.readouterr().err.splitlines())

    def own():
        with profile(activities=[ProfilerActivity.CPU]):
            torch.ones(2).add(1)

    run, before = training(), os.environ.get("KINETO_LOG_LEVEL")
    own()  # the first one of a process writes more
    alone = count_lines(own)
    assert (count_lines(lambda: run.verify({})), count_lines(own)) == (0, alone)
    assert os.environ.get("KINETO_LOG_LEVEL") == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention.backend", "fast"),
        ("attention.backend", True),
        ("attention.backend", np.array(["flash", "flash"])),
        ("attention.dtype", "torch.bfloat16"),
        ("base.bits", True),
        ("base.bits", 3),
        ("base.bits", 4.0),
        ("base.frozen", "yes"),
        ("base.frozen", 1),
        ("peft.dropout", 1.5),
        ("peft.dropout", False),
        ("optimizer.paged_share", "half"),
        ("optimizer.class", ""),
        ("optimizer.class", "AdamW"),
        ("mode", None),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(path, value):
    """The error names the path and the value."""
    with pytest.raises(ValueError, match=path) as caught:
        validate({path: value})
    assert repr(value) in str(caught.value)


def test_a_class_without_its_package_is_refused_with_the_qualified_name():
    """A bare AdamW is refused, since torch and bitsandbytes each have one; the qualified name is accepted."""
    with pytest.raises(ValueError, match=r"as in 'torch\.optim\.AdamW' or 'bitsandbytes\.optim\.AdamW'"):
        validate({"optimizer.class": "AdamW"})
    validate({"optimizer.class": "torch.optim.AdamW"})


def test_an_unknown_path_is_refused_with_the_known_ones():
    """A misspelt path is an error and not an empty requirement."""
    with pytest.raises(ValueError, match=r"attention\.backened.*attention\.backend"):
        validate({"attention.backened": "flash"})


@pytest.mark.parametrize(
    ("finding", "required", "status"),
    [
        (PathObservation(observed="flash", reason=""), "flash", "active"),
        (PathObservation(observed="math", reason=""), "flash", "fallback"),
        (PathObservation(observed=None, reason="", present=False), "flash", "absent"),
        (PathObservation(observed=False, reason="", present=False), False, "active"),
        (PathObservation(observed="math", reason=""), None, "active"),
        (PathObservation(observed=None, reason="", present=False), None, "not_applicable"),
        (PathObservation(observed=None, reason="", status="unknown"), None, "unknown"),
        (PathObservation(observed=None, reason="", status="unknown"), "flash", "unknown"),
        (PathObservation(observed=0.75, reason="", satisfies=True), 0.5, "active"),
    ],
)
def test_status_follows_from_observation_and_requirement(finding, required, status):
    """Only a satisfied requirement is active; a path without a requirement reports what was observed."""
    assert finding.against("attention.backend", required).status == status


HERE = tuple(control for control in CONTROLS if control.needs_cuda is None)
ON_CUDA = tuple(control for control in CONTROLS if control.needs_cuda is not None)
SHARED = Verifier(CONTROLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", HERE, ids=lambda control: control.name)
def test_a_fault_is_found_and_its_healthy_control_passes(control):
    """The fault is found with its reason; the healthy control passes."""
    assert SHARED.failures(control) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", ON_CUDA, ids=lambda control: control.name)
def test_a_fault_on_a_gpu_is_found_and_its_healthy_control_passes(control):
    """On a GPU the controls are judged by kernels; a CPU can judge some only by their inputs."""
    assert SHARED.failures(control) == []


def test_a_control_fails_without_its_fault():
    """A control fails if its faulty run is healthy, its reason lacks the words, or its healthy run fails."""
    sound = next(control for control in CONTROLS if control.name == "eager attention")
    passed = " ".join(SHARED.failures(dataclasses.replace(sound, fault=sound.healthy)))
    assert "the faulty run is active" in passed
    assert "its reason lacks 'forward: 2 eager" in passed
    assert "the healthy run is fallback" in " ".join(SHARED.failures(dataclasses.replace(sound, healthy=sound.fault)))
