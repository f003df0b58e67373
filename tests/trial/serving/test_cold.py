"""Tests that a cold start loads the model's own files, as a user's does, and not the prepared base of the run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from lorameter.models import catalogue
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving import cold
from lorameter.trial.serving.generate import generate

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
    found = cold.start_cold(request, time.monotonic())
    assert found.tokens["cold_completion"] == expected
    assert found.values["cold_base_conversions"] == 1
    assert found.values["cold_start_time_s"] > found.values["cold_load_time_s"] > 0
