"""Tests that a small model of every listed architecture trains in 4 bits, passes its checks and generates."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import adapter_parameters
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

NAMES = ("qwen2.5-0.5b", "gemma-2b", "mistral-7b")
"""Grouped heads, biases and a tied head; a single key/value head of another size; a window shorter than the
sequence."""
VARIANT = LoraVariant(
    name="v", r=4, lora_dropout=0.1, target_modules=(), quantization="nf4", prepare_for_kbit=True, autocast="bfloat16",
    optimizer="adamw",
)  # fmt: skip
WORKLOAD = Workload(
    sequence_length=256, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3,
)  # fmt: skip


def small(name):
    """Return the configuration of the entry with two layers and a small vocabulary; size and grouping of the heads
    stay."""
    config = json.loads(catalogue.CATALOGUE[name].config.read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    heads = max(2, group)
    config |= {
        "num_hidden_layers": 2, "vocab_size": 320, "hidden_size": 64 * heads, "intermediate_size": 192,
        "num_attention_heads": heads, "num_key_value_heads": heads // group, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    return config | ({"sliding_window": 32} if name.startswith("mistral") else {})


@pytest.fixture
def run(tmp_path):
    """A function that builds a trial of a configuration and returns a function for its commands; no command may
    fail."""
    torch.set_num_threads(1)

    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        workload = dataclasses.replace(WORKLOAD, model=f"random:{tmp_path}")
        request = TrialRequest(
            trial="r0-v", variant=VARIANT, role="variant", replicate=0, seed=1, workload=workload,
            protocol=Protocol().least(), interleaving="replicates", measures=("steps", "requests", "peaks"),
            device="cpu", threads=1, tokens_path=prepare(workload, tmp_path).path,
            scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        trial = Trial(request, SharedBase())

        def command(name):
            fragment = trial.run(name)
            assert fragment.status == "ok", fragment.failure
            return fragment

        return command, shapes.shape(catalogue.resolve(workload.model))

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_family_trains_and_generates(run, name):
    """With NF4 and PEFT's default targets all checks are active, packed records are isolated, and greedy generation
    works."""
    command, shape = run(small(name))
    command("build")
    checks = {check["path"]: check for check in command("verify").checks}
    assert {checks[path]["status"] for path in ("packing.isolated", "attention.backend", "base.bits")} == {"active"}
    command("warm_up")
    finished = command("finish_training")
    assert finished.values["trainable_parameters"] == adapter_parameters(VARIANT, shape)
    assert len(command("begin_generate").tokens["completion"]) == WORKLOAD.new_tokens
