"""Requirements for kernels_check that follow from a variant: one with quantization = "nf4" requires nf4. A study can
add more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorameter.models.costs.lora import optimizer_state_bytes, paged_state_bytes
from lorameter.studies.variant import PAGED, FullVariant, LoraVariant, Variant

_BACKEND = {"sdpa": "fused", "eager": "eager", "flash_attention_2": "flash_attention_2", "flex_attention": "flex"}
_OPTIMIZER = {
    "adamw": "torch.optim.AdamW",
    "adamw_fused": "torch.optim.AdamW",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}


LIGER_KINDS = "rms_norm+mlp+loss"
"""What Liger swaps in every architecture that it knows; the rotary embedding it leaves to some."""


def attention_of(variant: Variant, own: Mapping[str, Any]) -> Any:
    """What a variant requires of its attention; `own` are the requirements of the study."""
    return own.get("attention.backend", _BACKEND[variant.attention])


def _optimizer_class(name: str) -> str:
    """The class of an optimizer of torch or bitsandbytes by the name that a variant has for it; "" of one of PEFT's,
    which makes one of another class."""
    if name.startswith("bitsandbytes."):
        return name.replace("bitsandbytes.", "bitsandbytes.optim.", 1)
    return _OPTIMIZER.get(name) or (f"torch.optim.{name}" if name[:1].isupper() else "")


def requirements_of(
    variant: Variant, trained_shapes: tuple[int, ...], *, packed: bool, on_linear: bool = True
) -> dict[str, Any]:
    """Requirements by path.

    Args:
        variant: the claim.
        trained_shapes: elements of each trained tensor; decides which share of paged state bitsandbytes would page.
        packed: whether the workload packs records, which must then be isolated.
        on_linear: whether linear layers carry the adapter, whose storage is then looked at; else that of all of the
            base.
    """
    bits = {"none": 32 if variant.dtype == "float32" else 16, "int8": 8}.get(variant.quantization, 4)
    full, optimizer = isinstance(variant, FullVariant), _optimizer_class(variant.optimizer)
    required: dict[str, Any] = {
        "attention.backend": _BACKEND[variant.attention],
        # PEFT's preparation casts the norms to float32, and queries and keys follow unless autocast brings them back.
        "attention.dtype": variant.autocast or ("float32" if variant.prepare_for_kbit else variant.dtype),
        **({"base.bits": bits, "base.quant_type": variant.quantization} if on_linear else {}),
        **({"base.learning": True} if full else {"peft.attached": True, "peft.learning": True}),
        **({"peft.dropout": float(variant.lora_dropout)} if isinstance(variant, LoraVariant) else {}),
        **({"optimizer.class": optimizer} if optimizer else {}),
        "checkpointing": variant.gradient_checkpointing,
        "mode": "train",
    }
    if variant.is_4bit and not on_linear:
        required["base.bytes_in_4bit"] = 0.01
    elif variant.is_4bit:
        required["base.double_quant"] = variant.double_quant
        required["base.compute_dtype"] = variant.compute_dtype
    if not variant.trains_base:  # otherwise biases of the base train on purpose
        required["base.frozen"] = True
    if variant.adapter_dtype is not None:
        required["peft.dtype"] = variant.adapter_dtype
    if variant.optimizer == "adamw_fused":
        required["optimizer.fused"] = True
    if variant.optimizer in PAGED:
        paged = paged_state_bytes(variant.optimizer, trained_shapes)
        share = paged / optimizer_state_bytes(variant.optimizer, [(elements, 4) for elements in trained_shapes])
        if share:  # tensors that are all too small for bitsandbytes to page are a notice (`lorameter.run.feasibility`)
            required["optimizer.paged_share"] = max(0.01, share - 0.02)
    if variant.tf32 and variant.multiplies_float32:
        required["tf32"] = True
    if variant.compile:
        required["compile"] = True
    if variant.liger_kernel:
        required["fused.kernels"] = LIGER_KINDS
    if packed:
        required["packing.isolated"] = True
    return required
