"""What PEFT knows of a variant's adapter: its config, how it comes on a base and off again, its dtype, its files.

The one module that speaks to PEFT. Parameters of the adapter are never recognised by name: PEFT's layers list
the parts that they have added, and names of a base are arbitrary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from lorameter.studies.variant import ALL_LINEAR, LoraVariant, Variant
from lorameter.trial.building.packing import unpack_4bit

LAZY = ("peft.tuners.lora.bnb",)
"""What PEFT imports when it first meets a quantised layer."""


def attach(base: Any, variant: Variant, adapter: str = "default") -> Any:
    """The base with a fresh adapter, as PEFT makes it."""
    base = _prepare(base, variant)
    if variant.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, _config(variant), adapter_name=adapter, autocast_adapter_dtype=_upcasts(variant))
    _cast(model, variant)
    return model


def attach_beside(model: Any, variant: Variant, adapter: str) -> None:
    """Give a model that has adapters another one, which is not active yet."""
    model.add_adapter(adapter, _config(variant), autocast_adapter_dtype=_upcasts(variant))
    _cast(model, variant)


def attach_drawn(model: Any, variant: Variant, adapter: str, seed: int) -> None:
    """Give the model an adapter as `attach_beside` does, with random weights as large as a base's: those of a trained
    one do not affect times, but answers like those of the base could not be distinguished from it.

    An entry of A has the variance 1 / inputs and one of B 1 / r over the square of the scaling, so that what both do
    together leaves the size of what comes in as it is, whatever r and alpha are.
    """
    attach_beside(model, variant, adapter)
    generator = torch.Generator().manual_seed(seed)  # of the host, so that every device has the same
    for layer in adapted_layers(model).values():
        lora: Any = layer
        for part in lora.adapter_layer_names:
            held = getattr(lora, part)
            if adapter not in held:
                continue
            weight = held[adapter] if isinstance(held[adapter], torch.nn.Parameter) else held[adapter].weight
            drawn = torch.randn(weight.shape, generator=generator) * (weight[0].numel() ** -0.5)
            weight.data.copy_(drawn / lora.scaling[adapter] if part.endswith("_B") else drawn)


def detach(model: Any, adapter: str) -> None:
    """Take an adapter that is not active off the model."""
    model.delete_adapter(adapter)


def unmixable_layers(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the layers that cannot take rows for different adapters: PEFT refuses that where it wraps a parameter of
    a layer in place of the layer (experts that are stored as one tensor) or torch's own attention."""
    refusing = (ParamWrapper, MultiheadAttention)
    return tuple(name for name, layer in adapted_layers(model).items() if isinstance(layer, refusing))


def activate(model: Any, adapter: str) -> None:
    """Have this adapter, and no other, take part and train."""
    if model.active_adapter != adapter:
        model.set_adapter(adapter)


def wrapped(model: Any) -> Any:
    """transformers' own model inside of PEFT's, its layers replaced; the model itself where PEFT has wrapped none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_merged(model: Any) -> bool:
    """Whether an adapter is merged into the base."""
    return any(layer.merged for layer in adapted_layers(model).values())


def without_adapter(model: Any) -> AbstractContextManager[None]:
    """Meanwhile the model is its base."""
    return cast("AbstractContextManager[None]", model.disable_adapter())


def serving(model: Any, *, adapter: bool) -> AbstractContextManager[None]:
    """Meanwhile the model answers with its adapter, or without it."""
    return nullcontext() if adapter else without_adapter(model)


def merge(model: Any) -> None:
    """Merge the active adapter into the base, whose 4-bit weights must lie in their stored layout for it; nothing where
    it is merged."""
    if is_merged(model):
        return
    unpack_4bit(model)
    model.merge_adapter()


def adapted_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that PEFT has put in place of a base's, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def own_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What adapters have added to a model, all of them together, by name; what they wrap is the base's."""
    found: dict[str, torch.nn.Parameter] = {}
    for name, layer in adapted_layers(model).items():
        added: Any = layer
        for part in (*added.adapter_layer_names, *added.other_param_names):
            held = getattr(layer, part, None)
            if isinstance(held, torch.nn.Parameter):
                found[f"{name}.{part}"] = held
            elif isinstance(held, torch.nn.Module):
                found |= dict(held.named_parameters(prefix=f"{name}.{part}"))
    return found


def save(model: Any, folder: Path, *, initial: Path | None = None) -> None:
    """Write the trained adapter; `initial` is what `save_initial` wrote, where the initialisation rewrote the base."""
    before = None if initial is None else str(initial)
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=before)


def save_initial(model: Any, folder: Path) -> None:
    """Save the untrained adapter of an initialisation that rewrote the base (OLoRA, PiSSA).

    The trained adapter is relative to the rewritten base; PEFT turns it into one for the original base, of twice the
    rank, by subtracting what it began with.
    """
    config = model.peft_config["default"]
    kept, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = kept


def saved_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """What the file of the adapter holds, by the names in it."""
    return cast("Mapping[str, torch.Tensor]", get_peft_model_state_dict(model, save_embedding_layers=False))


def load(base: Any, variant: Variant, folder: Path) -> Any:
    """The base with the adapter that `save` wrote, as one loads it to use it."""
    base = _prepare(base, variant)
    model: Any = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=_upcasts(variant))
    _cast(model, variant)
    return model


def _prepare(base: Any, variant: Variant) -> Any:
    """The base with what is not quantised cast to float32, where the variant asks for PEFT's preparation."""
    if not variant.prepare_for_kbit:
        return base
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _upcasts(variant: Variant) -> bool:
    """Whether PEFT may cast the adapter to float32, which it does by default."""
    return variant.adapter_dtype in (None, "float32")


def _cast(model: Any, variant: Variant) -> None:
    """Cast the adapter to the variant's type, where it names one."""
    if variant.adapter_dtype is not None:
        for parameter in own_parameters(model).values():
            parameter.data = parameter.data.to(getattr(torch, variant.adapter_dtype))


def _config(variant: Variant) -> LoraConfig:
    """PEFT's configuration of a variant."""
    assert isinstance(variant, LoraVariant)
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
