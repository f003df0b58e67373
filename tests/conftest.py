"""Shared fixtures: a described machine, a small study, and one real executor for the tests that need processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.protocol import Protocol
from harness.provenance import Machine
from harness.study import Study
from harness.variant import Variant
from harness.workload import Workload

pytest_plugins = ["pytester"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on two cores collapse under contention


def pytest_collection_modifyitems(items):
    """GPU tests say why they do not run here."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def machine() -> Machine:
    """A CPU machine with AVX512-BF16, as described, not as probed."""
    return Machine(
        device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
        cpus=2, memory_bytes=8 * 2**30, avx512_bf16=True, kernel="6.0", python="3.11.0",
    )  # fmt: skip


@pytest.fixture
def small_study() -> Study:
    """Two variants, two replicates, as little work as still is a trial."""
    return Study(
        name="small",
        title="small",
        workload=Workload(
            sequence_length=32, batch_size=2, train_sequences=16, held_out_records=4, held_out_sequences=2,
            prompt_tokens=8, new_tokens=4,
        ),
        protocol=Protocol(
            replicates=2, warmup_steps_min=1, warmup_steps_max=2, turns=2, steps_per_turn=2, generate_warmup=0,
            generate_requests=2, step_timeout_s=120,
        ),
        variants=(Variant(name="plain", r=4), Variant(name="nf4", r=4, quantization="nf4")),
        reference="plain",
    )  # fmt: skip


@pytest.fixture
def dolly() -> Path:
    """The real data set, where it is at hand: $LORAMETER_DOLLY, or in a folder `shared` beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "databricks-dolly-15k.jsonl.gz"
    path = Path(os.environ.get("LORAMETER_DOLLY", beside))
    if not path.is_file():
        pytest.skip("$LORAMETER_DOLLY does not name databricks-dolly-15k.jsonl.gz")
    return path
