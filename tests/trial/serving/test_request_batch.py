"""Tests of a request of several prompts: its answers and its metrics."""

from __future__ import annotations

import pytest

from lorameter.records.metrics import samples_of
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.serving.generate import generate

WORKLOAD = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=6, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3, request_batch=4,
)  # fmt: skip
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))


def test_a_request_of_several_prompts(begin_requests):
    """In float32 and without padding, each prompt has the answer that it has alone; throughput counts the tokens of all
    prompts, latency is that of the request, and its attention is checked."""
    trial, record = begin_requests(WORKLOAD, VARIANT)
    model, prompts = trial._built.trainee.model, trial._built.stream.prompts(0)
    assert prompts.shape == (4, 8)
    together = generate(model, prompts, 3)
    alone = [generate(model, prompts[row : row + 1], 3).answers[0] for row in range(4)]
    assert list(together.answers) == alone
    assert len(set(alone)) > 1
    assert record.tokens["completion"] == list(together.tokens) == [token for answer in alone for token in answer]

    for command in ("request", "request", "end_generate"):
        record = record.merged(trial.run(command))
    times = record.samples["request_time_s"]
    assert (record.status, record.values["request_batch"], record.values["new_tokens"]) == ("ok", 4, 3)
    assert samples_of(record, "output_tokens_per_s") == pytest.approx([4 * 3 / seconds for seconds in times])
    assert all(first < whole for first, whole in zip(record.samples["first_token_time_s"], times, strict=True))
    (check,) = (one for one in record.checks if one["path"] == "request.attention")
    assert (check["observed"], check["status"]) == ("flash", "active")
