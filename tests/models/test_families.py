"""Tests that the table of families equals what transformers builds and PEFT adapts."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.activations import Activations
from lorameter.models.costs.ceiling import ceiling_of
from lorameter.models.costs.flops import StepTokens, product_weights, six_n, training_flops
from lorameter.models.costs.lora import adapter_parameters
from lorameter.models.costs.memory import estimate_memory, memory_bytes
from lorameter.models.costs.peaks import Peak
from lorameter.models.families import FAMILIES, Family, llama_layers
from lorameter.models.shapes import UnknownLayersError, linear_layers, linear_widths
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.base_model import empty_model
from lorameter.trial.building.sizes import sizes_of

DIMENSIONS = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Widths of a block that differ wherever they can."""
VARIANT = LoraVariant(name="v", r=4, target_modules=("q_proj", "v_proj"))
TOKENS = StepTokens(positions=8, pairs=36)


@pytest.fixture
def source_of(tmp_path):
    """A function that describes two narrow blocks of a model type, without weights."""

    def source(model_type):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | DIMENSIONS))
        return catalogue.resolve(f"random:{tmp_path}")

    return source


@pytest.fixture
def shape_of(source_of):
    """A function that returns the shape of these blocks."""
    return lambda model_type: shapes.shape(source_of(model_type))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_agrees_with_transformers_and_peft(family, source_of, shape_of):
    """Names, parents, widths and biases of a block's linear layers, its module, PEFT's default targets, and the
    parameters of LoRA on one layer and DoRA on all agree."""
    source = source_of(family.model_type)
    blocks = empty_model(source, VARIANT).model.layers
    built = {name: module for name, module in blocks[1].named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.rpartition(".")[2]: (layer.in_features, layer.out_features) for name, layer in built.items()}
    shape = shape_of(family.model_type)
    assert found == linear_widths(shape)
    assert {name.rpartition(".")[0] for name in built} == set(family.parents)
    assert {name.rpartition(".")[2] for name, layer in built.items() if layer.bias is not None} == family.biased
    assert find_spec(family.module) is not None
    assert tuple(TARGETS.get(family.model_type, ())) == family.targets
    one = dataclasses.replace(VARIANT, target_modules=(next(iter(linear_layers(shape))),))
    for variant in (one, dataclasses.replace(one, target_modules=("all-linear",), use_dora=True, r=3)):
        assert sizes_of(variant, source).trainable_parameters == adapter_parameters(variant, shape)


PEAKS = {rate: Peak(device="d", rate=rate, per_s=1e9, source="s") for rate in ("float32", "memory")}
ESTIMATES = {
    "widths": lambda shape: linear_widths(shape),
    "parameters": lambda shape: adapter_parameters(VARIANT, shape),
    "FLOPs": lambda shape: training_flops(shape, VARIANT, TOKENS),
    "6 N": lambda shape: six_n(shape, TOKENS),
    "weights": lambda shape: product_weights(shape),
    "memory of a step": lambda shape: estimate_memory(VARIANT, Workload(), shape),
    "memory of a request": lambda shape: estimate_memory(VARIANT, Workload(), shape, phase="generate"),
    "memory beyond the process": lambda shape: memory_bytes(VARIANT, Workload(), shape),
    "activations": lambda shape: Activations(VARIANT, Workload(), shape, "cpu"),
    "MFU": lambda shape: ceiling_of(shape, VARIANT, None, PEAKS["float32"], useful=TOKENS, computed=TOKENS),
}


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_an_unknown_type_is_unknown_to_every_estimate(estimate, shape_of):
    """The message names the type and the file of the missing entry."""
    shape = shape_of("mixtral")
    with pytest.raises(UnknownLayersError, match=r"'mixtral'.*add an entry for it to .*/families\.py") as caught:
        estimate(shape)
    assert str(caught.value) == shapes.unknown_layers(shape)


def test_a_family_like_llama_is_one_entry(monkeypatch, shape_of):
    """A family with Llama's layers gets every estimate of Llama from one entry."""
    monkeypatch.setattr(
        "lorameter.models.shapes.FAMILIES", FAMILIES | {"new": Family(model_type="new", layers=llama_layers)}
    )
    known, new = shape_of("llama"), shape_of("new")
    assert shapes.unknown_layers(new) is None
    for name in ("widths", "parameters", "FLOPs", "memory of a step"):
        assert ESTIMATES[name](new) == ESTIMATES[name](known)


def test_targets_that_neither_a_variant_nor_peft_names_are_refused(shape_of):
    """SmolLM3 has no default targets in PEFT, which would refuse it only after the model has been loaded."""
    with pytest.raises(UsageError, match=r"'v'.*target_modules = \(\).*'smollm3'"):
        adapter_parameters(dataclasses.replace(VARIANT, target_modules=()), shape_of("smollm3"))
