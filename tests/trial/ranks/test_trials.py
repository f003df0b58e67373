"""Tests of real trials of two ranks over gloo: they train what one rank trains, and each injected fault is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorameter.measurements.metrics import get_samples
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.studies.quantization import BUILT_IN

pytestmark = pytest.mark.selftest  # tests/run/workers/test_ranks.py measures a healthy training by two ranks
SCRIPT = Path(__file__).with_name("scenarios.py")
HEALTHY = ("fsdp2, lora", "ddp, qlora, accumulating", "fsdp2, qlora", "fsdp2, qlora, repaired")
SABOTAGED = (
    "in eval mode", "in eval mode, repaired", "dies", "hangs", "out of memory", "one rank fails", "dropout",
    "update left out",
)  # fmt: skip


def run_scenarios(*names) -> dict[str, tuple[TrialRecord, list[str]]]:
    """Return the record of each scenario and the names of its processes that are still running."""
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *names], capture_output=True, text=True, env=environment, check=True, timeout=880
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {one["name"]: (codec.from_json(TrialRecord, one["record"], "record"), one["left"]) for one in lines}


@pytest.fixture(scope="module")
def ddp():
    """The record of a healthy run under DistributedDataParallel."""
    return run_scenarios("ddp, lora")["ddp, lora"][0]


@pytest.fixture(scope="module")
def healthy():
    """The records of the other healthy runs, except those that this torch version cannot shard."""
    names = [name for name in HEALTHY if "fsdp2, qlora" not in name or BUILT_IN["nf4"].is_sharded_by(torch.__version__)]
    return {name: record for name, (record, _) in run_scenarios(*names).items()}


@pytest.fixture(scope="module")
def sabotaged():
    """The records of the runs with an injected fault, and their remaining processes."""
    return run_scenarios(*SABOTAGED)


def check_of(record, path):
    return next(check for check in record.checks if check["path"] == path)


def assert_ranks_agree(record, *more):
    """Assert that every check of ranks is active, including the comparison with the losses of one rank."""
    assert record.status == "ok", record.failure
    names = ("data", "gradients", "adapters", "base", "steps", "steady", "losses", "trained", *more)
    judged = {check["path"]: check for check in record.checks if check["path"].startswith("ranks.")}
    assert set(judged) == {f"ranks.{name}" for name in names}
    assert all(check["status"] == "active" for check in judged.values()), judged


def test_two_ranks_train_the_same_as_one_rank(ddp):
    """Checks are active, a step takes as long as its slowest rank, tokens and peaks are of all ranks, and scaling is
    measured against one rank in the same turns."""
    assert_ranks_agree(ddp)
    each = zip(ddp.samples["rank0_step_time_s"], ddp.samples["rank1_step_time_s"], strict=True)
    assert ddp.samples["step_time_s"] == tuple(map(max, each))
    assert ddp.samples["turn_tokens"] == (2 * 4 * 32.0, 2 * 4 * 32.0)
    assert ddp.values["ranks"] == 2.0
    ratios = zip(ddp.samples["one_rank_step_time_s"], ddp.samples["step_time_s"], strict=True)
    assert get_samples(ddp, "scaling_efficiency") == tuple(alone / (2 * together) for alone, together in ratios)
    assert 0 < ddp.values["communication_share"] < 1
    assert 0 <= ddp.values["communication_overlap"] <= 1
    assert ddp.values["rank_imbalance"] >= 1
    peaks = [ddp.memory[f"rank{rank}_host_peak_train_bytes"] for rank in range(2)]
    assert ddp.memory["host_peak_train_bytes"] == max(peaks)


def test_sharded_and_quantised_bases_train_the_same_as_one_rank(ddp, healthy):
    """FSDP2 halves the bytes of the base on each rank, also in 4 bits."""
    for name, record in healthy.items():
        assert_ranks_agree(record, *(["sharded"] if name.startswith("fsdp2") else []))
    sizes = {name: record.memory["base_weight_bytes"] for name, record in healthy.items()}
    assert sizes["fsdp2, lora"] <= 0.51 * ddp.memory["base_weight_bytes"]
    if "fsdp2, qlora" in sizes:
        assert sizes["fsdp2, qlora"] <= 0.51 * sizes["ddp, qlora, accumulating"]


def test_an_adapter_that_differs_at_the_end_makes_the_trial_invalid(sabotaged):
    """One rank skips an update after the check of the first steps; the trial is invalid, and no process is left."""
    record, left = sabotaged["update left out"]
    words = "rank 1 has another adapter than rank 0"
    assert record.status == "invalid"
    assert words in check_of(record, "ranks.trained")["reason"]
    assert words in record.failure.message
    assert left == []


def test_ranks_with_dropout_must_still_train_one_adapter(sabotaged):
    """With dropout the losses differ from those of one rank, because each rank draws its own mask, but the adapters
    agree."""
    record, _ = sabotaged["dropout"]
    assert record.status == "ok", record.failure
    assert check_of(record, "ranks.losses")["status"] == "not_applicable"
    assert check_of(record, "ranks.trained")["status"] == "active"


def test_nf4_that_fsdp2_gathers_wrongly_is_refused_with_the_repair(sabotaged):
    """In eval mode on a CPU with AVX512_BF16 the losses of one batch change without an update; the repair in the
    message keeps them."""
    from bitsandbytes.nn.modules import has_avx512bf16

    if not BUILT_IN["nf4"].is_sharded_by(torch.__version__):
        pytest.skip(f"FSDP2 shards 4-bit weights from torch {BUILT_IN['nf4'].fsdp2_since} on")
    if not has_avx512bf16():
        pytest.skip("4-bit weights are not rearranged on this CPU, so there is no fault")
    record, _ = sabotaged["in eval mode"]
    check = check_of(record, "ranks.steady")
    assert (record.status, check["status"]) == ("invalid", "fallback")
    assert "silently wrong from the second forward on" in check["reason"]
    assert 'repair = "quant_state"' in check["reason"]
    assert check_of(sabotaged["in eval mode, repaired"][0], "ranks.steady")["status"] == "active"


@pytest.mark.parametrize(
    ("name", "status", "kind", "words"),
    [
        ("dies", "crashed", "RankDied", "rank 1 of 2 ended with signal 9 (SIGKILL) during turn: killed from outside"),
        ("hangs", "timeout", "Silent", "rank 1 of 2 hangs in turn: rank 0 of 2 waited for it in vain"),
        ("out of memory", "oom", "MemoryError", "rank 1 of 2: no more of it"),
    ],
)
def test_a_lost_rank_is_named_and_the_others_are_ended(sabotaged, name, status, kind, words):
    """The record names the lost rank, and no process is left."""
    record, left = sabotaged[name]
    assert (record.status, record.failure.kind) == (status, kind)
    assert words in record.failure.message
    assert left == []


def test_a_trial_continues_where_training_on_one_rank_fails(sabotaged):
    """The trial has no scaling efficiency but a notice."""
    record, _ = sabotaged["one rank fails"]
    assert record.status == "ok"
    assert [notice.code for notice in record.notices] == ["one-rank-failed"]
    assert get_samples(record, "scaling_efficiency") == ()
    assert len(record.samples["step_time_s"]) == 2
