"""Replaces linear layers by bitsandbytes layers, as transformers does and with every attribute that it sets.

A layer is made from weights, which are then quantised, or without storage (`empty_layer`) for weights that are already
quantised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from kernels_check.observe.modules import Modes, without_repacking
from lorameter.studies.variant import Variant


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype with this name in a variant."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def bnb_config(variant: Variant) -> transformers.BitsAndBytesConfig | None:
    """The quantisation configuration of a variant for transformers; None for quantization "none"."""
    if variant.quantization == "none":
        return None
    if variant.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=variant.quantization,
        bnb_4bit_use_double_quant=variant.double_quant,
        bnb_4bit_compute_dtype=dtype_of(variant.compute_dtype),
    )


def quantize_linears(model: transformers.PreTrainedModel, variant: Variant, device: str) -> None:
    """Quantise a materialised model in place, layer by layer, and move it to `device`.

    The layers are the same as in transformers: every linear layer except the output head and those that the
    architecture keeps in float32. The model arrives on `device` in its quantised size; with quantization "none" it is
    only moved.
    """
    config = bnb_config(variant)
    if config is not None:
        for name in quantised_names(model):
            model.set_submodule(name, quantised(model.get_submodule(name), config, device))
    model.to(device)
    if config is not None:
        mark_quantised(model, config)


def quantised_names(model: transformers.PreTrainedModel) -> list[str]:
    """Names of the linear layers that transformers would quantise."""
    excluded = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded)
    ]


def empty_layer(module: Any, config: transformers.BitsAndBytesConfig) -> Any:
    """The bitsandbytes layer for a linear layer, with its weight on the meta device and the original bias."""
    shape = module.weight.shape
    out_features, in_features = reversed(shape) if isinstance(module, Conv1D) else shape  # GPT-2 stores (in, out)
    layer: Any
    if config.load_in_8bit:
        layer = bnb.nn.Linear8bitLt(
            in_features,
            out_features,
            bias=module.bias is not None,
            has_fp16_weights=config.llm_int8_has_fp16_weight,
            threshold=config.llm_int8_threshold,
            device="meta",
        )
    else:
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias=module.bias is not None,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            device="meta",
        )
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
    layer.source_cls = type(module)  # transformers reads it for dequantisation
    return layer


def quantised(module: Any, config: transformers.BitsAndBytesConfig, device: str) -> Any:
    """The bitsandbytes layer of a materialised linear layer, on `device`."""
    weight = module.weight.data
    if isinstance(module, Conv1D):
        weight = weight.T.contiguous()
    layer = empty_layer(module, config)
    if config.load_in_8bit:
        packed = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, **layer.weight.__dict__)
    layer.weight = packed.to(device)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return layer


def constants_of(weight: Any) -> dict[str, torch.Tensor]:
    """The constants of a quantised weight, by the names of bitsandbytes.

    A 4-bit weight must be in its stored layout (`lorameter.trial.building.quantising`).
    """
    if isinstance(weight, bnb.nn.Params4bit):
        return dict(weight.quant_state.as_dict(packed=True))
    if isinstance(weight, bnb.nn.Int8Params):
        return {"SCB": weight.SCB}
    return {}


def fill_layer(layer: Any, weight: torch.Tensor, constants: dict[str, torch.Tensor]) -> None:
    """Give an `empty_layer` an already quantised weight with its constants, without copying them."""
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            weight, constants, requires_grad=False, device=weight.device, module=layer
        )
    else:
        layer.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=constants["SCB"]
        )


def mark_quantised(model: transformers.PreTrainedModel, config: transformers.BitsAndBytesConfig) -> None:
    """Set the attributes that `from_pretrained` sets; PEFT chooses its layers and `save_pretrained` its format by
    them."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.modules_to_not_convert = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


# --- layout of 4-bit weights ------------------------------------------------------------------------------------------
# At the first forward pass in eval mode on a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights in place and
# rounds their scales to bfloat16. After that, backward passes silently lose gradients, and merging gives wrong weights
# (docs/troubleshooting.md).


def linear4bit_layers(model: Any) -> list[Any]:
    """All bitsandbytes 4-bit layers of a model."""
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def is_packed(model: Any) -> bool:
    """Whether 4-bit layers use bitsandbytes' packed CPU layout."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states if state is not None)


def unpack_4bit(model: Any) -> None:
    """Convert 4-bit layers back to their stored layout after inference on a CPU; their scales stay rounded to bfloat16.

    `state_dict()` restores the weights. Without double quantisation it leaves the scales transposed
    (`_convert_weight_packed_for_cpu_inverse` in bitsandbytes 0.50.2).
    """
    for layer in linear4bit_layers(model):
        packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        layer.state_dict()
        state = layer.weight.quant_state
        if packed and not state.nested and state.absmax.ndim == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluate between training steps: every module in eval mode, without gradients and without repacking. Modes are
    restored afterwards.

    All dropout must be off; otherwise the losses of a sweep over dropout would be biased.
    """
    modes = Modes(model)
    model.eval()
    try:
        with without_repacking(model), torch.no_grad():
            yield
    finally:
        modes.restore()
