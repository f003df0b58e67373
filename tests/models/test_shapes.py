"""Tests of model dimensions, which are read from config.json without torch and network.

Tests that the table of families equals what transformers builds and PEFT adapts.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.catalogue import CATALOGUE
from lorameter.models.costs.lora import adapter_parameters
from lorameter.models.costs.memory import Activations, estimate_memory, stored_dtype
from lorameter.models.shapes import (
    FAMILIES,
    Family,
    ModelShape,
    UnknownLayersError,
    linear_layers,
    linear_widths,
    llama_layers,
)
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.base_model import empty_model
from lorameter.trial.building.build import count_sizes
from lorameter.trial.zygote import LAZY

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An empty cache, so that no test uses the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


@pytest.fixture
def unreachable_hub(monkeypatch):
    """A hub that does not answer."""
    monkeypatch.setattr(catalogue, "hub_answers", lambda repository: False)


def directory_of(path, config):
    """Return a model directory with that configuration and without weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_has_a_shape_without_network(name, unreachable_hub):
    """The packaged files give the shape of `random:` of every catalogue entry, and 4-bit blocks divide its widths."""
    source = catalogue.resolve(f"random:{name}")
    assert source.random
    shape = shapes.shape(source)
    assert shape.heads % shape.kv_heads == 0
    for width in (shape.hidden_size, shape.intermediate_size, shape.vocab_size, shape.heads * shape.head_dim):
        assert width % 64 == 0


def test_the_zygote_loads_the_families_of_the_catalogue(unreachable_hub):
    """The preloaded models are exactly those of the catalogue, and transformers has them."""
    architectures = {shapes.shape(catalogue.resolve(f"random:{name}")).architecture for name in CATALOGUE}
    modules = [name for name in LAZY if name.startswith("transformers.models.")]
    assert architectures == {name.split(".")[2] for name in modules}
    assert all(find_spec(name) is not None for name in modules)


def test_published_dimensions():
    """The packaged configuration has the published dimensions."""
    assert shapes.shape(catalogue.resolve("random:llama2-7b")) == ModelShape(
        hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab_size=32000,
        context=4096, tied=False, architecture="llama",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "heads", "context", "tied"),
    [
        # Query heads, key and value heads, and head size, as published in the models' config.json.
        ("llama2-70b", (64, 8, 128), 4096, False),
        ("mistral-7b", (32, 8, 128), 32768, False),
        ("qwen2.5-0.5b", (14, 2, 64), 32768, True),
        ("gemma-2b", (8, 1, 256), 8192, True),
    ],
)
def test_published_attention(name, heads, context, tied):
    """The models have grouped, single and full key/value heads, head sizes independent of the width, and tied heads."""
    shape = shapes.shape(catalogue.resolve(f"random:{name}"))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == heads
    assert (shape.context, shape.tied) == (context, tied)


def test_unreachable_hub_is_a_usage_error(unreachable_hub, tmp_path, monkeypatch):
    """The error gives the cause and the alternatives."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"hub cannot be reached.*HF_HUB_OFFLINE.*random:"):
        shapes.shape(catalogue.resolve("someone/absent-model-of-no-cache"))


def test_the_shape_of_a_directory(tmp_path):
    """Missing head size and ties are filled in as in transformers."""
    source = catalogue.resolve(str(directory_of(tmp_path / "model", LLAMA)))
    assert source.kind == "directory"
    assert shapes.shape(source) == ModelShape(
        hidden_size=128, intermediate_size=192, layers=3, heads=4, kv_heads=2, head_dim=32, vocab_size=300, context=512,
        tied=False, architecture="llama",
    )  # fmt: skip


def test_the_keys_of_gpt2_are_understood(tmp_path):
    """GPT-2 has other keys and no feed-forward width; whether its head is tied is unknown."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
    shape = shapes.shape(catalogue.resolve(str(directory_of(tmp_path / "gpt2", config))))
    assert (shape.intermediate_size, shape.kv_heads, shape.head_dim, shape.tied) == (256, 4, 16, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ties_agree_with_transformers(tmp_path, model_type):
    """Without an entry in config.json, the head is tied exactly if transformers' class ties it."""
    transformers = pytest.importorskip("transformers")
    config = {**LLAMA, "model_type": model_type}
    shape = shapes.shape(catalogue.resolve(str(directory_of(tmp_path / model_type, config))))
    assert shape.tied == transformers.AutoConfig.for_model(model_type).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vit", "hidden_size": 8}, r"gives no context, .*layers"),
        ({**LLAMA, "num_hidden_layers": -5}, "gives no layers"),
        ({**LLAMA, "vocab_size": True}, "gives no vocab_size"),
        ([], r"config\.json cannot be read"),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path, config, words):
    """The message names the missing dimensions."""
    source = catalogue.resolve(str(directory_of(tmp_path / "model", config)))
    with pytest.raises(UsageError, match=words):
        shapes.shape(source)
    (tmp_path / "model" / "config.json").write_text("{")
    for read in (shapes.shape, stored_dtype):
        with pytest.raises(UsageError, match=r"config\.json cannot be read"):
            read(source)


@pytest.mark.parametrize("name", ["~no-such-user/x", "x" * 5000, "a\x00b/c"])
def test_an_impossible_file_name_is_refused(name):
    """Such a name is refused like any other unknown name."""
    with pytest.raises(UsageError, match="model"):
        catalogue.resolve(name)


DIMENSIONS = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Widths of a block that differ wherever they can."""
VARIANT = LoraVariant(name="v", r=4, target_modules=("q_proj", "v_proj"))


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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_agrees_with_transformers_and_peft(model_type, source_of, shape_of):
    """Names and widths of a block's linear layers, PEFT's default targets, and the parameters of LoRA on one layer
    and DoRA on all agree."""
    source = source_of(model_type)
    blocks = empty_model(source, VARIANT).model.layers
    built = {name: module for name, module in blocks[1].named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.rpartition(".")[2]: (layer.in_features, layer.out_features) for name, layer in built.items()}
    shape = shape_of(model_type)
    assert found == linear_widths(shape)
    assert tuple(TARGETS.get(model_type, ())) == FAMILIES[model_type].targets
    one = dataclasses.replace(VARIANT, target_modules=(next(iter(linear_layers(shape))),))
    for variant in (one, dataclasses.replace(one, target_modules=("all-linear",), use_dora=True, r=3)):
        assert count_sizes(variant, source).trainable_parameters == adapter_parameters(variant, shape)


ESTIMATES = {
    "widths": lambda shape: linear_widths(shape),
    "parameters": lambda shape: adapter_parameters(VARIANT, shape),
    "memory of a step": lambda shape: estimate_memory(VARIANT, Workload(), shape),
    "memory of a request": lambda shape: estimate_memory(VARIANT, Workload(), shape, phase="generate"),
    "activations": lambda shape: Activations(VARIANT, Workload(), shape, "cpu"),
}


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_an_unknown_type_is_unknown_to_every_estimate(estimate, shape_of):
    """The message names the type and the file of the missing entry."""
    shape = shape_of("mixtral")
    with pytest.raises(UnknownLayersError, match=r"'mixtral'.*add an entry for it to .*/shapes\.py") as caught:
        estimate(shape)
    assert str(caught.value) == shapes.unknown_layers(shape)


def test_a_family_like_llama_is_one_entry(monkeypatch, shape_of):
    """A family with Llama's layers gets every estimate of Llama from one entry."""
    monkeypatch.setattr("lorameter.models.shapes.FAMILIES", FAMILIES | {"new": Family(layers=llama_layers)})
    known, new = shape_of("llama"), shape_of("new")
    assert shapes.unknown_layers(new) is None
    for name in ("widths", "parameters", "memory of a step"):
        assert ESTIMATES[name](new) == ESTIMATES[name](known)


def test_targets_that_neither_a_variant_nor_peft_names_are_refused(shape_of):
    """SmolLM3 has no default targets in PEFT, which would refuse it only after the model has been loaded."""
    with pytest.raises(UsageError, match=r"'v'.*target_modules = \(\).*'smollm3'"):
        adapter_parameters(dataclasses.replace(VARIANT, target_modules=()), shape_of("smollm3"))
