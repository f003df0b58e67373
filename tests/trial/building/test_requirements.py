"""Tests of the kernels_check requirements that follow from a variant."""

import pytest

from lorameter.studies.variant import LoraVariant
from lorameter.trial.building.build import requirements_of


def test_each_setting_of_a_variant_becomes_a_requirement():
    """NF4 with double quantisation, bf16, dropout, fused AdamW and Liger kernels each become a requirement."""
    variant = LoraVariant(quantization="nf4", lora_dropout=0.1, liger_kernel=True)
    expected = {
        "fused.kernels": "rms_norm+mlp+loss", "base.bits": 4, "base.quant_type": "nf4", "base.double_quant": True,
        "base.compute_dtype": "bfloat16", "attention.dtype": "bfloat16", "peft.dropout": 0.1, "optimizer.fused": True,
        "packing.isolated": True,
    }  # fmt: skip
    required = requirements_of(variant, (1000,), packed=True)
    assert expected == {path: required[path] for path in expected}


def test_absent_features_of_a_variant_are_not_required():
    """An unquantised base has no quantisation constants, and padded data has no records to isolate."""
    required = requirements_of(LoraVariant(optimizer="adamw"), (1000,), packed=False)
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
    required = requirements_of(LoraVariant(tf32=True, **changes), (1,), packed=False)
    assert ("tf32" in required) is multiplies
