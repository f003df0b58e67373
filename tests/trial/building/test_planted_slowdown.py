"""Tests that the injected slow-down is real work of known size and changes only the time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import WIDTH, SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.step import TrainStep

ROWS = 7
WORKLOAD = Workload(sequence_length=32, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1)
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", lora_dropout=0.1, learning_rate=3e-3)


def train(tokens, rows):
    """Return the losses of three steps with extra rows of work, the gradients of one more step, and the FLOPs of its
    forward and backward pass."""
    torch.set_num_threads(1)
    request = TrialRequest(
        trial="t", variant=VARIANT, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
        interleaving="lockstep", measures=("steps",), device="cpu", threads=1, tokens_path=tokens, scratch="",
        log_path="", slowdown_rows=rows,
    )  # fmt: skip
    trainee = build(request, steps=10, shared=SharedBase())
    stream = TokenStream(Path(tokens), WORKLOAD, VARIANT, "cpu")
    step = TrainStep(trainee, stream, VARIANT, "cpu")
    losses = [float(step()) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        step.loss(stream.take()).backward()
    return losses, [parameter.grad for parameter in trainee.parameters], counter.get_total_flops()


def test_each_adapted_layer_multiplies_once_more_and_nothing_else_changes(tmp_path):
    """Losses and gradients are bit-equal, including dropout."""
    tokens = prepare(WORKLOAD, tmp_path).path
    (losses, gradients, flops), (slowed, slowed_gradients, more) = train(tokens, 0), train(tokens, ROWS)
    assert more - flops == 4 * 7 * 2 * ROWS * WIDTH * WIDTH
    assert losses == slowed
    assert all(torch.equal(one, other) for one, other in zip(gradients, slowed_gradients, strict=True))
