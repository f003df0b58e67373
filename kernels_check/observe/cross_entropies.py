"""The cross entropies that a loss is made of, read off what autograd has recorded of them.

The name of a loss function says nothing of what it does: whether it shifts the labels, what a prompt in front of them
changes, whether it takes the number of tokens that it is told. The recorded operator has kept the very targets that it
was given, and the gradient that reaches it is what everything after it, division by whatever number included, makes of
the weight of its tokens. So neither is asked of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels_check.observe.backward_passes import BackwardPass, BackwardPasses

_OPERATORS = ("NllLossBackward0", "NllLoss2DBackward0")
_MEAN, _SUM = 1, 2
"""How the operator spells them."""
_SIGN, _WRAP = 2**63, 2**64
"""Of the ignored target, which is kept as a number without a sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A gradient that reached a cross entropy."""

    gradient: Tensor
    """Of no dimension."""
    during: BackwardPass
    spread: Tensor | None = None
    """By how much it differs among the tokens; None where it is one for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """One operator."""

    tokens: Tensor
    """How many targets it is over, of no dimension; left on its device, so that nothing waits for it."""
    mean: bool
    """Whether it is their mean, else their sum."""
    arrivals: list[Arrival] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMade:
    """How a loss was made."""

    parts: tuple[CrossEntropy, ...] = ()
    """What is not a cross entropy, such as a term that balances experts, is left out."""
    unread: str | None = None
    """Why they are not known."""


def read_loss(loss: Tensor, passes: BackwardPasses, hooks: ExitStack, shield: Callable[[Any], Any]) -> LossMade:
    """Find the cross entropies in a loss, and keep what reaches them until ``hooks`` is closed.

    Args:
        loss: of one element, with its graph.
        passes: that are under way when a gradient arrives.
        hooks: takes the hooks.
        shield: what hooks are wrapped in.
    """
    try:
        parts = []
        for operator in _operators(loss.grad_fn):
            part = _read(operator)
            if isinstance(part, str):
                return LossMade(unread=part)
            parts.append(part)
            hooks.push(operator.register_prehook(shield(_keeping(part, passes))))
    except Exception as error:  # an exception here would be the step's
        return LossMade(unread=f"the loss could not be read: {type(error).__name__}: {error}")
    return LossMade(parts=tuple(parts))


def read_log_probs(output: Any, passes: BackwardPasses, hooks: ExitStack, shield: Callable[[Any], Any]) -> LossMade:
    """Find what reaches the log-probabilities of single tokens that a model returns for its caller to make a loss of.

    TRL's trainers do so from version 1.16 on: ``log_probs`` and ``label_mask``, both of [rows, tokens - 1].

    Args:
        output: of the model.
        passes: as for ``read_loss``.
        hooks: likewise.
        shield: likewise.
    """
    log_probs, mask = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
    if not (isinstance(log_probs, Tensor) and isinstance(mask, Tensor)) or not log_probs.requires_grad:
        return LossMade()
    with torch.no_grad():
        part = CrossEntropy(tokens=mask.sum(), mean=False)

    def keep(gradient: Tensor) -> None:
        with torch.no_grad():
            weights = -gradient
            most = weights.masked_fill(~mask, -torch.inf).amax()
            least = weights.masked_fill(~mask, torch.inf).amin()
            part.arrivals.append(Arrival(gradient=most, during=passes.current(), spread=most - least))

    hooks.push(log_probs.register_hook(shield(keep)))
    return LossMade(parts=(part,))


def _operators(root: Any) -> Iterator[Any]:
    """Those that the loss depends on through numbers alone: what is behind a cross entropy belongs to the model."""
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _OPERATORS:
            yield node
        else:
            waiting += [one for one, place in node.next_functions if one is not None and _is_number(one, place)]


def _is_number(node: Any, place: int) -> bool:
    return all(size == 1 for size in node._input_metadata[place].shape)


def _read(operator: Any) -> CrossEntropy | str:
    if operator._saved_reduction not in (_MEAN, _SUM):
        return "the loss weighs each token by itself"
    if operator._raw_saved_weight.data is not None:
        return "the loss weighs each target by its class"
    kept = operator._raw_saved_target
    if kept.unpack_hook is not None:  # to ask for it would compute again, or fetch, what the backward pass asks for
        return "what the loss is over was put away until the backward pass, as by a checkpoint or by offloading"
    ignored = (operator._saved_ignore_index + _SIGN) % _WRAP - _SIGN
    with torch.no_grad():
        tokens = (kept.data != ignored).sum()
    return CrossEntropy(tokens=tokens, mean=operator._saved_reduction == _MEAN)


def _keeping(part: CrossEntropy, passes: BackwardPasses) -> Callable[[Any], None]:
    def keep(gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if gradient is not None:
            part.arrivals.append(Arrival(gradient=gradient.detach(), during=passes.current()))

    return keep
