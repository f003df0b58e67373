"""Tests that sizes are counted without weights and equal those of a real step to the byte."""

import dataclasses
import json

import pytest
import torch

from lorameter.errors import UsageError
from lorameter.models import catalogue
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.building.sizes import sizes_of
from lorameter.trial.memory import resident_bytes

TINY = catalogue.resolve("tiny-llama")
R33 = LoraVariant(r=33, target_modules=(), optimizer="adamw")
"""At r 33 tiny-llama has tensors below and above 4096 elements, and tensors that are not a multiple of the block
size."""
PREPARED = {"quantization": "nf4", "prepare_for_kbit": True, "autocast": "bfloat16"}
QWEN = {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def trained(variant, source):
    """Return the model and its optimizer after one step, with the gradients of a second one."""
    base = load_base(source, variant, device="cpu", seed=1)
    model = peft_methods.attach(base, variant).train()
    optimizer = peft_methods.make_optimizer(model, variant)
    tokens = torch.arange(16)[None]
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=variant.autocast is not None):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "paged_adamw_32bit", **PREPARED},
        {"dtype": "float32", "use_dora": True, "target_modules": ("all-linear",)},
        {"init_lora_weights": "olora", "dtype": "float32"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "adamw",
)
def test_bytes_are_those_of_a_real_step(changes, tmp_path):
    """Adapter, gradients and optimizer state equal the resident bytes after a step, and the file the saved one, for
    each optimizer."""
    variant = dataclasses.replace(R33, **changes)
    counted = sizes_of(variant, TINY)
    base = load_base(TINY, variant, device="cpu", seed=1)
    initial = peft_methods.attach(base, variant)
    if variant.rewrites_base:
        peft_methods.save_initial(initial, tmp_path / "initial")
    model, optimizer = trained(variant, TINY)
    found = resident_bytes(model, optimizer)
    for kind in ("adapter_bytes", "gradient_bytes", "optimizer_state_bytes"):
        assert getattr(counted, kind) == found[kind] > 0, kind
    assert (counted.trainable_parameters, counted.base_parameters + counted.trainable_parameters) == (
        model.get_nb_trainable_parameters()
    )
    before = str(tmp_path / "initial") if variant.rewrites_base else None
    model.save_pretrained(str(tmp_path / "saved"), path_initial_model_for_weight_conversion=before)
    assert counted.saved_bytes == (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size


def test_biases_that_train_are_counted(tmp_path):
    """Biases count in their own dtype; those of a quantised base are refused."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    source, variant = catalogue.resolve(f"random:{tmp_path}"), dataclasses.replace(R33, bias="all")
    counted, (model, optimizer) = sizes_of(variant, source), trained(variant, source)
    assert counted.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert counted.adapter_bytes == resident_bytes(model, optimizer)["adapter_bytes"]
    with pytest.raises(UsageError, match="casts a bias"):
        sizes_of(dataclasses.replace(variant, quantization="nf4"), source)


def test_sizes_on_llama2_7b():
    """PEFT's count is r (4096 + 4096) for q and v of 32 layers; the adapter is float32, with two float32 moments."""
    (variant,) = (one for one in load_study("llama2-lora-parameters").variants if one.r == 512)
    counted = sizes_of(variant, catalogue.resolve("random:llama2-7b"))
    assert counted.trainable_parameters == 512 * 524_288
    assert counted.base_parameters == 6_738_415_616
    assert counted.adapter_bytes == counted.gradient_bytes == 4 * counted.trainable_parameters
    assert counted.optimizer_state_bytes == 8 * counted.trainable_parameters
    assert counted.share == pytest.approx(0.039837, rel=1e-4)


def test_grouped_heads_make_v_narrower_than_q():
    """For each unit of r: layers × (q: width + query heads × head size, v: width + key/value heads × head size),
    without weights."""
    variant = LoraVariant(name="v", r=8, target_modules=(), **PREPARED)
    counted = sizes_of(variant, catalogue.resolve("random:llama2-70b"))
    assert counted.trainable_parameters == 8 * 80 * ((8192 + 64 * 128) + (8192 + 8 * 128))
