"""Over how many tokens the loss of a step is, and how much each of them weighs in it.

A model of transformers averages its loss over the tokens of one forward pass, unless it is told the number of the whole
batch (``num_items_in_batch``). The mean of such means weighs a token of a short pass more than one of a long pass,
which accumulation has long done unnoticed. The gradient that reaches the cross entropy of a pass is what the program
has made of it: shared among the tokens of a mean, or whole at each of a sum, it is the weight of one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels_check.observe.backward_passes import BackwardPass, sums_of
from kernels_check.observe.cross_entropies import CrossEntropy
from kernels_check.observe.inputs import ModelCall

_EXACT = 1e-3
_NARROW = 2e-2
"""Relative difference that rounding explains, of a loss in float32 and in half precision."""
_OF_A_ROW = 1
"""Dimensions of labels that are not of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPass:
    """One forward pass that was trained on, as far as it feeds one sum of gradients."""

    tokens: int
    """Those that the loss is over."""
    positions: int
    """All of them, padding included."""
    weight: float
    """Of each of these tokens in the gradient of the step."""
    tolerance: float
    """Relative, of that weight."""
    mean: bool = True
    """Whether its loss is a mean, else a sum, which the program has divided."""
    sum: int = 0
    """Number of the sum of gradients that it feeds: one for each update, or for each evaluation of a closure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSeen:
    """The passes of a step, or why they do not tell."""

    passes: tuple[LossPass, ...] = ()
    unseen: str | None = None


def loss_of_step(calls: Sequence[ModelCall]) -> LossSeen:
    """Read the passes of a step.

    Args:
        calls: of the model, as the step made them.
    """
    trained = [call for call in calls if call.gradients]
    if not trained:
        return LossSeen(unseen="no call of the model itself with gradients was seen")
    problem = next((problem for call in trained if (problem := _problem(call)) is not None), None)
    if problem is not None:
        return LossSeen(unseen=problem)
    backwards = _backwards(trained)
    sums = sums_of(backwards)
    if isinstance(sums, str):
        return LossSeen(unseen=sums)
    passes = []
    for number in sorted(set(sums.values())):
        for call in trained:
            found = _pass(call, number, {one for one, place in sums.items() if place == number})
            if isinstance(found, str):
                return LossSeen(unseen=found)
            passes += [] if found is None else [found]
    if not any(one.weight for one in passes if one.tokens) and any(one.tokens for one in passes):
        return LossSeen(unseen="the gradient of the loss is zero for every token")
    return LossSeen(passes=tuple(passes))


def _problem(call: ModelCall) -> str | None:
    """Why a call does not tell over which tokens its loss is."""
    labels = call.arguments.get("labels")
    given = [call.arguments.get("shift_labels"), labels]
    tokens = [one for one in given if isinstance(one, Tensor) and not one.is_floating_point()]
    if not tokens:
        return "the model was given no labels of tokens: its loss is made elsewhere"
    if all(one.dim() <= _OF_A_ROW for one in tokens):
        return "the labels are of whole rows, not of tokens"
    if not call.loss_gradients and not any(part.arrivals for part in _parts(call)):
        return "nothing went back through the loss that the model returned: another was trained on, or none"
    unread = next((made.unread for made in call.losses if made.unread is not None), None)
    if unread is not None:
        return unread
    if not any(part.arrivals for part in _parts(call)):
        return (
            "the loss that the model returned holds no cross entropy that can be read, as where it is compiled, or "
            "made by a fused kernel"
        )
    return None


def _parts(call: ModelCall) -> list[CrossEntropy]:
    return [part for made in call.losses for part in made.parts]


def _backwards(calls: Sequence[ModelCall]) -> list[tuple[BackwardPass, bool]]:
    """The backward passes, and whether each gave a gradient to any token."""
    gives: dict[BackwardPass, bool] = {}
    for call in calls:
        for part in _parts(call):
            for arrival in part.arrivals:
                given = int(part.tokens) > 0 and float(arrival.gradient) != 0
                gives[arrival.during] = given or gives.get(arrival.during, False)
    return sorted(gives.items(), key=lambda item: item[0].task)


def _pass(call: ModelCall, number: int, backwards: set[BackwardPass]) -> LossPass | str | None:
    """What a call gave to one sum of gradients; None where it gave nothing."""
    arrived = [
        (part, [arrival.gradient for arrival in part.arrivals if arrival.during in backwards]) for part in _parts(call)
    ]
    arrived = [(part, gradients) for part, gradients in arrived if gradients]
    if not arrived:
        return None
    counts = [int(part.tokens) for part, _ in arrived]
    weights = [_weight(part, gradients) for part, gradients in arrived]
    narrow = any(gradient.element_size() < 4 for _, gradients in arrived for gradient in gradients)
    tolerance = _NARROW if narrow else _EXACT
    live = [weight for weight, count in zip(weights, counts, strict=True) if count]
    if not all(map(math.isfinite, live)):
        return "the gradient of the loss is not finite"
    arrivals = (one for part, _ in arrived for one in part.arrivals if one.during in backwards)
    spread = max((float(one.spread) for one in arrivals if one.spread is not None), default=0.0)
    if spread > tolerance * max(map(abs, live), default=0.0):
        return "the loss weighs each token by itself"
    if live and max(live) - min(live) > tolerance * max(map(abs, live)):
        return f"the loss of one pass is made of {len(live)} cross entropies of different weights"
    return LossPass(
        tokens=sum(counts),
        positions=_positions(call.arguments),
        weight=live[0] if live else 0.0,
        tolerance=tolerance,
        mean=any(part.mean for part, _ in arrived),
        sum=number,
    )


def _weight(part: CrossEntropy, gradients: Sequence[Tensor]) -> float:
    total = sum(float(gradient) for gradient in gradients)
    return total / max(int(part.tokens), 1) if part.mean else total


def _positions(arguments: Mapping[str, Any]) -> int:
    given = (arguments.get(name) for name in ("labels", "shift_labels"))
    return next((one.numel() for one in given if isinstance(one, Tensor)), 0)
