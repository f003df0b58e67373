"""Over how many tokens the loss of a step is, and how much each of them weighs in it.

A model of transformers averages its loss over the tokens of one forward pass, unless it is told the number of the whole
batch (``num_items_in_batch``). The mean of such means weighs a token of a short pass more than one of a long pass,
which accumulation has long done unnoticed. What a program multiplies the loss by before it goes back is seen as the
gradient that reaches the loss: divided by what the loss was divided by, it is the weight of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kernels_check.observation.inputs import ModelCall, training_calls
from kernels_check.observation.module_tree import every_module

_IGNORED = -100
_SHIFTED = ("ForCausalLMLoss",)
_IN_PLACE = ("ForMaskedLMLoss", "ForTokenClassification")
"""Losses of transformers by the name of their function: those of the next token, and those of the token itself."""
_EXACT = 1e-3
_NARROW = 2e-2
"""Relative difference that rounding explains, of a loss in float32 and in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPass:
    """One forward pass that was trained on."""

    tokens: int
    """Those that the loss is over."""
    positions: int
    """All of them, padding included."""
    weight: float
    """Of each of these tokens in the gradient of the step."""
    tolerance: float
    """Relative, of that weight."""
    told: bool
    """Whether the model was told the number of tokens of the whole batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSeen:
    """The passes of a step, or why they do not tell."""

    passes: tuple[LossPass, ...] = ()
    unseen: str | None = None


def loss_of_step(model: nn.Module, calls: Sequence[ModelCall]) -> LossSeen:
    """Read the passes of a step.

    Args:
        model: that was called.
        calls: of it, as the step made them.
    """
    trained = [call for call in training_calls(calls) if call.gradients]
    if not trained:
        return LossSeen(unseen="no call of the model itself with gradients was seen")
    passes = []
    for call in trained:
        found = _pass(model, call)
        if isinstance(found, str):
            return LossSeen(unseen=found)
        passes.append(found)
    return LossSeen(passes=tuple(passes))


def _pass(model: nn.Module, call: ModelCall) -> LossPass | str:
    labels = _labels(model, call.arguments)
    if isinstance(labels, str):
        return labels
    if not call.loss_gradients:
        return "nothing went back through the loss that the model returned: another was trained on, or none"
    counted = int((labels != _IGNORED).sum())
    whole = call.arguments.get("num_items_in_batch")
    divisor = float(whole) if whole is not None else float(counted)
    gradients = [gradient.double().sum() for gradient in call.loss_gradients]
    total = float(sum(gradients[1:], gradients[0]))
    narrow = any(gradient.element_size() < 4 for gradient in call.loss_gradients)
    return LossPass(
        tokens=counted,
        positions=_positions(call.arguments, labels),
        weight=total / divisor if divisor else 0.0,
        tolerance=_NARROW if narrow else _EXACT,
        told=whole is not None,
    )


def _labels(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | str:
    """The labels that count, after the shift; or why they are not known."""
    shifted = arguments.get("shift_labels")
    if isinstance(shifted, Tensor):
        return shifted
    labels = arguments.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return "the model was given no labels of tokens: its loss is made elsewhere"
    name = _loss_name(model)
    if name in _SHIFTED:
        return labels[..., 1:]
    if name in _IN_PLACE:
        return labels
    return f"whether the loss shifts the labels is not known of {name or 'a model that names no loss function'}"


def _loss_name(model: nn.Module) -> str | None:
    for module in every_module(model):
        if hasattr(type(module), "loss_function"):
            return getattr(module.loss_function, "__name__", None)
    return None


def _positions(arguments: Mapping[str, Any], labels: Tensor) -> int:
    given = arguments.get("labels")
    return given.numel() if isinstance(given, Tensor) else labels.numel()
