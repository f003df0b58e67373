"""What PEFT's LoRA is: its config, its adapter on a base, its dtype, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from harness.studies.variant import ALL_LINEAR, Variant


def attach(base: Any, variant: Variant, adapter: str = "default") -> Any:
    """The base with a fresh adapter, as PEFT makes it."""
    base = prepared(base, variant)
    if variant.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    upcasts = upcasts_adapter(variant)
    model = get_peft_model(base, lora_config(variant), adapter_name=adapter, autocast_adapter_dtype=upcasts)
    cast_adapter(model, variant)
    return model


def prepared(base: Any, variant: Variant) -> Any:
    """The base with what is not quantised cast to float32, where the variant asks for PEFT's preparation."""
    if not variant.prepare_for_kbit:
        return base
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def upcasts_adapter(variant: Variant) -> bool:
    """Whether PEFT may cast the adapter to float32, which it does unless told otherwise."""
    return variant.adapter_dtype in (None, "float32")


def cast_adapter(model: Any, variant: Variant) -> None:
    """Cast the adapter to the variant's type, where it names one."""
    if variant.adapter_dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, variant.adapter_dtype))


def lora_config(variant: Variant) -> LoraConfig:
    """PEFT's configuration of a variant."""
    targets: Any = list(variant.target_modules) or None
    if variant.target_modules == (ALL_LINEAR,):
        targets = ALL_LINEAR
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=variant.r,
        lora_alpha=cast(int, variant.lora_alpha),
        lora_dropout=variant.lora_dropout,
        target_modules=targets,
        bias=variant.bias,
        use_rslora=variant.use_rslora,
        use_dora=variant.use_dora,
        init_lora_weights=True if variant.init_lora_weights == "default" else variant.init_lora_weights,
    )


def save_initial(model: Any, folder: Path) -> None:
    """Save the untrained adapter of an initialisation that rewrote the base (OLoRA, PiSSA).

    The trained adapter is relative to the rewritten base; PEFT turns it into one for the original base, of twice the
    rank, by subtracting what it began with.
    """
    config = model.peft_config["default"]
    kept, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = kept
