"""Tests of merging the values of the ranks of a trial into those of one trial.

Tests that ranks take different rows of each batch of one file.

Tests of the comparison of losses: several ranks agree with one rank, or the first differing step is named.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.ranks.trial import compare_losses, merge_values

FIRST = {
    "device_energy_train_j": 900.0, "energy_tokens": 300.0, "energy_steps": 10.0, "device_samples_train": 4.0,
    "device_throttled_samples_train": 0.0, "device_others_train": 0.0, "device_sm_clock_min_train_hz": 1.9e9,
    "device_sm_clock_max_train_hz": 1.9e9, "host_load_train": 1.0,
}  # fmt: skip
SECOND = FIRST | {
    "device_energy_train_j": 1100.0, "energy_tokens": 340.0, "device_throttled_samples_train": 4.0,
    "device_others_train": 1.0, "device_sm_clock_min_train_hz": 1.1e9, "host_load_train": 3.0,
}  # fmt: skip


def test_energy_and_its_tokens_are_summed():
    """Energy is left out if one rank has no counter; the number of steps is the same on each rank."""
    merged = merge_values([FIRST, SECOND])
    assert (merged["device_energy_train_j"], merged["energy_tokens"], merged["energy_steps"]) == (2000.0, 640.0, 10.0)
    without = {key: value for key, value in SECOND.items() if "energy_train_j" not in key}
    assert "device_energy_train_j" not in merge_values([FIRST, without])


def test_the_worst_gpu_counts():
    """The slowest GPU counts; the host is the same for all."""
    merged = merge_values([FIRST, SECOND])
    assert (merged["device_throttled_samples_train"], merged["device_samples_train"]) == (4.0, 4.0)
    assert merged["device_others_train"] == 1.0
    assert (merged["device_sm_clock_min_train_hz"], merged["device_sm_clock_max_train_hz"]) == (1.1e9, 1.9e9)
    assert merged["host_load_train"] == 1.0


WORKLOAD = Workload(
    sequence_length=32, batch_size=4, train_sequences=10, held_out_records=4, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3, layout="padded",
)  # fmt: skip


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The stream of a single rank, and the streams of two ranks."""
    path = prepare(WORKLOAD, tmp_path_factory.mktemp("tokens")).path
    variant = LoraVariant(name="plain", r=4)
    two = dataclasses.replace(WORKLOAD, ranks=2, strategy="ddp")
    return TokenStream(path, WORKLOAD, variant, "cpu"), [
        TokenStream(path, two, variant, "cpu", rank=rank, ranks=2) for rank in range(2)
    ]


def test_two_ranks_take_the_batches_of_one_and_their_shares_are_the_whole(streams):
    """Two ranks together take the batches of one, also across an epoch; shares are by labelled tokens, and the counts
    add up."""
    one, two = streams
    for _ in range(4):
        upcoming = two[0].upcoming(1)
        batch = one.take()
        taken = [stream.take_share() for stream in two]
        for key in batch:
            assert torch.equal(torch.cat([part[key] for part, _ in taken]), batch[key])
        assert torch.equal(upcoming, batch["input_ids"])
        labelled = [float((part["labels"][:, 1:] != -100).sum()) for part, _ in taken]
        assert [share for _, share in taken] == pytest.approx([count / sum(labelled) for count in labelled])
    assert one.real_tokens == sum(stream.real_tokens for stream in two)
    assert one.padded_tokens == sum(stream.padded_tokens for stream in two)


VARIANT = LoraVariant(name="plain", r=4, dtype="float32")
RIGHT = (4.93485, 4.89980, 4.85847, 4.80926)
WRONG = (4.93485, 4.93347, 4.90823, 4.87422)
"""Measured losses of NF4 under FSDP2: the first forward is right and all others are wrong."""


def test_equal_losses_pass():
    """Additional steps of either side are ignored."""
    check = compare_losses(RIGHT, (*RIGHT, 4.0), VARIANT, 2)
    assert (check.status, check.required) == ("active", True)
    assert "losses of 4 steps" in check.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_that_differs_is_named(dtype):
    """The reason has both losses, in either precision."""
    check = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, dtype=dtype), 2)
    assert check.status == "fallback"
    assert "step 2 has a loss of 4.93347 by 2 ranks and of 4.89980 by one" in check.reason


def test_losses_that_cannot_be_compared_do_not_pass():
    """Too few steps are unknown, NaN is a difference, and with dropout the comparison does not apply."""
    assert compare_losses(RIGHT[:2], RIGHT[:2], VARIANT, 2).status == "unknown"
    assert compare_losses((*RIGHT, float("nan")), (*RIGHT, 4.8), VARIANT, 2).status == "fallback"
    dropped = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, lora_dropout=0.1), 2)
    assert (dropped.status, dropped.required) == ("not_applicable", None)
