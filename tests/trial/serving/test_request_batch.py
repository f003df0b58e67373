"""A request of several prompts: what it answers, what its trial records, and what stays at one prompt."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorameter.records.metrics import samples_of
from lorameter.records.record import TrialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving.generate import generate
from lorameter.trial.trial import Trial

WORKLOAD = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=6, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3, open_ended_tokens=6, open_ended_prompt_tokens=400,
)  # fmt: skip
PROTOCOL = Protocol(warmup_steps_min=1, warmup_steps_max=1, turns=2, steps_per_turn=1, generate_warmup=0)
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))
SERVED = ("build", "warm_up", "finish_training", "begin_generate")


@pytest.fixture
def trial(tmp_path):
    """A function that makes a trial whose requests have so many prompts, up to its first request."""
    torch.set_num_threads(1)

    def make(batch, variant=VARIANT):
        workload = dataclasses.replace(WORKLOAD, request_batch=batch)
        request = TrialRequest(
            trial="r0-plain", variant=variant, role="variant", replicate=0, seed=1, workload=workload,
            protocol=PROTOCOL, interleaving="replicates", measures=("steps", "requests", "open_ended", "peaks"),
            device="cpu", threads=1, tokens_path=prepare(workload, tmp_path).path,
            scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        running = Trial(request, SharedBase())
        record = TrialRecord(
            trial="r0-plain", status="ok", name="plain", variant=variant.id, role="variant", replicate=0, position=0,
            interleaving="replicates", seed=1, started_unix_s=0.0, wall_time_s=0.0,
        )  # fmt: skip
        for command in SERVED:
            record = record.merged(running.run(command))
        return running, record

    return make


def test_each_prompt_of_a_request_has_the_answer_that_it_has_alone(trial):
    """Greedy, in float32 and without padding; the prompts differ, and so do their answers."""
    running, record = trial(4)
    model, prompts = running._built.trainee.model, running._built.stream.prompts(0)
    assert prompts.shape == (4, 8)
    assert len({tuple(prompt) for prompt in prompts.tolist()}) == 4
    together = generate(model, prompts, 3)
    alone = [generate(model, prompts[row : row + 1], 3).answers[0] for row in range(4)]
    assert list(together.answers) == alone
    assert len(set(alone)) > 1
    assert record.tokens["completion"] == list(together.tokens) == [token for answer in alone for token in answer]


@pytest.mark.parametrize("batch", [1, 4])
def test_throughput_is_of_all_prompts_and_latency_of_the_request(trial, batch):
    """Tokens a second count every answer; one that is made up of no more tokens takes its time once."""
    running, record = trial(batch)
    record = record.merged(running.run("request")).merged(running.run("request")).merged(running.run("end_generate"))
    times = record.samples["request_time_s"]
    assert (record.status, record.values["request_batch"], record.values["new_tokens"]) == ("ok", batch, 3)
    assert samples_of(record, "output_tokens_per_s") == pytest.approx([batch * 3 / seconds for seconds in times])
    assert all(
        first < whole for first, whole in zip(record.samples["first_token_time_s"], times, strict=True)
    )  # of all prompts at once
    (check,) = (one for one in record.checks if one["path"] == "request.attention")
    assert (check["observed"], check["status"]) == ("flash", "active")
