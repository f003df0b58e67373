"""Counts the FLOPs of a training step from the modules of a model, for families without a closed form.

The rule is that of `lorameter.models.costs.flops`: two FLOPs for each weight and position in the forward pass, the same
for the gradient of the layer's input, and the same again if the weight trains. The weights are those of the model's
modules: linear layers, quantised or not, and experts, a few of which are active for each position.

A watched step shows which modules it uses, and which inputs need a gradient: text training does not use a vision tower,
or the cross-attention to an absent encoder. Without a watched step all modules count, in the order of their definition,
and every input after the first trained weight counts as having a gradient. This overestimates the first block, where
several layers have the same input; the error is small in a model with many blocks.

Attention counts by heads and their width, as for known families, and over all pairs, also for sliding-window layers.
Other operations (a scan, a convolution, the router of experts) are not counted. Modules are recognised by their
attributes instead of their class, so that this module does not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.errors import LorameterError
from lorameter.models.costs.flops import StepTokens, TrainingFlops

PREFIX = "products_"
"""Prefix of the values in a record."""
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
"""Configuration keys for the number of active experts per position."""
_HOLDERS = ("ModuleList", "ModuleDict")
"""Modules that only contain others and are never called."""


class UncountedError(LorameterError):
    """Raised if the modules of a model do not show the products of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProducts:
    """Number of weights by which each position of a step is multiplied. An expert counts with its share of the
    positions, so these are not integers."""

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
    """Products that are computed once per pass for any number of tokens, in pairs of factors: BA for DoRA's norm, and
    for experts that are stored as one tensor, to which PEFT adds BA."""
    attention: float
    """Heads times head width, summed over the attention layers; the mean width if scores and values differ."""

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


def count_products(model: Any, watched: Mapping[str, bool | None] | None = None) -> StepProducts:
    """The products of a step of this model with its current trainable parameters and active adapter.

    Args:
        model: a model of transformers or PEFT.
        watched: for each module that a step called, whether its input needs a gradient, by the names of transformers'
            model; None if that is unknown and follows from the order of the modules. None in place of the mapping if no
            step was watched.

    Raises:
        UncountedError: there is no linear layer, or the number of active experts or of attention heads is unknown.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    products = dict.fromkeys(StepProducts.__slots__, 0.0)
    head = _unwrapped(base.get_output_embeddings()) if hasattr(base, "get_output_embeddings") else None
    adapters, stacked = _adapter_parts(base), _stacked_weights(base)
    below, modules = False, dict(base.named_modules())
    for name, module in modules.items():
        if watched is not None and not _is_used(name, modules, watched):
            continue
        elements = _elements(module) * _share(name, modules, base) * adapters.get(id(module), True)
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        adapter = id(module) in adapters
        if elements and (trains or not adapter):  # an adapter that does not train belongs to another trial
            needs_gradient = None if watched is None else watched.get(name)
            products["head" if module is head else "forward"] += elements
            products["plain"] += elements * (not adapter and module is not head)
            products["inputs"] += elements * (below if needs_gradient is None else needs_gradient)
            products["weights"] += elements * _trained(module, stacked)
        below = below or trains
        products["passes"] += _products_a_pass(module)
        products["attention"] += _attention_width(name, module, modules, base)
    if not products["plain"]:
        raise UncountedError("no linear layer is among the model's modules")
    return StepProducts(**products)


def _is_used(name: str, known: Mapping[str, Any], seen: Mapping[str, object]) -> bool:
    """Whether a step has used a module: it was called, or its parent was, which may use the weights directly. For
    experts the parent is the module that selects them; an attention was used if any part of it was.
    """
    path = name.split(".")
    if "experts" in path:
        path = path[: path.index("experts")]
    elif "Attention" in type(known[name]).__name__:
        return name in seen or any(other.startswith(f"{name}.") for other in seen)
    while path and (place := ".".join(path)) not in seen:
        path.pop()
        if place != name and type(known[place]).__name__ not in _HOLDERS:
            return False
    return True


def to_values(products: StepProducts) -> dict[str, float]:
    """The products as values of a record."""
    return {f"{PREFIX}{name}": float(getattr(products, name)) for name in StepProducts.__slots__}


def from_values(values: Mapping[str, float]) -> StepProducts | None:
    """The products in the values of a record; None if it has none."""
    names = {name: values.get(f"{PREFIX}{name}") for name in StepProducts.__slots__}
    present = {name: value for name, value in names.items() if value is not None}
    return StepProducts(**present) if len(present) == len(names) else None


def _is_adapted(module: Any) -> bool:
    """Whether a module is a PEFT layer that wraps a base layer."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _adapter_parts(base: Any) -> dict[int, bool]:
    """The modules that PEFT has added, by id, and whether positions pass through them."""
    parts_of_adapters = dict[int, bool]()
    for layer in filter(_is_adapted, base.modules()):
        owners: list[Any] = [getattr(layer, part, None) for part in layer.adapter_layer_names]
        parts = [module for one in owners if hasattr(one, "modules") for module in one.modules()]
        parts_of_adapters |= {id(module): not _is_stacked(layer) for module in parts}
    return parts_of_adapters


def _elements(module: Any) -> float:
    """Weights of a linear layer, or of experts that are stored as one tensor; 0 for any other module."""
    if _is_adapted(module):
        return 0.0
    for names in (("in_features", "out_features"), ("nx", "nf")):  # torch's, and GPT-2's Conv1D
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int) and getattr(module, "weight", None) is not None:
            return float(inputs * outputs)
    parameters = module.parameters(recurse=False) if _are_experts(module) else ()
    return float(sum(one.numel() for one in parameters if one.dim() == 3))


def _are_experts(module: Any) -> bool:
    return "Expert" in type(module).__name__


def _unwrapped(module: Any) -> Any:
    """The base's own layer inside one or more PEFT layers."""
    while _is_adapted(module):
        module = module.base_layer
    return module


def _trained(module: Any, stacked: frozenset[int]) -> float:
    """Share of a layer's weights whose gradient is computed: trained weights, and weights of experts to which PEFT adds
    an update."""
    weight = getattr(module, "weight", None)
    if weight is not None:
        return float(weight.requires_grad)
    stacks = [one for one in module.parameters(recurse=False) if one.dim() == 3]
    trained = sum(one.numel() for one in stacks if one.requires_grad or id(one) in stacked)
    return float(trained / max(1, sum(one.numel() for one in stacks)))


def _stacked_weights(base: Any) -> frozenset[int]:
    """Weights of experts to which a trained adapter is added, by id."""
    layers = [layer for layer in base.modules() if _is_adapted(layer) and _is_stacked(layer)]
    training = [one for one in layers if any(down.weight.requires_grad for down in one.lora_A.values())]
    return frozenset(id(getattr(_unwrapped(one), one.parameter_name)) for one in training)


def _share(name: str, known: Mapping[str, Any], base: Any) -> float:
    """Share of the positions that pass through a module: all, or those routed to its expert."""
    path = name.split(".")
    if _are_experts(known[name]):
        experts = known[name]
    elif "experts" in path:
        experts = _unwrapped(known[".".join(path[: path.index("experts") + 1])])
    else:
        return 1.0
    stacked = [one.shape[0] for one in experts.parameters(recurse=False) if one.dim() == 3]
    count = stacked[0] if stacked else sum(part.isdigit() for part in experts._modules)
    if not count:
        return 1.0
    if (chosen := _config_value(base, _CHOSEN)) is None:
        raise UncountedError(f"the configuration does not say how many of {count} experts are chosen for a position")
    return float(min(chosen, count) / count)


def _config_value(base: Any, names: tuple[str, ...]) -> int | None:
    """The integer under the first of these keys in the configuration of the text model."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((value for name in names if type(value := getattr(text, name, None)) is int), None)


def _products_a_pass(module: Any) -> float:
    """Factors in the products BA that a PEFT layer computes as a whole, over its trained adapters. DoRA's norm has no
    gradient; an update that is added to a weight has gradients for A and B."""
    if not _is_adapted(module):
        return 0.0
    factors = 0.0
    for name, down in getattr(module, "lora_A", {}).items():
        if not down.weight.requires_grad:
            continue
        if _is_stacked(module):
            experts = max(1, down.out_features // module.r[name])
            factors += 3.0 * experts * module.r[name] * down.in_features * module.lora_B[name].out_features
        elif getattr(module, "use_dora", {}).get(name):
            factors += float(down.in_features * module.r[name] * module.lora_B[name].out_features)
    return factors


def _is_stacked(layer: Any) -> bool:
    """Whether PEFT adapts a parameter of a module instead of the module itself, and adds BA to it in each pass."""
    return hasattr(layer, "parameter_name")


def _attention_width(name: str, module: Any, known: Mapping[str, Any], base: Any) -> float:
    """Heads times width of an attention: a module of that name that contains linear layers."""
    called = type(module).__name__
    if "Attention" not in called or "Linear" in called:
        return 0.0
    if not any(_elements(_unwrapped(part)) or "Linear" in type(part).__name__ for part in module.children()):
        return 0.0
    heads = _attribute(module, ("num_heads", "num_attention_heads", "n_head")) or _config_value(
        base, ("num_attention_heads", "n_head", "n_heads")
    )
    width = _attribute(module, ("head_dim", "attention_head_size"))
    if heads is not None and width is None and (hidden := _config_value(base, ("hidden_size", "n_embd", "d_model"))):
        width = hidden // heads
    if heads is None or width is None:
        raise UncountedError(
            f"{name} is an attention module, but neither it nor the configuration gives its number of heads"
        )
    scores, values = _attribute(module, ("qk_head_dim",)) or width, _attribute(module, ("v_head_dim",)) or width
    return heads * (scores + values) / 2


def _attribute(module: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if type(value := getattr(module, name, None)) is int), None)
