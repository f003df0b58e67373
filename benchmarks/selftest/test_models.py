"""Real sizes: a 7B built in NF4 far below its 16-bit size, a pretrained model that learns from real records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.models import catalogue
from harness.records.store import read_run
from harness.records.units import format_bytes, format_duration, format_interval
from harness.run.executors.local import worker_environment
from harness.stats import estimate_trials

pytestmark = [pytest.mark.selftest, pytest.mark.timeout(3600)]
DOLLY = Path(os.environ.get("LORAMETER_DOLLY", "databricks-dolly-15k.jsonl.gz"))

BUILD_7B = """
import json
from harness.models import catalogue
from harness.machine.memory import MemoryGauge, host_bytes
from harness.trial.building.base_model import load_base
from harness.studies.variant import Variant
gauge = MemoryGauge("cpu")
before = host_bytes("VmRSS")
gauge.begin()
model = load_base(catalogue.resolve("random:llama2-7b"), Variant(quantization="nf4"), device="cpu", seed=0)
print(json.dumps({
    "parameters": model.num_parameters(),
    "before": before,
    "peak": gauge.peaks("load")["host_peak_load_bytes"],
    "footprint": model.get_memory_footprint(),
}))
"""


def test_a_7b_is_built_and_quantised_layer_by_layer(say):
    """`random:llama2-7b` in NF4: the host never holds the model in 16 bits; target below half of that size."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BUILD_7B], env=worker_environment(1), capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - begin
    sizes = json.loads(done.stdout.splitlines()[-1])
    half = 2 * sizes["parameters"]
    grown = sizes["peak"] - sizes["before"]
    say(
        f"random:llama2-7b in NF4, {sizes['parameters']:,} parameters, {format_duration(seconds)}: peak grew by "
        f"{format_bytes(grown)}, {grown / half:.0%} of the 16-bit size {format_bytes(half)}; "
        f"the model itself is {format_bytes(sizes['footprint'])}"
    )
    assert sizes["parameters"] == 6_738_415_616  # the published count of Llama-2-7B
    assert grown < half / 2


def test_a_real_model_learns_from_real_records(say, tmp_path):
    """The README's own command with SmolLM2-135M and dolly: held-out and train loss fall in every replicate."""
    try:
        catalogue.resolve("smollm2-135m")
    except UsageError as error:
        pytest.skip(str(error))
    if not DOLLY.is_file():
        pytest.skip("$LORAMETER_DOLLY does not name databricks-dolly-15k.jsonl.gz")
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-k", "train_step and qlora-nf4-r16", "-q"]
    command += [
        "--lorameter-model=smollm2-135m",
        f"--lorameter-data={DOLLY.resolve()}",
        f"--lorameter-runs-dir={tmp_path}",
    ]
    begin = time.monotonic()
    subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - begin
    (path,) = tmp_path.iterdir()
    records = read_run(str(path), tmp_path).records
    trained = [record for record in records if record.name == "qlora-nf4-r16"]
    assert len(trained) == 3
    losses = [
        [*record.samples["warmup_loss"], *record.samples["train_loss"], *record.samples["catch_up_loss"]]
        for record in trained
    ]
    quarter = len(losses[0]) // 4
    series = {
        "held-out loss after": [(record.values["held_out_loss"],) for record in trained],
        "train loss, first quarter": [loss[:quarter] for loss in losses],
        "train loss, last quarter": [loss[-quarter:] for loss in losses],
    }
    say(
        f"smollm2-135m, NF4 r 16, dolly, {len(losses[0])} steps of 2 × 128 tokens, {len(records)} trials in "
        f"{format_duration(seconds)}:"
    )
    (before,) = {value for record in trained if (value := record.values.get("held_out_loss_initial"))}
    say(f"  held-out loss before: {before:.4g}, which is the base's")
    for name, trials in series.items():
        estimate = estimate_trials(trials)
        say(f"  {name}: {format_interval(estimate.value, estimate.low, estimate.high, '1')}")
    for record, loss in zip(trained, losses, strict=True):
        assert record.values["held_out_loss"] < before
        assert sum(loss[-quarter:]) < sum(loss[:quarter])
