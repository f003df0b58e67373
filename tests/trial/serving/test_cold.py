"""A cold start is a user's: it reads, converts and quantises the model's own files, whatever the run has prepared."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from lorameter.models import bases, catalogue
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import base_cache, base_model, peft_methods
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving import cold
from lorameter.trial.serving.generate import generate

VARIANT = LoraVariant(name="v", r=2, quantization="nf4", dtype="float32", compute_dtype="float32")
WORKLOAD = Workload(
    sequence_length=32, train_sequences=4, held_out_records=4, held_out_sequences=1, prompt_tokens=8, new_tokens=4
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The request of a trial whose model lies in a directory and whose base was prepared of it; its adapter is saved,
    and does something."""
    monkeypatch.setenv(bases.ENV_BASES, str(tmp_path / "bases"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    random = base_model.load_base(catalogue.resolve(f"random:{model}"), LoraVariant(), device="cpu", seed=1)
    random.save_pretrained(model)
    workload = dataclasses.replace(WORKLOAD, model=str(model))
    asked = BaseRequest(workload=workload, variant=VARIANT, device="cpu", threads=1, log_path="")
    base = Path(base_cache.prepare(asked).path)
    trained = peft_methods.attach(base_cache.take(base, VARIANT, "cpu"), VARIANT)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    peft_methods.save(trained, tmp_path / "adapter")
    return TrialRequest(
        trial="t", variant=VARIANT, role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(),
        interleaving="replicates", measures=("cold",), device="cpu", threads=1, base=str(base), scratch=str(tmp_path),
        tokens_path=prepare(WORKLOAD, tmp_path).path, log_path="",
    )  # fmt: skip


def answered(request):
    """What is said by a model that was loaded of its files here."""
    base = base_model.load_base(catalogue.resolve(request.workload.model), VARIANT, device="cpu", seed=1)
    model = peft_methods.load(base, VARIANT, Path(request.scratch) / "adapter").eval()
    prompts = TokenStream(Path(request.tokens_path), request.workload, VARIANT, "cpu").prompts(0)
    return list(generate(model, prompts, request.workload.new_tokens, variant=VARIANT).tokens)


def test_a_cold_start_takes_no_prepared_base(served, monkeypatch):
    """With the base gone, and with one that cannot be loaded, it answers the same, by one conversion."""
    own, wanted = base_model.load_base, answered(served)
    read = []

    def load(source, *given, **options):
        read.append(source.location)
        return own(source, *given, **options)

    monkeypatch.setattr(base_model, "load_base", load)
    monkeypatch.setattr(base_cache, "take", lambda *_: pytest.fail("the prepared base was taken"))
    for missing in (False, True):
        if missing:
            shutil.rmtree(served.base)
        found = cold.start_cold(served, time.monotonic())
        assert found.tokens["cold_completion"] == wanted
        assert found.values["cold_base_conversions"] == len(read) == 1
        assert read.pop() == served.workload.model
