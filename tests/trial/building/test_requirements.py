"""What a variant claims: requirements that follow from it, and the share that a paged optimizer would page."""

import pytest

from harness.studies.variant import Variant
from harness.trial.building.requirements import paged_share, requirements_of


def test_a_variant_requires_what_it_says():
    """NF4 with double quantisation, bf16, dropout, fused AdamW: each is a requirement."""
    required = requirements_of(Variant(quantization="nf4", lora_dropout=0.1), (1000,), packed=True)
    assert required["base.bits"] == 4
    assert required["base.quant_type"] == "nf4"
    assert required["base.double_quant"] is True
    assert required["base.compute_dtype"] == required["attention.dtype"] == "bfloat16"
    assert required["lora.dropout"] == 0.1
    assert required["optimizer.fused"] is True
    assert required["packing.isolated"] is True


def test_patched_kernels_must_have_run():
    """Norms, feed-forward parts and the loss; a variant without them requires nothing of the kind."""
    required = requirements_of(Variant(liger_kernel=True), (1000,), packed=True)
    assert required["fused.kernels"] == "rms_norm+mlp+loss"
    assert "fused.kernels" not in requirements_of(Variant(), (1000,), packed=True)


def test_what_a_variant_does_not_say_is_not_required():
    """An unquantised base has no quantisation constants, padded data nothing to isolate."""
    required = requirements_of(Variant(optimizer="adamw"), (1000,), packed=False)
    assert not {"base.double_quant", "base.compute_dtype", "optimizer.fused", "packing.isolated"} & set(required)
    assert required["base.bits"] == 16


def test_preparation_without_autocast_means_float32_attention():
    """PEFT casts the norms, and queries and keys follow them."""
    prepared = Variant(quantization="nf4", prepare_for_kbit=True)
    assert requirements_of(prepared, (1,), packed=False)["attention.dtype"] == "float32"


@pytest.mark.parametrize(
    ("shapes", "eight_bit", "share"),
    [
        ((50_000, 50_000), False, 0.0),
        ((200_000,), False, 1.0),
        ((200_000, 50_000), False, 0.8),
        ((256_000,), True, 2 / (2 + 8 / 256)),
    ],
)
def test_the_paged_share_is_counted_in_bytes(shapes, eight_bit, share):
    """Tensors from 100,000 elements on; in 8 bits the constants beside the moments are never paged."""
    assert paged_share(shapes, eight_bit=eight_bit) == pytest.approx(share)


def test_an_optimizer_named_paged_must_page_what_bitsandbytes_would():
    """Where every tensor is too small for it nothing is required, or no such variant could ever be measured."""
    variant = Variant(optimizer="paged_adamw_32bit")
    assert requirements_of(variant, (200_000,), packed=False)["optimizer.paged_share"] == pytest.approx(0.98)
    assert "optimizer.paged_share" not in requirements_of(variant, (16 * 4096,) * 4, packed=False)


@pytest.mark.parametrize(
    ("changes", "multiplies"),
    [
        ({}, True),
        ({"adapter_dtype": "bfloat16"}, False),
        ({"adapter_dtype": "bfloat16", "dtype": "float32"}, True),
        ({"autocast": "bfloat16", "dtype": "float32"}, False),
        ({"quantization": "nf4", "adapter_dtype": "bfloat16"}, False),
        ({"quantization": "nf4", "adapter_dtype": "bfloat16", "compute_dtype": "float32"}, True),
        ({"quantization": "nf4", "adapter_dtype": "bfloat16", "prepare_for_kbit": True}, True),
        ({"quantization": "nf4", "prepare_for_kbit": True, "autocast": "bfloat16"}, False),
    ],
)
def test_tensor_cores_are_required_where_a_product_is_in_float32(changes, multiplies):
    """Under autocast to 16 bits, or with everything in 16 bits, there is nothing that TF32 could apply to."""
    required = requirements_of(Variant(tf32=True, **changes), (1,), packed=False)
    assert ("tf32" in required) is multiplies
