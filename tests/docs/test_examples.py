"""The example scripts, unmodified, wrapped as a user would."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.models.catalogue import cache_dir
from harness.records import store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wrap(tmp_path):
    """A function that wraps an example in a process of its own, and returns what was done and the run."""

    def run(name, *words, require=()):
        command = [sys.executable, "-m", "harness.cli", "wrap", "--no-report", "--runs-dir", str(tmp_path / "runs")]
        command += ["--require", *require] if require else []
        command += ["--", sys.executable, str(ROOT / "docs" / "examples" / name), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        (path,) = store.list_runs(tmp_path / "runs")
        return done, store.read_run(str(path), path.parent)

    return run


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "tokens", "least"),
    [("trainer_lora.py", 256, 8), ("accelerate_loop.py", 256, 5), ("torch_loop.py", 128, 20)],
)
def test_an_example_becomes_a_run(wrap, name, tokens, least):
    """A Trainer with accumulation, evaluation and saving, a loop of Accelerate, and a plain one."""
    done, run = wrap(name)
    assert done.returncode == 0, done.stderr
    (record,) = run.records
    assert record.status == "ok", record.failure
    samples = record.samples
    assert len(samples["step_time_s"]) >= least
    every = zip(samples["turn_real_tokens"], samples["turn_padded_tokens"], strict=True)
    assert {real + padding for real, padding in every} == {tokens}
    assert len(samples["train_loss"]) == len(samples["backward_time_s"]) == len(samples["step_time_s"])
    assert ("host_peak_evaluate_bytes" in record.memory) is (name == "trainer_lora.py")
    assert record.checks


@pytest.mark.network_model
def test_qlora_of_a_real_model_by_trl(wrap, dolly, tmp_path):
    """Its base is held in 4 bits, which is required and seen."""
    model = cache_dir() / "models" / "smollm2-135m"
    if not model.is_dir() or importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl, and the model in the cache: lorameter model fetch smollm2-135m")
    done, run = wrap(
        "sft_qlora.py", "--model", str(model), "--data", str(dolly), "--steps", "20", require=["base.bits=4"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = run.records
    assert record.status == "ok", record.failure
    assert record.values["trainable_parameters"] < record.values["total_parameters"] / 10
