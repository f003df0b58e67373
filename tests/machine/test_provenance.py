"""Tests of the provenance of a run, and of the part of it that must match between compared runs.

Tests of the commit and the dirty flag of a folder.
"""

from __future__ import annotations

import dataclasses
import subprocess

import pytest

from lorameter.machine.provenance import (
    collect,
    fingerprint,
    fingerprint_fields,
    git_state,
    power_limit_w,
    read_facts,
    run_git,
)
from lorameter.records import codec

CARD = {"power_limit_w": 500.4, "default_power_limit_w": 700.0}


@pytest.fixture
def on_gpu(small_study, machine):
    """A function that collects the provenance of a run on a GPU with these settings."""
    card = dataclasses.replace(machine, device="cuda", device_name="Card")
    known = dataclasses.replace(read_facts(machine), machine=card)

    def facts(settings):
        found = collect(small_study, dataclasses.replace(known, settings={"gpu": settings}), 1)
        del found["kernels"]  # these have tests of their own
        return found

    return facts


def test_the_settings_of_the_machine_are_part_of_a_run(small_study, machine):
    """Machine settings are recorded as values or reasons under one key; a CPU run reads no GPU, and the current load is
    not a setting."""
    settings = collect(small_study, read_facts(machine), 1)["settings"]
    assert settings["system"].keys() == {
        "cpus", "quota_cpus", "governor", "turbo", "huge_pages", "numa_nodes", "memory_bytes", "swap_bytes",
        "container",
    }  # fmt: skip
    assert settings["gpu"] == "not available: trials do not run on a GPU"
    assert all(settings["host_counters_missing"].values())
    assert codec.to_json(settings) == settings


def test_a_variants_own_workload_is_part_of_the_fingerprint(small_study, machine):
    """The fingerprint holds a variant's own workload under the variant's name, next to the study's workload."""
    own = dataclasses.replace(small_study.workload, batch_size=4)
    facts = read_facts(machine)
    alone, both = (collect(small_study, facts, 1, own_workloads=given) for given in (None, {"b": own}))
    assert both["workload"] == alone["workload"] | {"own": {"b": codec.to_json(own)}}
    assert "own" not in alone["workload"]
    assert fingerprint(both) != fingerprint(alone)


def test_the_power_limit_is_part_of_the_fingerprint_of_a_gpu_run(on_gpu):
    """The power limit is recorded in whole watts; an unknown limit is left out."""
    limited, default = on_gpu(CARD), on_gpu(CARD | {"power_limit_w": 700.0})
    assert fingerprint_fields(limited)["power_limit_w"] == 500
    assert fingerprint(limited) == fingerprint(on_gpu(CARD | {"power_limit_w": 499.8}))
    assert fingerprint(limited) != fingerprint(default)
    for unknown in ("not available: no driver", CARD | {"power_limit_w": "not available: not permitted"}):
        facts = on_gpu(unknown)
        assert power_limit_w(facts) is None
        assert fingerprint(facts) == fingerprint(limited, without=("power_limit_w",))


PACKAGES = {"nvidia-cudnn-cu13": "9.20.0.48", "nvidia-cublas": "13.1.0.3", "nvidia-cudnn-cu12": "9.10.2.21"}
SWITCHES = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture
def steered(small_study, machine):
    """A function that collects the provenance of a run on a GPU with these packages and switches."""
    here = read_facts(machine)

    def facts(packages=PACKAGES, switches=SWITCHES, *, device="cuda", cuda="13.0", **more):
        there = dataclasses.replace(machine, device=device, cuda=cuda)
        known = dataclasses.replace(here, machine=there, packages=packages, switches=switches, **more)
        return collect(small_study, known, 1)

    return facts


def test_libraries_and_switches_of_kernels_are_part_of_the_fingerprint(steered):
    """The fingerprint holds the cuDNN and cuBLAS packages of torch's CUDA version and the environment variables of
    kernels."""
    facts = steered()
    assert facts["kernels"] == {"cudnn": "9.20.0.48", "cublas": "13.1.0.3", "switches": SWITCHES}
    assert fingerprint_fields(facts)["kernels"] == facts["kernels"]
    others = [
        steered(PACKAGES | {"nvidia-cudnn-cu13": "9.21"}),
        steered(PACKAGES | {"nvidia-cublas": "13.2"}),
        steered(switches={}),
        steered(switches=SWITCHES | {"NVIDIA_TF32_OVERRIDE": "0"}),
        steered(switches=SWITCHES | {"PYTORCH_ALLOC_CONF": ""}),
    ]
    assert len({fingerprint(one) for one in (facts, *others)}) == 1 + len(others)
    assert fingerprint(steered(PACKAGES | {"nvidia-cudnn-cu12": "9.11"})) == fingerprint(facts)
    assert steered({}, cuda="12.8")["kernels"] == {"cudnn": None, "cublas": None, "switches": SWITCHES}
    assert steered(cuda="12.8")["kernels"]["cudnn"] == "9.10.2.21"
    assert "kernels" not in fingerprint_fields(facts, without=("kernels",))


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of one file."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README").write_text("one")
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "one")):
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)
    return folder


def test_a_change_makes_it_dirty_and_bytecode_does_not(repository):
    """A run that only compiled modules still belongs to the commit."""
    commit = run_git(repository, "rev-parse", "HEAD").stdout.strip()
    (repository / "__pycache__").mkdir()
    (repository / "__pycache__" / "a.pyc").write_text("")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "README").write_text("two")
    assert git_state(repository) == {"commit": commit, "dirty": True}


def test_variables_of_a_git_hook_are_ignored(repository, tmp_path, monkeypatch):
    """Git's hooks export GIT_DIR; the state is that of the given folder."""
    state = git_state(repository)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_state(repository) == state
