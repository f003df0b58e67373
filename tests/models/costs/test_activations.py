"""Tests that the closed form of the saved activations of a forward pass equals what autograd saves, to the byte."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorameter.models import catalogue, shapes
from lorameter.models.costs.activations import Activations
from lorameter.models.families import FAMILIES
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.memory import resident_tensors
from lorameter.trial.profiling.memory import LiveTensors

ROWS, LENGTH, VOCABULARY = 2, 24, 320
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32,
    "vocab_size": VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
PREPARED = {"quantization": "nf4", "prepare_for_kbit": True}
VARIANT = LoraVariant(name="v", r=8)


def two_blocks(folder, model_type, **changes):
    """Write the configuration of two blocks with grouped heads and return its source."""
    config = LLAMA | {"model_type": model_type, "pad_token_id": 0} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return catalogue.resolve(f"random:{folder}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of two llama blocks."""
    return two_blocks(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": (), "lora_dropout": 0.1},
        {"dtype": "float32", "lora_dropout": 0.1},
        {"attention": "eager"},
        {"autocast": "bfloat16"},
        {**PREPARED, "autocast": "bfloat16", "gradient_checkpointing": True},
        {"quantization": "int8"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "default",
)
def test_activations_are_counted_to_the_byte(source, changes):
    """The rows hold two packed records; logits and labels are not counted."""
    assert_counted_to_the_byte(source, dataclasses.replace(VARIANT, **changes))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "llama"])
def test_activations_of_every_family_are_counted_to_the_byte(tmp_path, model_type):
    """All layers are adapted, with dropout before each."""
    source = two_blocks(tmp_path, model_type)
    assert_counted_to_the_byte(source, dataclasses.replace(VARIANT, lora_dropout=0.1))


def test_blocks_with_and_without_a_window_have_two_rotary_embeddings(tmp_path):
    """In Gemma 3 the last of six blocks attends to all positions."""
    source = two_blocks(tmp_path, "gemma3_text", num_hidden_layers=6, sliding_window=16)
    assert_counted_to_the_byte(source, VARIANT)


def assert_counted_to_the_byte(source, variant):
    """Assert that the closed form equals what autograd saves."""
    model = peft_methods.attach(load_base(source, variant, device="cpu", seed=1), variant).train()
    optimizer = peft_methods.make_optimizer(model, variant)
    addresses = {t.untyped_storage().data_ptr() for found in resident_tensors(model, optimizer).values() for t in found}
    live = LiveTensors(resident=addresses, vocabulary=VOCABULARY, device="cpu", on_change=lambda kinds: None)
    tokens = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).repeat(ROWS, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=variant.autocast is not None)
    with live.watching(trained, compiled=True), autocast:
        loss = model(input_ids=tokens, labels=tokens, position_ids=positions, use_cache=False).loss
        found = live.bytes["activations"]
    del loss
    labels = 8 * ROWS * LENGTH + 4  # the loss saves the labels and their count
    cast_head = 2 * VOCABULARY * LLAMA["hidden_size"] if variant.autocast and variant.prepare_for_kbit else 0
    workload = Workload(sequence_length=LENGTH, batch_size=ROWS)
    kept = Activations(variant, workload, shapes.shape(source), "cpu").sum_kept()
    assert found - labels in (kept, kept - cast_head)  # a transposed head looks like logits
