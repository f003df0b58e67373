"""Tests that a training step split into phases equals a plain step."""

import torch

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.profiling.phases import BorderedStep
from lorameter.trial.step import TrainStep

WORKLOAD = Workload(
    sequence_length=32, batch_size=2, train_sequences=8, held_out_records=8, held_out_sequences=2, prompt_tokens=8
)
VARIANT = LoraVariant(name="v", r=4, lora_dropout=0.1, gradient_accumulation=2)


def test_a_bordered_step_has_the_losses_of_a_plain_one(tmp_path):
    """Losses are bit-equal, including dropout and accumulation."""
    torch.set_num_threads(1)
    request = TrialRequest(
        trial="t", variant=VARIANT, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=prepare(WORKLOAD, tmp_path).path, scratch=str(tmp_path), log_path="",
    )  # fmt: skip

    def losses(make):
        stream = TokenStream(request.tokens_path, WORKLOAD, VARIANT, "cpu")
        step = make(build(request, steps=8, shared=SharedBase()), stream)
        return [float(step()) for _ in range(2)]

    plain = losses(lambda trainee, stream: TrainStep(trainee, stream, VARIANT, "cpu"))
    assert losses(lambda trainee, stream: BorderedStep(trainee, stream, request)) == plain
