"""Counts the FLOPs of a training step from the modules of a model, and the tokens of a step.

A product of an (m, k) by a (k, n) matrix is 2 m k n FLOPs. Only matrix products count, as in torch's FlopCounterMode:
norms, activations, rotary embedding, softmax, loss and optimizer touch each element a fixed number of times.

A frozen linear layer needs 2 FLOPs per weight and position in the forward pass, and 2 in the backward pass for the
gradient of its input. The last third of the 6 N of full training (Kaplan et al. 2020, arXiv 2001.08361, section 2.1),
the weight gradient, is needed only for weights that train: LoRA training is about 4 N, plus the adapter's share. The
weights are those of the model's modules: linear layers, quantised or not, and experts, a few of which are active for
each position. A quantised layer counts like any other, since dequantisation is not a product.

A watched step shows which modules it uses, and which inputs need a gradient: text training does not use a vision tower,
or the cross-attention to an absent encoder. Without a watched step all modules count, in the order of their definition,
and every input after the first trained weight counts as having a gradient. This overestimates the first block, where
several layers have the same input; the error is small in a model with many blocks.

Attention counts by heads and their width per query-key pair, also in sliding-window layers: 2 products in the forward
pass (scores, values), and in the backward pass one for the gradient of each of its operands (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B, where all pairs of a row count). The caller gives the number of pairs (`StepTokens`): all
pairs of an operator, or only those that the mask lets through. Other operations (a scan, a convolution, the router of
experts) are not counted.

Products that a step repeats, which an ideal implementation would not need, are counted separately: those of
checkpointing, and the scores that a fused backward recomputes (Dao 2023, arXiv 2307.08691, section 3.1).

Modules are recognised by their attributes instead of their class, so that this module does not need torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.errors import LorameterError
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

PREFIX = "products_"
"""Prefix of the values in a record."""
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
"""Configuration keys for the number of active experts per position."""
_HOLDERS = ("ModuleList", "ModuleDict")
"""Modules that only contain others and are never called."""
_BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""Matches the name of a block at the beginning of a module's name ("model.layers.0")."""


class UncountedError(LorameterError):
    """Raised if the modules of a model do not show the products of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Tokens and pairs of one optimizer step, including all its micro-batches."""

    positions: int
    """Tokens: rows of every linear product."""
    pairs: int
    """Query-key pairs, for one head of one layer."""
    passes: int = 1
    """Number of forward passes; work that does not depend on tokens (DoRA's norm) runs once in each."""


def computed_tokens(variant: Variant, workload: Workload) -> StepTokens:
    """Tokens and pairs that the operators of a step compute, including padding, and every pair of a row, masked or not.

    FlopCounterMode counts them, and a kernel with an explicit mask computes them. A kernel that skips masked pairs
    (flash attention, causal or of variable length) computes fewer, down to the pairs within each record.
    """
    positions = workload.batch_size * variant.gradient_accumulation * workload.sequence_length
    pairs = positions * workload.sequence_length
    return StepTokens(positions=positions, pairs=pairs, passes=variant.gradient_accumulation)


def row_tokens(variant: Variant, workload: Workload) -> StepTokens:
    """Tokens and pairs that a step needs if each row is one causal sequence without padding: n (n + 1) / 2 pairs for n
    tokens. Packed rows need fewer pairs, since their records do not attend to each other."""
    every = computed_tokens(variant, workload)
    return dataclasses.replace(every, pairs=every.positions * (workload.sequence_length + 1) // 2)


def mean_context(workload: Workload) -> int:
    """Mean number of tokens, including itself, to which a token after the first one of a request attends.

    With p prompt tokens and n new ones, the forward passes after the first attend to p + 1 ... p + n - 1 tokens.
    """
    return workload.prompt_tokens + workload.new_tokens // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlops:
    """FLOPs of one optimizer step."""

    model: int
    """FLOPs that any implementation of the step needs: the numerator of MFU."""
    extra: int
    """FLOPs that are repeated: the forward pass of each block with checkpointing, and the scores in a fused
    backward."""

    @property
    def hardware(self) -> int:
        """All FLOPs that the device executes: the numerator of hardware utilisation."""
        return self.model + self.extra


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
    repeated: float
    """The part of `forward` that checkpointing repeats: without the last layer of each block, since torch stops a
    block's second forward pass at the last tensor that its backward pass needs."""
    passes: float
    """Products that are computed once per pass for any number of tokens, in pairs of factors: BA for DoRA's norm, and
    for experts that are stored as one tensor, to which PEFT adds BA."""
    attention: float
    """Heads times head width, summed over the attention layers; the mean width if scores and values differ."""

    def flops(self, tokens: StepTokens, *, checkpointing: bool = False, fused: bool = True) -> TrainingFlops:
        """FLOPs of one optimizer step, with checkpointing, and with an attention whose backward pass is `fused`."""
        twice, product = 2 * tokens.positions, 2 * tokens.pairs * self.attention
        model = twice * (self.forward + self.head + self.inputs + self.weights) + 2 * tokens.passes * self.passes
        again = (twice * self.repeated + 2 * product if checkpointing else 0.0) + (product if fused else 0.0)
        return TrainingFlops(model=round(model + 6 * product), extra=round(again))

    def six_n(self, tokens: StepTokens) -> int:
        """6 N for each position, without attention: the FLOPs of training all weights, for comparison only. N counts
        the head, but not the embedding (a table look-up).

        Published figures for LoRA often use it, and are 1.5 times the true count.
        """
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
    below, modules, last = False, dict(base.named_modules()), dict[str, float]()
    for name, module in modules.items():
        if watched is not None and not _is_used(name, modules, watched):
            continue
        elements = _elements(module) * _share(name, modules, base) * adapters.get(id(module), True)
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        adapter = id(module) in adapters
        if elements and (trains or not adapter):  # an adapter that does not train belongs to another trial
            needs_gradient = None if watched is None else watched.get(name)
            multiplied = elements * (2 if _multiplies_twice(name, modules) else 1)
            products["head" if module is head else "forward"] += multiplied
            products["plain"] += elements * (not adapter and module is not head)
            products["inputs"] += multiplied * (below if needs_gradient is None else needs_gradient)
            products["weights"] += elements * _trained(module, stacked)
            if block := _BLOCK.match(name):
                last[block[0]] = elements
        below = below or trains
        products["passes"] += _products_a_pass(module)
        products["attention"] += _attention_width(name, module, modules, base)
    if not products["plain"]:
        raise UncountedError("no linear layer is among the model's modules")
    products["repeated"] = products["forward"] - sum(last.values())
    return StepProducts(**products)


def _is_used(name: str, modules: Mapping[str, Any], watched: Mapping[str, object]) -> bool:
    """Whether a step has used a module: it was called, or its parent was, which may use the weights directly. For
    experts the parent is the module that selects them; an attention was used if any part of it was.
    """
    path = name.split(".")
    if "experts" in path:
        path = path[: path.index("experts")]
    elif "Attention" in type(modules[name]).__name__:
        return name in watched or any(other.startswith(f"{name}.") for other in watched)
    while path and (place := ".".join(path)) not in watched:
        path.pop()
        if place != name and type(modules[place]).__name__ not in _HOLDERS:
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


def _multiplies_twice(name: str, modules: Mapping[str, Any]) -> bool:
    """Whether PEFT multiplies by the weights of a base layer again: for DoRA with dropout, by the dropped input."""
    layer = modules[name.removesuffix(".base_layer")]
    dora = [adapter for adapter, used in getattr(layer, "use_dora", {}).items() if used]
    return name.endswith(".base_layer") and any(getattr(layer.lora_dropout[one], "p", 0.0) for one in dora)


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


def _share(name: str, modules: Mapping[str, Any], base: Any) -> float:
    """Share of the positions that pass through a module: all, or those routed to its expert."""
    path = name.split(".")
    if _are_experts(modules[name]):
        experts = modules[name]
    elif "experts" in path:
        experts = _unwrapped(modules[".".join(path[: path.index("experts") + 1])])
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


def _attention_width(name: str, module: Any, modules: Mapping[str, Any], base: Any) -> float:
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
