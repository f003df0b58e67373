"""A trial of Llama-2-7B on a real GPU, on either base: it comes to its end and runs all that it claims.

What the two cost is no test's affair: `make gpu` measures them and writes the report.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.records import store

ROOT = Path(__file__).parents[1]
MOST_S = 220
"""Of one base: both, with what pytest itself takes, end within a call of ten minutes."""
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(MOST_S + 15)]
STUDY = """
title = "one trial of each base"
[workload]
model = "random:llama2-7b"
sequence_length = 256
batch_size = 1
train_sequences = 8
held_out_records = 4
held_out_sequences = 1
prompt_tokens = 16
new_tokens = 4
[[variant]]
name = "one"
dtype = "bfloat16"
compute_dtype = "bfloat16"
target_modules = ["all-linear"]
gradient_checkpointing = true
optimizer = "adamw_fused"
quantization = "{quantization}"
double_quant = {double}
[protocol]
replicates = 1
warmup_steps_min = 1
warmup_steps_max = 1
turns = 2
steps_per_turn = 1
generate_warmup = 0
generate_requests = 1
peak_replicates = 1
merged = false
retries = 0
allow_disturbed = true
"""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_llama2_7b_trains_and_answers(tmp_path, quantization):
    """Random weights of the exact shape: every trial ok, every required path active, a peak that only a GPU has."""
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(quantization=quantization, double=str(quantization == "nf4").lower()))
    words = ["-m", "lorameter.cli", "run", str(study), "--phase=train", "--phase=generate", "--json"]
    measured = subprocess.run(
        [sys.executable, *words, "--runs-dir", str(tmp_path / "runs")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=MOST_S, check=False,
    )  # fmt: skip
    document = json.loads(measured.stdout)
    records = store.read_run(document["run"], tmp_path / "runs").records
    assert set(document["trials"]) == {"ok"}, [record.failure for record in records]
    assert {check["status"] for record in records for check in record.checks} <= {"active", "not_applicable"}
    assert any(record.memory.get("device_peak_allocated_train_bytes", 0) > 2**31 for record in records)
