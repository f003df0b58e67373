"""Tests that ranks take different rows of each batch of one file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare

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
