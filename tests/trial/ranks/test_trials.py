"""Real trials of two ranks over gloo: they train what one rank trains, and each sabotage is found by its words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorameter.records import codec
from lorameter.records.metrics import samples_of
from lorameter.records.record import TrialRecord
from lorameter.run.feasibility import SHARDS_INTEGERS, shards_4bit

SCRIPT = Path(__file__).with_name("scenarios.py")
SHARDED_4BIT = ("fsdp2, qlora", "fsdp2, qlora, repaired")
HEALTHY = ("ddp, lora", "fsdp2, lora")
QUANTISED = ("ddp, qlora, accumulating", *SHARDED_4BIT)
STORED = ("fsdp2, qlora in bfloat16", "fsdp2, qlora in float32")
SICK = (
    "same rows", "other data", "unsynchronised", "summed", "summed, sharded", "asleep", "unsharded", "in eval mode",
    "in eval mode, repaired", "dies", "hangs", "out of memory", "alone in vain", "dropout", "exchanged no longer",
    "update left out", "update left out, sharded", "never steps", "other scales", "other clocks",
)  # fmt: skip


def run_scenarios(names) -> dict[str, tuple[TrialRecord, list[str]]]:
    """The record of each scenario, and who of its processes was left; all are forked from one process."""
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
def healthy():
    """Runs that nothing is wrong with, in 16 bits or more."""
    return run_scenarios(HEALTHY)


@pytest.fixture(scope="module")
def quantised():
    """Runs in 4 bits that nothing is wrong with; without those that this torch cannot make."""
    return run_scenarios([name for name in QUANTISED if name not in SHARDED_4BIT or shards_4bit(torch.__version__)])


@pytest.fixture(scope="module")
def stored():
    """Runs whose 4-bit weights are kept in other words than bytes."""
    needs_sharded_4bit()
    return run_scenarios(STORED)


@pytest.fixture(scope="module")
def sick():
    """Runs with which something is wrong."""
    return run_scenarios(SICK)


def needs_sharded_4bit():
    if not shards_4bit(torch.__version__):
        pytest.skip(f"FSDP2 shards 4-bit weights from torch {SHARDS_INTEGERS} on")


def check_of(record, path):
    return next(check for check in record.checks if check["path"] == path)


@pytest.mark.parametrize("name", HEALTHY)
def test_two_ranks_train_what_one_rank_trains(healthy, name):
    """Losses of the same global batches are those of one rank within 1e-4 in float32, from the first step to the last,
    and every check of the ranks holds."""
    check_whole(name, healthy[name][0])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.selftest
def test_two_ranks_train_in_four_bits_what_one_rank_trains(quantised, name):
    """As in more of them."""
    if name in SHARDED_4BIT:
        needs_sharded_4bit()
    check_whole(name, quantised[name][0])


def check_whole(name, record):
    """Every check of ranks holds, of losses too."""
    assert record.status == "ok", record.failure
    losses = check_of(record, "ranks.losses")
    assert losses["status"] == "active", losses
    paths = {"ranks.data", "ranks.gradients", "ranks.adapters", "ranks.base", "ranks.steps", "ranks.steady"}
    paths |= {"ranks.losses", "ranks.trained"}
    paths |= {"ranks.sharded"} if name.startswith("fsdp2") else set()
    judged = {check["path"]: check for check in record.checks if check["path"].startswith("ranks.")}
    assert set(judged) == paths
    assert all(check["status"] == "active" for check in judged.values()), judged


def test_a_step_takes_as_long_as_its_slowest_rank(healthy):
    """The time of each step is the largest of those that the ranks took, all of which are there; tokens are of all."""
    record, _ = healthy["ddp, lora"]
    each = zip(record.samples["rank0_step_time_s"], record.samples["rank1_step_time_s"], strict=True)
    assert record.samples["step_time_s"] == tuple(map(max, each))
    assert record.samples["turn_tokens"] == (2 * 4 * 32.0, 2 * 4 * 32.0)
    assert record.values["ranks"] == 2.0


def test_scaling_is_measured_against_one_rank_in_the_same_turns(healthy):
    """A sample of scaling efficiency for each timed step, and what a profiled step spends on exchanges."""
    record, _ = healthy["ddp, lora"]
    ratios = zip(record.samples["one_rank_step_time_s"], record.samples["step_time_s"], strict=True)
    assert samples_of(record, "scaling_efficiency") == tuple(one / (2 * both) for one, both in ratios)
    assert 0 < record.values["communication_share"] < 1
    assert 0 <= record.values["communication_overlap"] <= 1
    assert record.values["rank_imbalance"] >= 1


def test_memory_is_that_of_the_rank_that_takes_most_and_of_each(healthy):
    """FSDP2 halves the base's bytes on each rank, and every rank's peak is there."""
    whole, halved = (healthy[name][0].memory for name in ("ddp, lora", "fsdp2, lora"))
    assert halved["base_weight_bytes"] <= 0.51 * whole["base_weight_bytes"]
    peaks = [whole[f"rank{rank}_host_peak_train_bytes"] for rank in range(2)]
    assert whole["host_peak_train_bytes"] == max(peaks)


@pytest.mark.selftest
def test_four_bits_are_halved_as_well(quantised):
    """A rank holds half of the packed bytes."""
    needs_sharded_4bit()
    whole, halved = (quantised[name][0].memory for name in ("ddp, qlora, accumulating", "fsdp2, qlora"))
    assert halved["base_weight_bytes"] < 0.51 * whole["base_weight_bytes"]


@pytest.mark.parametrize("name", STORED)
@pytest.mark.selftest
def test_the_type_that_four_bits_are_stored_in_is_nothing_to_the_ranks(stored, name):
    """Every check holds: losses are those of one rank, and each rank holds its part, of half a byte for a weight."""
    record, _ = stored[name]
    assert record.status == "ok", record.failure
    judged = {check["path"]: check for check in record.checks if check["path"].startswith("ranks.")}
    assert {"ranks.sharded", "ranks.steady", "ranks.losses"} <= set(judged)
    assert all(check["status"] == "active" for check in judged.values()), judged


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("same rows", "ranks.data", "ranks 0 and 1 train on the same data: 2 of their 2 sequences"),
        ("other data", "ranks.data", "rank 1 trains on other data than rank 0"),
        ("unsynchronised", "ranks.gradients", "keep each rank's own gradient, which was not exchanged"),
        ("unsynchronised", "ranks.adapters", "after the step rank 1 has another adapter than rank 0"),
        ("summed", "ranks.gradients", "divided by 1 and not by their number, 2"),
        ("summed, sharded", "ranks.gradients", "divided by 1 and not by their number, 2"),
        ("unsharded", "ranks.sharded", "lie whole on every rank"),
        ("exchanged no longer", "ranks.trained", "rank 1 has another adapter than rank 0"),
        ("update left out", "ranks.trained", "rank 1 has another adapter than rank 0"),
        ("update left out, sharded", "ranks.trained", "the optimizer of rank 1 has made"),
        ("never steps", "ranks.steps", "ranks have not made the same number of updates in the watched steps"),
        ("other scales", "ranks.base", "the base of rank 1 is another than that of rank 0"),
    ],
)
@pytest.mark.selftest
def test_a_sabotage_is_found_by_its_words(sick, name, path, words):
    """The trial is invalid, and the check says what is wrong and of which rank."""
    record, left = sick[name]
    assert record.status == "invalid"
    assert words in check_of(record, path)["reason"]
    assert words in record.failure.message
    assert left == []


@pytest.mark.selftest
def test_dropout_is_no_reason_to_compare_nothing(sick):
    """Losses are not those of one rank then, but the ranks still train one adapter, up to the last step."""
    record, _ = sick["dropout"]
    assert record.status == "ok", record.failure
    assert check_of(record, "ranks.losses")["status"] == "not_applicable"
    assert check_of(record, "ranks.trained")["status"] == "active"


@pytest.mark.selftest
def test_steps_for_energy_end_together_whatever_the_clocks_of_ranks_say(sick):
    """Else one rank would wait for a step that another does not take."""
    record, left = sick["other clocks"]
    assert record.status == "ok", record.failure
    assert record.values["energy_steps"] >= 1
    assert len(left) == 3


@pytest.mark.selftest
def test_nf4_that_fsdp2_gathers_wrongly_is_refused_with_the_reason_and_the_repair(sick):
    """In eval mode on a CPU with AVX512_BF16 the losses of one batch move although nothing is updated; the repair that
    is named keeps them."""
    from bitsandbytes.nn.modules import has_avx512bf16

    needs_sharded_4bit()
    if not has_avx512bf16():
        pytest.skip("4-bit weights are not rearranged on this CPU, so there is nothing to find")
    record, _ = sick["in eval mode"]
    check = check_of(record, "ranks.steady")
    assert record.status == "invalid"
    assert check["status"] == "fallback"
    assert "silently wrong from the second forward on" in check["reason"]
    assert "fix_4bit_weight_quant_state_from_module" in check["reason"]
    assert 'repair = "quant_state"' in check["reason"]
    assert check_of(sick["in eval mode, repaired"][0], "ranks.steady")["status"] == "active"


@pytest.mark.selftest
def test_a_rank_that_the_others_wait_for_is_named(sick):
    """Its own time in a profiled step is long and theirs is short, whatever the step takes for all."""
    record, _ = sick["asleep"]
    notice = next(notice for notice in record.notices if notice.code == "ranks-imbalanced")
    assert notice.message.startswith("rank 1 takes ")
    assert "they wait for it" in notice.message
    assert record.values["rank1_own_step_time_s"] > 2 > record.values["rank0_own_step_time_s"]


@pytest.mark.parametrize(
    ("name", "status", "kind", "words"),
    [
        ("dies", "crashed", "RankDied", "rank 1 of 2 ended with signal 9 (SIGKILL) during turn; the others were ended"),
        ("hangs", "timeout", "Silent", "rank 1 of 2 hangs in turn: rank 0 of 2 waited for it in vain"),
        ("out of memory", "oom", "MemoryError", "rank 1 of 2: no more of it"),
    ],
)
@pytest.mark.selftest
def test_a_rank_that_is_lost_is_a_row_and_its_fellows_are_ended(sick, name, status, kind, words):
    """The record says which rank it was, and none of the others is left."""
    record, left = sick[name]
    assert (record.status, record.failure.kind) == (status, kind)
    assert words in record.failure.message
    assert left == []


@pytest.mark.selftest
def test_a_trial_goes_on_without_one_rank_alone(sick):
    """Where the whole model does not fit one device there is no efficiency, and a notice."""
    record, _ = sick["alone in vain"]
    assert record.status == "ok"
    assert [notice.code for notice in record.notices] == ["one-rank-failed"]
    assert samples_of(record, "scaling_efficiency") == ()
    assert len(record.samples["step_time_s"]) == 2
