"""Counts the FLOPs of a training step from the modules of a text model, for families without a closed form.

The rule is that of `lorameter.models.costs.flops`: two FLOPs for each weight and position in the forward pass, the same
for the gradient of the layer's input, and the same again if the weight trains. The weights are those of the model's
linear layers, quantised or not, in the order of their definition: every input after the first trained weight counts as
having a gradient. This overestimates the first block, where several layers have the same input; the error is small in a
model with many blocks.

Attention counts by heads and their width, as for known families, and over all pairs, also for sliding-window layers.
Other operations (a scan, a convolution) are not counted. Models with experts or with several modalities are refused,
since a position passes through a part of their layers only. Modules are recognised by their attributes instead of their
class, so that this module does not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.errors import LorameterError
from lorameter.models.costs.flops import StepTokens, TrainingFlops
from lorameter.models.shapes import shape_of_config

PREFIX = "products_"
"""Prefix of the values in a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProducts:
    """Number of weights by which each position of a step is multiplied."""

    forward: float
    """Weights of the base's linear layers without the output head, and of the adapter."""
    head: float
    inputs: float
    """The part whose input has a gradient."""
    weights: float
    """The part that trains."""
    plain: float
    """Weights of the base's linear layers only, without the output head."""
    passes: float
    """Products that are computed once per pass for any number of tokens, in pairs of factors: BA for DoRA's norm."""
    attention: float
    """Heads times head width, summed over the attention layers."""

    def flops(self, tokens: StepTokens, *, checkpointing: bool = False, fused: bool = True) -> TrainingFlops:
        """FLOPs of one optimizer step.

        `extra` includes a block's whole forward pass with `checkpointing` (including its last product, which torch
        omits), and the scores that a `fused` attention backward recomputes.
        """
        twice, product = 2 * tokens.positions, 2 * tokens.pairs * self.attention
        model = twice * (self.forward + self.head + self.inputs + self.weights) + 2 * tokens.passes * self.passes
        again = (twice * self.forward + 2 * product if checkpointing else 0.0) + (product if fused else 0.0)
        return TrainingFlops(model=round(model + 6 * product), extra=round(again))

    def six_n(self, tokens: StepTokens) -> int:
        """FLOPs of training all weights, without attention, as for a known family."""
        return round(6 * (self.plain + self.head) * tokens.positions)


def count_products(model: Any) -> StepProducts:
    """The products of a step of this model, of transformers or PEFT, with its current trainable parameters and active
    adapter.

    Raises:
        LorameterError: it has experts or several modalities, or no linear layer.
        UsageError: its configuration does not describe a decoder-only model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config() is not base.config or any(map(_is_expert, base.modules())):
        raise LorameterError("products are counted for text models without experts only")
    shape = shape_of_config(base.config.to_dict(), "the model")
    head = _unwrapped(base.get_output_embeddings())
    adapters = {id(part) for layer in base.modules() if _is_adapted(layer) for part in _adapter_parts(layer)}
    products = dict.fromkeys(StepProducts.__slots__, 0.0)
    below = False
    for module in base.modules():
        elements, of_adapter = _elements(module), id(module) in adapters
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if elements and (trains or not of_adapter):  # an adapter that does not train belongs to another trial
            products["head" if module is head else "forward"] += elements
            products["plain"] += elements * (not of_adapter and module is not head)
            products["inputs"] += elements * below
            products["weights"] += elements * module.weight.requires_grad
        below = below or trains
        products["passes"] += _dora_factors(module)
        products["attention"] += shape.heads * shape.head_dim * _is_attention(module)
    if not products["plain"]:
        raise LorameterError("no linear layer is among the model's modules")
    return StepProducts(**products)


def to_values(products: StepProducts) -> dict[str, float]:
    """The products as values of a record."""
    return {f"{PREFIX}{name}": float(getattr(products, name)) for name in StepProducts.__slots__}


def from_values(values: Mapping[str, float]) -> StepProducts | None:
    """The products in the values of a record; None if it has none."""
    found = {key.removeprefix(PREFIX): value for key, value in values.items() if key.startswith(PREFIX)}
    return StepProducts(**found) if found else None


def _is_expert(module: Any) -> bool:
    return "Expert" in type(module).__name__ or hasattr(module, "experts")


def _is_adapted(module: Any) -> bool:
    """Whether a module is a PEFT layer that wraps a base layer."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _adapter_parts(layer: Any) -> list[Any]:
    """The modules that PEFT has added to a layer."""
    owners = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return [part for owner in owners if hasattr(owner, "modules") for part in owner.modules()]


def _unwrapped(module: Any) -> Any:
    """The base's own layer inside one or more PEFT layers."""
    while _is_adapted(module):
        module = module.base_layer
    return module


def _elements(module: Any) -> int:
    """Weights of a linear layer; 0 for any other module."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # torch's, and GPT-2's Conv1D
        inputs, outputs = (getattr(module, name, None) for name in names)
        if inputs and outputs and hasattr(module, "weight") and not _is_adapted(module):
            return int(inputs * outputs)
    return 0


def _dora_factors(module: Any) -> float:
    """Factors in the products BA that PEFT computes as a whole for DoRA's norm, over the trained adapters of a layer.
    The norm has no gradient."""
    if not _is_adapted(module):
        return 0.0
    return sum(
        float(down.in_features * down.out_features * module.lora_B[name].out_features)
        for name, down in getattr(module, "lora_A", {}).items()
        if down.weight.requires_grad and getattr(module, "use_dora", {}).get(name)
    )


def _is_attention(module: Any) -> bool:
    """Whether a module is an attention: it has that name, and contains linear layers."""
    called, parts = type(module).__name__, map(_unwrapped, module.children())
    return "Attention" in called and "Linear" not in called and any(map(_elements, parts))
