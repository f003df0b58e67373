"""Reads the inputs of a step's model calls, the number of tokens in the loss, and the weight of each token.

The name of a loss function does not prove what it computes. The cross-entropy operator that autograd recorded has saved
its targets, and the gradient that reaches it contains every later scaling of the loss, and so the weight of the tokens.
A mean of means gives a token of a short pass more weight than a token of a long pass. Backward passes that accumulate
for one update are recognised by the gradients that are present when a pass begins, and by whether an update took place
between two passes.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.modules import ModelTree, backward_task, largest_magnitude

_WRAPS = ("module", "base_model", "model")
"""Attributes under which a wrapper holds its wrapped module: DistributedDataParallel, PEFT, models with a head."""
_POSITIONAL = ("input_ids", "attention_mask", "position_ids")
_NO_TOKENS = ("labels", "token_type_ids", "seq_idx", "sequence_ids", "segment_ids", "document_ids")
_COPIED_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelCall:
    """One outermost call of the model."""

    module: nn.Module
    """The module that was called; it is inside the model if a step bypasses the model's wrapper."""
    arguments: Mapping[str, Any]
    """Arguments by name; token tensors are copied, since their memory may be reused."""
    training: bool = True
    gradients: bool = True
    """Whether autograd recorded the call."""
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """Device types under autocast, each with its dtype."""
    inside: list[ModelCall] = field(default_factory=list)
    """The calls that it made of wrapped modules."""
    loss_gradients: list[Tensor] = field(default_factory=list)
    """The gradients that reached the returned loss, one for each backward pass; only for an outermost call."""
    parts: list[CrossEntropy] = field(default_factory=list)
    """The cross entropies in the loss; other terms, such as a load-balancing loss of experts, are left out."""
    unread: list[str] = field(default_factory=list)
    """Why some cross entropies could not be read."""
    number: int | None = None
    """Number of the call in the log of all calls, if there is one."""

    def without(self, failed: Set[int]) -> ModelCall:
        """A copy of the call without failed inner calls."""
        return replace(self, inside=[one.without(failed) for one in self.inside if one.number not in failed])

    def matching(self, matches: Callable[[Mapping[str, Any]], bool]) -> list[ModelCall]:
        """This call if its arguments match, else the inner calls that match: wrappers may rename arguments."""
        return [self] if matches(self.arguments) else [one for call in self.inside for one in call.matching(matches)]


def training_calls(calls: Sequence[ModelCall]) -> list[ModelCall]:
    """The calls that train: an evaluation or a reference inside the step needs no gradients."""
    return [call for call in calls if call.gradients] or list(calls)


def names_tokens(arguments: Mapping[str, Any]) -> bool:
    """Whether the tokens have the argument names of transformers."""
    return isinstance(arguments.get("input_ids"), Tensor) or isinstance(arguments.get("inputs_embeds"), Tensor)


def find_tokens(arguments: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Name and value of the argument with the tokens, [rows, tokens], or embeddings, [rows, tokens, features]."""
    for name, dimensions in (("input_ids", 2), ("inputs_embeds", 3)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == dimensions:
            return name, value
    others = (pair for pair in arguments.items() if pair[0] not in (*_NO_TOKENS, *_POSITIONAL))
    for name, value in others:  # a hand-written model may use any argument name
        if isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.long, torch.int32):
            return name, value
    return None


def entry_modules(model: nn.Module) -> list[nn.Module]:
    """The model and the modules that its wrappers hold."""
    found = [model]
    for module in found:  # which grows
        wrapped = (getattr(module, name, None) for name in _WRAPS)
        found += [one for one in wrapped if isinstance(one, nn.Module) and one not in found][:1]
    return found


def describe_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> ModelCall:
    """The record of a call of one of ``entry_modules``, made when the call begins."""
    arguments = dict(zip(_positional_names(module) if args else (), args, strict=False)) | kwargs
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return ModelCall(
        module=module,
        arguments={name: _kept(value) for name, value in arguments.items()},
        training=module.training,
        gradients=torch.is_grad_enabled(),
        autocast=tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds),
        number=number,
    )


def _positional_names(module: nn.Module) -> Sequence[str]:
    """Names of the positional arguments, from the first module that does not merely pass them on."""
    for one in entry_modules(module):
        with suppress(TypeError, ValueError):
            parameters = inspect.signature(one.forward).parameters.values()
            if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return _POSITIONAL


def find_loss(output: Any) -> Tensor | None:
    """The loss that a model returned; models that return tuples put it first."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        small = value.dim() <= 2 and value.numel() <= _COPIED_ELEMENTS and not value.requires_grad
        return value.detach().clone() if small else value
    if hasattr(value, "get_seq_length"):  # a cache, which the call will fill
        with suppress(Exception):
            return copy.deepcopy(value)
    return value


def special_tokens(
    configs: Iterable[Any], kinds: tuple[str, ...] = ("",), *, but: tuple[str, ...] = ()
) -> frozenset[int]:
    """Ids of special tokens in configurations, of some kinds (``pad``, ``eos``) or of all kinds except some."""
    found = [
        value if isinstance(value, list | tuple) else [value]
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and name.startswith(kinds) and not name.startswith(but)
    ]
    return frozenset(one for values in found for one in values if type(one) is int and one >= 0)


def configurations(model: nn.Module) -> Iterator[Any]:
    """Configurations of the model, of wrapped modules, and of their parts, such as the text part of a vision model."""
    seen: set[int] = set()
    waiting = [vars(one).get(name) for one in model.modules() for name in ("config", "generation_config")]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += [one for name, one in vars(config).items() if name.endswith("_config")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardPass:
    """One run of the autograd engine."""

    task: int
    """Its number in the engine."""
    after_update: bool = False
    """Whether an optimizer of the model's parameters has stepped since the previous pass."""
    in_update: bool = False
    """Whether it runs during an optimizer's step, as in a closure."""
    initial_sizes: Sequence[Tensor] = ()
    """Largest magnitude of each gradient that was present when the pass began, on its device."""

    @property
    def from_zero(self) -> bool:
        """Whether the pass began with no gradients, or only zeros."""
        return not any(float(size) != 0 for size in self.initial_sizes)


class BackwardPasses:
    """Records the backward passes of a step that write gradients of a model."""

    def __init__(self, tree: ModelTree) -> None:
        self._trained = [value for _, value in tree.parameters if value.requires_grad]
        self._last: BackwardPass | None = None
        self._updated, self._updating = False, 0

    def current(self) -> BackwardPass:
        """The current pass; must be called before the pass writes any gradient."""
        task = backward_task()
        if self._last is None or self._last.task != task:
            sizes = [largest_magnitude(value.grad) for value in self._trained if value.grad is not None]
            self._last = BackwardPass(
                task=task,
                after_update=self._updated,
                in_update=self._updating > 0,
                initial_sizes=[size for size in sizes if size is not None],
            )
            self._updated = False
        return self._last

    def update_begins(self) -> None:
        """Record that an optimizer of the model is about to step."""
        self._updating += 1

    def update_ends(self) -> None:
        """Record that an optimizer of the model has stepped."""
        self._updating, self._updated = max(self._updating - 1, 0), True


class _UnreadError(RuntimeError):
    """Raised if the tokens of a loss cannot be determined; the message says why."""


def _group_passes(passes: Mapping[BackwardPass, bool]) -> dict[BackwardPass, int]:
    """Find out which passes accumulate: the number of the sum that each pass belongs to.

    Args:
        passes: passes in the order in which they began, and whether each produced a gradient.

    Raises:
        _UnreadError: the sums cannot be determined.
    """
    sums: dict[BackwardPass, int] = {}
    number, has_gradient = 0, False
    for backward, gives in passes.items():
        if has_gradient and backward.from_zero and not backward.after_update and not backward.in_update:
            raise _UnreadError(
                "the gradients of an earlier pass were removed before the next, without an update between them: it is "
                "unknown which passes contribute to the update"
            )
        if has_gradient and backward.after_update and not backward.from_zero:
            raise _UnreadError("gradients that an update had used were not cleared before the next pass added to them")
        number += has_gradient and backward.from_zero
        sums[backward] = number
        has_gradient = gives or (has_gradient and not backward.from_zero)
    return sums


_OPERATORS = ("NllLossBackward0", "NllLoss2DBackward0")
_MEAN, _SUM = 1, 2
"""Reduction codes of the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientArrival:
    """A gradient that reached a cross-entropy operator."""

    gradient: Tensor
    """A scalar tensor."""
    during: BackwardPass
    spread: Tensor | None = None
    """Relative difference among the tokens; None if all tokens share one value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """One cross-entropy operator."""

    tokens: Tensor
    """Number of its targets, a scalar tensor; it stays on its device to avoid a synchronisation."""
    mean: bool
    """Whether it computes the mean, else the sum."""
    arrivals: list[GradientArrival] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReader:
    """Finds the cross entropies of a step's losses, and records the gradients that reach each until the hooks are
    removed."""

    passes: BackwardPasses
    """The log of backward passes."""
    hooks: ExitStack
    guard: Callable[[Any], Any]
    """Wraps each hook."""

    def read(self, call: ModelCall, output: Any) -> None:
        """Read the output of a call of the model."""
        loss = find_loss(output)
        if loss is not None and loss.requires_grad:
            self.hooks.push(loss.register_hook(self.guard(lambda one: call.loss_gradients.append(one.detach()))))
            try:
                for operator in _operators(loss.grad_fn):
                    part = _read(operator)
                    call.parts.append(part)
                    self.hooks.push(operator.register_prehook(self.guard(partial(self._arrive, part))))
            except Exception as error:  # an exception here would end the step
                problem = f"the loss could not be read: {type(error).__name__}: {error}"
                call.unread.append(str(error) if isinstance(error, _UnreadError) else problem)
        self._read_log_probs(call, output)

    def _read_log_probs(self, call: ModelCall, output: Any) -> None:
        """Read per-token log-probabilities that a model returns so that its caller can compute a loss.

        TRL's trainers do so from version 1.16 on: ``log_probs`` and ``label_mask``, both of [rows, tokens - 1].
        """
        log_probs, mask = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        if not (isinstance(log_probs, Tensor) and isinstance(mask, Tensor)) or not log_probs.requires_grad:
            return
        part = CrossEntropy(tokens=mask.sum(), mean=False)

        def keep(gradient: Tensor) -> None:
            weights = -gradient.detach()
            most = weights.masked_fill(~mask, -torch.inf).amax()
            least = weights.masked_fill(~mask, torch.inf).amin()
            part.arrivals.append(GradientArrival(gradient=most, during=self.passes.current(), spread=most - least))

        call.parts.append(part)
        self.hooks.push(log_probs.register_hook(self.guard(keep)))

    def _arrive(self, part: CrossEntropy, gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if gradient is not None:
            part.arrivals.append(GradientArrival(gradient=gradient.detach(), during=self.passes.current()))


def _operators(root: Any) -> Iterator[Any]:
    """Cross entropies that the loss depends on through scalars only: the graph behind them belongs to the model."""
    found = [root] if root is not None else []
    for node in found:  # which grows
        if node.name() in _OPERATORS:
            yield node
        else:
            following = [(one, place) for one, place in node.next_functions if one is not None and one not in found]
            scalars = (one for one, place in following if all(size == 1 for size in one._input_metadata[place].shape))
            found += dict.fromkeys(scalars)


def _read(operator: Any) -> CrossEntropy:
    if operator._saved_reduction not in (_MEAN, _SUM):
        raise _UnreadError("the loss weights tokens individually")
    if operator._raw_saved_weight.data is not None:
        raise _UnreadError("the loss weights targets by their class")
    target = operator._raw_saved_target
    if target.unpack_hook is not None:  # unpacking would recompute, or fetch, the tensors that the backward pass needs
        raise _UnreadError(
            "the labels of the loss are not in memory until the backward pass, as with a checkpoint or offloading"
        )
    ignored = (operator._saved_ignore_index + 2**63) % 2**64 - 2**63  # saved as an unsigned integer
    with torch.no_grad():
        tokens = (target.data != ignored).sum()
    return CrossEntropy(tokens=tokens, mean=operator._saved_reduction == _MEAN)


_EXACT = 1e-3
_NARROW = 2e-2
"""Relative difference that rounding explains, between a loss in float32 and in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPass:
    """One forward pass that trains, as far as it contributes to one sum of gradients."""

    tokens: int
    """Tokens in the loss."""
    positions: int
    """All tokens, including padding."""
    weight: float
    """Weight of each of these tokens in the gradient of the step."""
    tolerance: float
    """Relative tolerance of the weight."""
    mean: bool = True
    """Whether its loss is a mean; otherwise it is a sum that the program has divided."""
    sum: int = 0
    """Number of the gradient sum to which it contributes: one for each update, or for each evaluation of a closure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecord:
    """The passes of a step, or why they could not be read."""

    passes: tuple[LossPass, ...] = ()
    unseen: str | None = None


def loss_of_step(calls: Sequence[ModelCall]) -> LossRecord:
    """Read the passes of a step from its calls of the model."""
    try:
        return LossRecord(passes=tuple(_passes([call for call in calls if call.gradients])))
    except _UnreadError as error:
        return LossRecord(unseen=str(error))


def _passes(trained: Sequence[ModelCall]) -> list[LossPass]:
    if not trained:
        raise _UnreadError("no call of the model itself with gradients was seen")
    for call in trained:
        _refuse_unread(call)
    gives: dict[BackwardPass, bool] = {}
    for part in (part for call in trained for part in call.parts):
        for arrival in part.arrivals:
            is_nonzero = int(part.tokens) > 0 and float(arrival.gradient) != 0
            gives[arrival.during] = is_nonzero or gives.get(arrival.during, False)
    sums = _group_passes({one: gives[one] for one in sorted(gives, key=lambda one: one.task)})
    numbers = sorted(set(sums.values()))
    found = [_pass(call, number, sums) for number in numbers for call in trained]
    passes = [one for one in found if one is not None]
    if not any(one.weight for one in passes if one.tokens) and any(one.tokens for one in passes):
        raise _UnreadError("the gradient of the loss is zero for every token")
    return passes


def _refuse_unread(call: ModelCall) -> None:
    """Raise _UnreadError if it is unknown which tokens are in the loss of a call."""
    labels = [call.arguments.get(name) for name in ("shift_labels", "labels")]
    tokens = [one for one in labels if isinstance(one, Tensor) and not one.is_floating_point()]
    if not tokens:
        raise _UnreadError("the model received no token labels: its loss is computed elsewhere")
    if all(one.dim() <= 1 for one in tokens):
        raise _UnreadError("the labels are of whole rows, not of tokens")
    arrived = any(part.arrivals for part in call.parts)
    if not call.loss_gradients and not arrived:
        raise _UnreadError(
            "no gradient flowed through the loss that the model returned: the step trains on another loss, or on none"
        )
    if call.unread or not arrived:
        unreadable = (
            "the loss that the model returned has no readable cross entropy: it may be compiled, or "
            "computed by a fused kernel"
        )
        raise _UnreadError(next(iter(call.unread), unreadable))


def _pass(call: ModelCall, number: int, sums: Mapping[BackwardPass, int]) -> LossPass | None:
    """The contribution of a call to one sum of gradients; None if it has none."""
    found = [(part, [one for one in part.arrivals if sums[one.during] == number]) for part in call.parts]
    arrived = [(part, int(part.tokens), arrivals) for part, arrivals in found if arrivals]
    if not arrived:
        return None
    totals = [(part, tokens, sum(float(one.gradient) for one in own)) for part, tokens, own in arrived if tokens]
    live = [total / tokens if part.mean else total for part, tokens, total in totals]
    every = [one for _, _, arrivals in arrived for one in arrivals]
    labels = (call.arguments.get(name) for name in ("labels", "shift_labels"))
    tolerance = _NARROW if any(one.gradient.element_size() < 4 for one in every) else _EXACT
    largest_weight = max(map(abs, live), default=0.0)
    if not all(map(math.isfinite, live)):
        raise _UnreadError("the gradient of the loss is not finite")
    if any(one.spread is not None and float(one.spread) > tolerance * largest_weight for one in every):
        raise _UnreadError("the loss weights tokens individually")
    if live and max(live) - min(live) > tolerance * largest_weight:
        raise _UnreadError(f"the loss of one pass consists of {len(live)} cross entropies with different weights")
    return LossPass(
        tokens=sum(tokens for _, tokens, _ in arrived),
        positions=next((one.numel() for one in labels if isinstance(one, Tensor)), 0),
        weight=live[0] if live else 0.0,
        tolerance=tolerance,
        mean=any(part.mean for part, _, _ in arrived),
        sum=number,
    )
