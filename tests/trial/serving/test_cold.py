"""Tests that a cold start loads the model's own files, as a user's does, and not the prepared base of the run.

Tests of a request of several prompts: its answers and its metrics.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lorameter.measurements.metrics import get_samples
from lorameter.models import catalogue
from lorameter.records import codec
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serve import COMMANDS
from lorameter.trial.serving.server import generate

VARIANT = LoraVariant(name="v", r=2, quantization="nf4", dtype="float32", compute_dtype="float32")
WORKLOAD = Workload(
    sequence_length=32, train_sequences=4, held_out_records=4, held_out_sequences=1, prompt_tokens=8, new_tokens=4
)


def test_a_cold_start_gives_the_same_answer_as_a_loaded_model(tmp_path):
    """It loads the saved adapter and ignores the request's prepared base, which does not exist."""
    base = load_base(catalogue.resolve(WORKLOAD.model), VARIANT, device="cpu", seed=WORKLOAD.data_seed)
    model = peft_methods.attach(base, VARIANT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    peft_methods.save(model, tmp_path / "adapter")
    request = TrialRequest(
        trial="t", variant=VARIANT, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
        interleaving="replicates", measures=("cold",), device="cpu", threads=1, base=str(tmp_path / "missing"),
        scratch=str(tmp_path), tokens_path=prepare(WORKLOAD, tmp_path).path, log_path="",
    )  # fmt: skip
    prompts = TokenStream(Path(request.tokens_path), WORKLOAD, VARIANT, "cpu").prompts(0)
    expected = list(generate(model, prompts, WORKLOAD.new_tokens, variant=VARIANT).tokens)
    found = COMMANDS["cold"](spawned_monotonic_s=time.monotonic(), request=codec.to_json(request))
    assert found.tokens["cold_completion"] == expected
    assert found.values["cold_start_time_s"] > found.values["cold_load_time_s"] > 0


WORKLOAD_REQUEST_BATCH = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=6, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3, request_batch=4,
)  # fmt: skip
VARIANT_REQUEST_BATCH = LoraVariant(name="plain", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))


def test_a_request_of_several_prompts(begin_requests):
    """In float32 and without padding, each prompt has the answer that it has alone; throughput counts the tokens of all
    prompts, latency is that of the request, and its attention is checked."""
    trial, record = begin_requests(WORKLOAD_REQUEST_BATCH, VARIANT_REQUEST_BATCH)
    model, prompts = trial.trainee.model, trial.stream.prompts(0)
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
    assert get_samples(record, "output_tokens_per_s") == pytest.approx([4 * 3 / seconds for seconds in times])
    assert all(first < whole for first, whole in zip(record.samples["first_token_time_s"], times, strict=True))
    (check,) = (one for one in record.checks if one["path"] == "request.attention")
    assert (check["observed"], check["status"]) == ("flash", "active")
