"""Tests that PEFT's layers, not names, decide which parameters belong to the adapter.

Tests that sizes are counted without weights and equal those of a real step to the byte.

Tests of the kernels_check requirements that follow from a variant.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorameter.errors import UsageError
from lorameter.models import catalogue
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import empty_model, load_base
from lorameter.trial.building.build import base_digest, build_requirements, count_sizes
from lorameter.trial.memory import resident_bytes

TINY = catalogue.resolve("tiny-llama")
VARIANT = LoraVariant(name="v", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))


def attached(**changes):
    """Return tiny-llama with an adapter, without weights."""
    variant = dataclasses.replace(VARIANT, **changes)
    with torch.device("meta"):
        return peft_methods.attach(empty_model(TINY, variant), variant), variant


def test_trained_parameters_are_the_adapter_s_own():
    """Parameters have their names in the model; trained biases of the base belong to the base."""
    model, _ = attached(use_dora=True, target_modules=("all-linear",))
    own = peft_methods.own_parameters(model)
    assert {name: id(one) for name, one in own.items()} == {
        name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert len(peft_methods.adapted_layers(model)) == 4 * 7
    model, _ = attached(bias="all")
    assert not [name for name in peft_methods.own_parameters(model) if "bias" in name]


def test_base_weights_with_names_like_pefts_are_still_the_bases():
    """A base module with a name like PEFT's is still the base's: it is not cast and is in the digest."""
    base = load_base(TINY, VARIANT, device="cpu", seed=1)
    base.model.lora_gate = torch.nn.Linear(2, 2)
    variant = dataclasses.replace(VARIANT, adapter_dtype="bfloat16")
    model = peft_methods.attach(base, variant)
    own = peft_methods.own_parameters(model)
    assert not [name for name in own if "lora_gate" in name]
    assert {parameter.dtype for parameter in own.values()} == {torch.bfloat16}
    assert base.model.lora_gate.weight.dtype == torch.float32
    before = base_digest(model)
    with torch.no_grad():
        next(iter(own.values())).add_(1)
    assert base_digest(model) == before
    with torch.no_grad():
        base.model.lora_gate.weight.add_(1)
    assert base_digest(model) != before


def test_parameters_of_all_adapters_count_and_only_the_active_one_trains():
    """Parameters of waiting adapters count as well; only the active adapter trains."""
    model, variant = attached()
    alone = len(peft_methods.own_parameters(model))
    peft_methods.attach_second(model, variant, "second")
    own = peft_methods.own_parameters(model)
    assert len(own) == 2 * alone
    peft_methods.activate(model, "second")
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name in own if ".second." in name
    }


def test_the_same_parameters_train_after_use_without_the_adapter():
    """LoRA-FA keeps one factor frozen, which PEFT would unfreeze."""
    variant = dataclasses.replace(VARIANT, optimizer="lorafa")
    model = peft_methods.attach(load_base(TINY, variant, device="cpu", seed=1), variant)
    peft_methods.make_optimizer(model, variant)
    before = {name for name, one in model.named_parameters() if one.requires_grad}
    assert before
    assert all("lora_B" in name for name in before)
    with peft_methods.without_adapter(model):
        pass
    assert {name for name, one in model.named_parameters() if one.requires_grad} == before


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
    counted = count_sizes(variant, TINY)
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
    counted, (model, optimizer) = count_sizes(variant, source), trained(variant, source)
    assert counted.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert counted.adapter_bytes == resident_bytes(model, optimizer)["adapter_bytes"]
    with pytest.raises(UsageError, match="casts a bias"):
        count_sizes(dataclasses.replace(variant, quantization="nf4"), source)


def test_sizes_on_llama2_7b():
    """PEFT's count is r (4096 + 4096) for q and v of 32 layers; the adapter is float32, with two float32 moments."""
    (variant,) = (one for one in load_study("llama2-lora-parameters").variants if one.r == 512)
    counted = count_sizes(variant, catalogue.resolve("random:llama2-7b"))
    assert counted.trainable_parameters == 512 * 524_288
    assert counted.base_parameters == 6_738_415_616
    assert counted.adapter_bytes == counted.gradient_bytes == 4 * counted.trainable_parameters
    assert counted.optimizer_state_bytes == 8 * counted.trainable_parameters
    assert counted.share == pytest.approx(0.039837, rel=1e-4)


def test_each_setting_of_a_variant_becomes_a_requirement():
    """NF4 with double quantisation, bf16, dropout, fused AdamW and Liger kernels each become a requirement."""
    variant = LoraVariant(quantization="nf4", lora_dropout=0.1, liger_kernel=True)
    expected = {
        "fused.kernels": "rms_norm+mlp+loss", "base.bits": 4, "base.quant_type": "nf4", "base.double_quant": True,
        "base.compute_dtype": "bfloat16", "attention.dtype": "bfloat16", "peft.dropout": 0.1, "optimizer.fused": True,
        "packing.isolated": True,
    }  # fmt: skip
    required = build_requirements(variant, (1000,), packed=True)
    assert expected == {path: required[path] for path in expected}


def test_absent_features_of_a_variant_are_not_required():
    """An unquantised base has no quantisation constants, and padded data has no records to isolate."""
    required = build_requirements(LoraVariant(optimizer="adamw"), (1000,), packed=False)
    absent = {"base.double_quant", "base.compute_dtype", "fused.kernels", "optimizer.fused", "packing.isolated"}
    assert not absent & set(required)
    assert required["base.bits"] == 16


@pytest.mark.parametrize(
    ("changes", "multiplies"),
    [
        ({}, True),
        ({"adapter_dtype": "bfloat16"}, False),
        ({"autocast": "bfloat16", "dtype": "float32"}, False),
        ({"quantization": "nf4", "adapter_dtype": "bfloat16", "compute_dtype": "float32"}, True),
        ({"quantization": "nf4", "prepare_for_kbit": True, "autocast": "bfloat16"}, False),
    ],
)
def test_tensor_cores_are_required_where_a_product_is_in_float32(changes, multiplies):
    """With autocast to 16 bits, or with all tensors in 16 bits, no product could use TF32."""
    required = build_requirements(LoraVariant(tf32=True, **changes), (1,), packed=False)
    assert ("tf32" in required) is multiplies
