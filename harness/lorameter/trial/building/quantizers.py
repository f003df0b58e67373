"""How a base gets its storage format: one class for each, named by `lorameter.studies.quantization`.

A format of another package needs two methods of a `Quantizer`: `quantise` makes the layer that stores a linear layer,
and `unpack` returns its weight. The other methods then load the base unquantised, replace its linear layers, and save
and map what their parameters and buffers hold. The formats of bitsandbytes override them: transformers quantises while
it reads the files, and constants are attributes of a weight.

Linear layers are replaced by bitsandbytes layers by the function of transformers, with every attribute that
`from_pretrained` sets, because PEFT and transformers choose their code paths by these attributes.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lorameter.studies.variant import Variant


def make_quantizer(variant: Variant) -> Quantizer:
    """The implementation of a variant's format."""
    made: Quantizer = pkgutil.resolve_name(variant.format.implementation)(variant)
    return made


class Quantizer:
    """Stores the linear layers of a base in one format. `variant` has the fields that the format reads."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def quantise(self, layer: Any, device: str) -> nn.Module:
        """The layer of the format for a linear layer with weights, on `device`; "meta" for one without storage."""
        raise NotImplementedError

    def unpack(self, layer: Any) -> torch.Tensor | None:
        """The weight of a layer of the format, (outputs, inputs) in the variant's dtype; None for any other layer."""
        return None

    def names(self, model: transformers.PreTrainedModel) -> list[str]:
        """Names of the layers of an unquantised model to replace: the linear layers that transformers would."""
        excluded = unquantised_modules(model)
        return [
            name
            for name, module in model.named_modules()
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded)
        ]

    def load_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`, if transformers quantises while it loads."""
        return {}

    def convert(self, model: transformers.PreTrainedModel, device: str) -> None:
        """Replace the linear layers of a model as `from_pretrained` has loaded it."""
        for name in self.names(model):
            model.set_submodule(name, self.quantise(model.get_submodule(name), device))

    def outline(self, model: transformers.PreTrainedModel) -> None:
        """Replace the linear layers of a model without storage by layers that `fill` completes."""
        self.convert(model, "meta")

    def constants(self, weight: Any) -> dict[str, torch.Tensor]:
        """The constants of a weight that are neither parameters nor buffers, by name."""
        return {}

    def fill(self, layer: Any, weight: torch.Tensor, constants: dict[str, torch.Tensor]) -> None:
        """Give a layer a stored weight with these constants, without copying them."""
        raise NotImplementedError

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """Set the attributes of the model that `from_pretrained` sets."""

    def dequantise(self, model: Any) -> Any:
        """The model with its weights permanently in the variant's dtype."""
        for name, layer in list(model.named_modules()):
            if (weight := self.unpack(layer)) is None:
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = layer.bias
            model.set_submodule(name, linear)
        return model


class Unquantised(Quantizer):
    """Weights stay in the variant's dtype."""

    def names(self, model: transformers.PreTrainedModel) -> list[str]:
        """None."""
        return []


def unquantised_modules(model: transformers.PreTrainedModel) -> list[str]:
    """Names of the modules that transformers does not quantise."""
    names: list[str] = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return names


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


class _BitsAndBytes(Quantizer):
    """What LLM.int8 and the 4-bit formats have in common."""

    config: transformers.BitsAndBytesConfig

    def load_options(self) -> dict[str, Any]:
        """The configuration for transformers."""
        return {"quantization_config": self.config}

    def convert(self, model: transformers.PreTrainedModel, device: str) -> None:
        """Nothing is left to convert."""

    def outline(self, model: transformers.PreTrainedModel) -> None:
        """Insert empty layers."""
        replace_with_bnb_linear(model, unquantised_modules(model), self.config)

    def quantise(self, layer: Any, device: str) -> nn.Module:
        """The bitsandbytes layer of a materialised linear layer."""
        weight = layer.weight.data
        if isinstance(layer, Conv1D):  # GPT-2 stores (in, out)
            weight = weight.T.contiguous()
        made: Any = replace_with_bnb_linear(nn.Sequential(layer), None, self.config)[0]
        made.weight = self.pack(weight, made).to(device)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
        quantised: nn.Module = made
        return quantised

    def pack(self, weight: torch.Tensor, layer: Any) -> nn.Parameter:
        """The parameter that quantises a weight when it is moved to its device."""
        raise NotImplementedError

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """PEFT chooses its layers and `save_pretrained` its format by these attributes."""
        quantizer = AutoHfQuantizer.from_config(self.config, pre_quantized=False)
        quantizer.modules_to_not_convert = unquantised_modules(model)
        model.is_quantized = True
        model.quantization_method = self.config.quant_method
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)

    def dequantise(self, model: Any) -> Any:
        """By transformers, which reads the stored layout only."""
        unpack_4bit(model)
        return model.dequantize(dtype=getattr(torch, self.variant.dtype))


class EightBit(_BitsAndBytes):
    """LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant)
        self.config = transformers.BitsAndBytesConfig(load_in_8bit=True)

    def pack(self, weight: torch.Tensor, layer: Any) -> nn.Parameter:
        """A row at a time, from the host."""
        packed: nn.Parameter = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return packed

    def constants(self, weight: Any) -> dict[str, torch.Tensor]:
        """The scales of the rows."""
        return {"SCB": weight.SCB} if isinstance(weight, bnb.nn.Int8Params) else {}

    def fill(self, layer: Any, weight: torch.Tensor, constants: dict[str, torch.Tensor]) -> None:
        """Insert a quantised weight."""
        layer.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=constants["SCB"]
        )


class FourBit(_BitsAndBytes):
    """NF4 and FP4, by the name of the variant's format."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant)
        self.config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=variant.quantization,
            bnb_4bit_use_double_quant=variant.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, variant.compute_dtype),
        )

    def pack(self, weight: torch.Tensor, layer: Any) -> nn.Parameter:
        """With the settings of the empty layer."""
        packed: nn.Parameter = bnb.nn.Params4bit(weight, requires_grad=False, **layer.weight.__dict__)
        return packed

    def constants(self, weight: Any) -> dict[str, torch.Tensor]:
        """Scales and tables, by the names of bitsandbytes; the weight must be in its stored layout."""
        return dict(weight.quant_state.as_dict(packed=True)) if isinstance(weight, bnb.nn.Params4bit) else {}

    def fill(self, layer: Any, weight: torch.Tensor, constants: dict[str, torch.Tensor]) -> None:
        """Insert a quantised weight."""
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            weight, constants, requires_grad=False, device=weight.device, module=layer
        )


# --- layout of 4-bit weights ------------------------------------------------------------------------------------------
# At the first forward pass in eval mode on a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights in place and
# rounds their scales to bfloat16. After that, backward passes silently lose gradients, and merging gives wrong weights
# (docs/troubleshooting.md).


def linear4bit_layers(model: Any) -> list[Any]:
    """All bitsandbytes 4-bit layers of a model."""
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def is_packed(model: Any) -> bool:
    """Whether 4-bit layers use bitsandbytes' packed CPU layout."""
    return any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in linear4bit_layers(model))


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
