"""What the step gave its model: the arguments of each call, and the state that they were given in.

What a batch promises is worth nothing if the step passes something else: a mask of ones, a cache, other positions. So
the calls are kept, in such a way that each can be made once more.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.backward_passes import BackwardPasses
from kernels_check.observe.cross_entropies import LossMade, read_log_probs, read_loss
from kernels_check.observe.module_tree import Model, attribute, every_module
from kernels_check.observe.safe_hooks import HookGuard, ModuleHook

_WRAPS = ("module", "base_model", "model")
"""Attributes under which a wrapper holds what it wraps: DistributedDataParallel, PEFT, models with a head."""
_POSITIONAL = ("input_ids", "attention_mask", "position_ids")
_NO_TOKENS = ("labels", "token_type_ids", "seq_idx", "sequence_ids", "segment_ids", "document_ids")
_COPIED_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """One call of the model, outside which no other call of it was under way."""

    module: nn.Module
    """The one that was called, which lies inside the model where a step goes round its wrapper."""
    arguments: Mapping[str, Any]
    """By name; token tensors as they were then, since their memory may be used again."""
    training: bool = True
    gradients: bool = True
    """Whether autograd recorded it."""
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """Kinds of devices under autocast, each with its dtype."""
    inside: list[ModelCall] = field(default_factory=list)
    """Calls that it made of what the module wraps."""
    loss_gradients: list[Tensor] = field(default_factory=list)
    """What reached the loss that it returned, in each backward pass; of a call outside of all others."""
    losses: list[LossMade] = field(default_factory=list)
    """How that loss was made; none where it has no gradient."""
    number: int | None = None
    """Of the call in the log of all calls, where there is one."""

    def told(self, tells: Callable[[Mapping[str, Any]], bool]) -> list[ModelCall]:
        """This call if its arguments tell something, else those inside that do: wrappers have names of their own."""
        return [self] if tells(self.arguments) else [one for call in self.inside for one in call.told(tells)]


class InputLog:
    """Hooks that keep the calls of a model.

    Args:
        shield: what hooks are wrapped in.
    """

    def __init__(self, shield: HookGuard) -> None:
        self.calls: list[ModelCall] = []
        self._shield = shield
        self._hooks: ExitStack | None = None
        self.backwards: BackwardPasses | None = None
        """What went back from these calls; None before any."""
        self._open: list[ModelCall] = []
        self._current: Callable[[], int | None] = lambda: None

    def attach(self, model: nn.Module, hooks: ExitStack, current: Callable[[], int | None] = lambda: None) -> None:
        """Forget earlier calls and keep those to come, until ``hooks`` is closed.

        Args:
            model: whose calls are kept.
            hooks: that take the hooks off.
            current: gives the number of the call that has just begun in the log of all calls.
        """
        self._current = current
        self.calls.clear()
        self._open.clear()
        self._hooks = hooks
        self.backwards = BackwardPasses(model)
        for module in _reachable(model):
            begun, ended = (ModuleHook(module, self._shield(hook)) for hook in (self._begin, self._end))
            hooks.push(module.register_forward_pre_hook(begun, with_kwargs=True))
            hooks.push(module.register_forward_hook(ended, always_call=True))

    def clear(self) -> None:
        """Drop all calls."""
        self.calls.clear()
        self.backwards = self._hooks = None
        self._current = lambda: None

    def drop(self, failed: Set[int]) -> None:
        """Drop the calls of these numbers, which came to nothing."""
        self.calls[:] = [_without(call, failed) for call in self.calls if call.number not in failed]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = replace(_describe(module, args, kwargs), number=self._current())
        if torch._C._current_graph_task_id() == -1:  # in a backward pass it is a recomputation
            (self._open[-1].inside if self._open else self.calls).append(call)
        self._open.append(call)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open:  # none if the hook before it failed
            return
        call = self._open.pop()
        hooks, backwards = self._hooks, self.backwards
        if self._open or hooks is None or backwards is None:
            return
        loss = _loss(output)
        if loss is not None and loss.requires_grad:
            hooks.push(loss.register_hook(self._shield(partial(_keep, call))))
            call.losses.append(read_loss(loss, backwards, hooks, self._shield))
        call.losses.append(read_log_probs(output, backwards, hooks, self._shield))


def _without(call: ModelCall, failed: Set[int]) -> ModelCall:
    call.inside[:] = [_without(one, failed) for one in call.inside if one.number not in failed]
    return call


def training_calls(calls: Sequence[ModelCall]) -> list[ModelCall]:
    """Those that were trained on: an evaluation or a reference inside the step needs no gradients."""
    return [call for call in calls if call.gradients] or list(calls)


def names_tokens(arguments: Mapping[str, Any]) -> bool:
    """Whether the tokens are called what transformers calls them."""
    return isinstance(arguments.get("input_ids"), Tensor) or isinstance(arguments.get("inputs_embeds"), Tensor)


def find_tokens(arguments: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Name and value of the argument with the tokens, [rows, tokens], or embeddings, [rows, tokens, features]."""
    for name, dimensions in (("input_ids", 2), ("inputs_embeds", 3)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == dimensions:
            return name, value
    for name, value in arguments.items():  # a model written by hand calls them as it likes
        numbers = isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.long, torch.int32)
        if numbers and name not in (*_NO_TOKENS, *_POSITIONAL):
            return name, value
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what synchronises the processes around it, whose own state a call would move."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    return module


def _reachable(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what its wrappers hold, as far as no hook would be compiled in."""
    seen: set[int] = set()
    module: Any = model
    while isinstance(module, nn.Module) and id(module) not in seen:
        if module._compiled_call_impl is not None:
            return
        seen.add(id(module))
        yield module
        if isinstance(module, torch._dynamo.OptimizedModule) or hasattr(module.forward, "_torchdynamo_orig_callable"):
            return
        held = (getattr(module, name, None) for name in _WRAPS)
        module = next((one for one in held if isinstance(one, nn.Module) and id(one) not in seen), None)


def _describe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    names = _positional_names(module) if args else ()
    arguments = dict(zip(names, args, strict=False)) | kwargs
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return ModelCall(
        module=module,
        arguments={name: _kept(value) for name, value in arguments.items()},
        training=module.training,
        gradients=torch.is_grad_enabled(),
        autocast=tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds),
    )


def _positional_names(module: nn.Module) -> Sequence[str]:
    """What the positional arguments are called, by the first that does not merely pass them on."""
    for one in _reachable(module):
        with suppress(TypeError, ValueError):
            parameters = inspect.signature(one.forward).parameters.values()
            if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return _POSITIONAL


def _loss(output: Any) -> Tensor | None:
    """The loss that a model returned; models that return tuples put it first."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _keep(call: ModelCall, gradient: Tensor) -> None:
    call.loss_gradients.append(gradient.detach())


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        small = value.dim() <= 2 and value.numel() <= _COPIED_ELEMENTS and not value.requires_grad
        return value.detach().clone() if small else value
    if hasattr(value, "get_seq_length"):  # a cache, which the call is about to fill
        with suppress(Exception):
            return copy.deepcopy(value)
    return value


def special_tokens(
    configs: Iterable[Any], kinds: tuple[str, ...] = ("",), *, but: tuple[str, ...] = ()
) -> frozenset[int]:
    """Ids that configurations name, of some kinds (``pad``, ``eos``) or of all but some."""
    found: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")) and name.startswith(kinds) and not name.startswith(but):
                values = value if isinstance(value, list | tuple) else [value]
                found.update(one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0)
    return frozenset(found)


def configurations(model: Model) -> Iterator[Any]:
    """Of the model, of what it wraps, and of their parts, such as the text of a vision model."""
    seen: set[int] = set()
    modules = list(every_module(model))
    waiting = [attribute(module, name) for name in ("config", "generation_config") for module in modules]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += [one for name, one in vars(config).items() if name.endswith("_config")]
