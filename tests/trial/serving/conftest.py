"""A trial that has trained and is ready for its first request."""

from __future__ import annotations

import pytest
import torch

from lorameter.records.record import TrialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

PROTOCOL = Protocol(warmup_steps_min=1, warmup_steps_max=1, turns=2, steps_per_turn=1, generate_warmup=0)


@pytest.fixture
def begin_requests(tmp_path):
    """A function that runs a trial up to its first request and returns the trial and its record."""
    torch.set_num_threads(1)

    def make(workload, variant):
        request = TrialRequest(
            trial="r0-plain", variant=variant, role="variant", replicate=0, seed=1, workload=workload,
            protocol=PROTOCOL, interleaving="replicates", measures=("steps", "requests", "peaks"),
            device="cpu", threads=1, tokens_path=prepare(workload, tmp_path).path, scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        running = Trial(request, SharedBase())
        record = TrialRecord(
            trial="r0-plain", status="ok", name="plain", variant=variant.id, role="variant", replicate=0, position=0,
            interleaving="replicates", seed=1, started_unix_s=0.0, wall_time_s=0.0,
        )  # fmt: skip
        for command in ("build", "warm_up", "finish_training", "begin_generate"):
            record = record.merged(running.run(command))
        return running, record

    return make
