"""Tests that variants refuse impossible values and have a stable identity."""

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.studies.variant import LoraVariant, form_keys


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, ["r = 0", "Use 1 or more"]),
        ({"lora_dropout": 1.5}, ["lora_dropout = 1.5", "below 1"]),
        ({"lora_alpha": 0}, ["lora_alpha = 0"]),
        ({"learning_rate": -1.0}, ["learning_rate"]),
        ({"gradient_accumulation": 0}, ["gradient_accumulation"]),
        ({"quantization": "nf4", "init_lora_weights": "pissa"}, ["init_lora_weights", "nf4"]),
        ({"prepare_for_kbit": True}, ["prepare_for_kbit", "quantization"]),
        ({"attention": "flash_attention_2", "dtype": "float32"}, ["attention", "float32", "bfloat16"]),
        (
            {"attention": "flash_attention_2", "dtype": "float32", "autocast": "bfloat16"},
            ["attention", "without autocast", "bfloat16"],
        ),
        ({"init_lora_weights": "orthogonal", "r": 3}, ["orthogonal", "even"]),
    ],
)
def test_impossible_values_are_refused(fields, words):
    """The message names the variant, the key, the value and the remedy."""
    with pytest.raises(UsageError) as caught:
        LoraVariant(name="v", **fields)
    for word in ["'v'", *words]:
        assert word in str(caught.value)


def test_every_field_that_is_read_changes_the_identity():
    """No two different configurations share an id."""
    base = LoraVariant(quantization="nf4")
    others = {
        "r": 8, "lora_alpha": 3.0, "lora_dropout": 0.5, "target_modules": ("q_proj",), "bias": "all",
        "use_rslora": True, "use_dora": True, "init_lora_weights": "gaussian", "dtype": "float32",
        "quantization": "fp4", "double_quant": False, "compute_dtype": "float32", "prepare_for_kbit": True,
        "adapter_dtype": "bfloat16", "attention": "eager", "gradient_checkpointing": True, "autocast": "bfloat16",
        "tf32": True, "compile": True, "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "linear",
        "warmup_ratio": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.0, "gradient_accumulation": 2,
        "liger_kernel": True, "merge_adapter": True, "kv_cache": "static", "copy_head_input": True,
        "optimizer_args": {"betas": [0.8, 0.9]},
    }  # fmt: skip
    assert set(others) == set(form_keys(LoraVariant)) - {"name"}
    ids = {dataclasses.replace(base, **{key: value}).id for key, value in others.items()} | {base.id}
    assert len(ids) == len(others) + 1


def test_fields_that_are_not_read_do_not_split_a_variant():
    """Without 4 bits, the options of 4-bit quantisation are ignored."""
    assert LoraVariant(double_quant=True).id == LoraVariant(double_quant=False).id
