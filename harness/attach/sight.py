"""What can be seen of a step from its model, where no Trainer says it: batches, passes, the loss, the gradients' norm.

The outermost module is hooked, and nothing inside it: hooks of inner modules would be traced by torch.compile and
called a thousand times a step. A backward pass is seen where it begins, in `torch.autograd.backward`, through which a
tensor's own `backward` goes, and the norm of the gradients where they are clipped by it, in
`torch.nn.utils.clip_grad_norm_`; both are as they were once the training has ended.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from harness.attach.steps import Steps


class Sight:
    """Looks at one model's passes for one training. Takes nothing from the passes and gives nothing to them."""

    def __init__(self, model: torch.nn.Module | None, steps: Steps, *, batches: bool) -> None:
        """It looks from here on.

        Args:
            model: the outermost module; None sees backward passes only.
            steps: told of what is seen.
            batches: whether batches are counted here, and nobody else tells of them.
        """
        self._steps = steps
        self._batches = batches
        self._given: list[weakref.ref[torch.Tensor]] = []
        """What the model was given in this step, by its first tensor, which nobody keeps for that."""
        self._losses: list[torch.Tensor] = []
        self._roots: list[torch.Tensor] = []
        self._scaled = model is not None and _has_scaler()
        self._handles: list[Any] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        """Functions of torch with where they lie: the module, the name, what was there, and ours."""
        if model is not None and _can_hook(model):
            self._names = _parameter_names(model)
            self._handles = [
                model.register_forward_pre_hook(lambda *told: steps.run(self._enter, *told), with_kwargs=True),
                model.register_forward_hook(lambda *told: steps.run(self._leave, *told)),
            ]
        self._replace(torch.autograd, "backward", self._backward)
        self._replace(torch.nn.utils, "clip_grad_norm_", self._clip)

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._looks(module):
            return
        if self._batches:
            fields = dict(zip(self._names, args, strict=False)) | kwargs
            self._count(fields if {"input_ids", "inputs_embeds"} & set(fields) else args or fields)
        self._steps.during["forward"].begin()

    def _count(self, batch: Any) -> None:
        """Each batch once a step, however often the model is given it: that is no more data."""
        values = list(batch.values() if isinstance(batch, Mapping) else batch)
        first = next((value for value in values if isinstance(value, torch.Tensor)), None)
        if first is None or not any(first is one() for one in self._given):
            self._given += [] if first is None else [weakref.ref(first)]
            self._steps.batch(batch)

    def _leave(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._looks(module):
            return
        self._steps.during["forward"].end()
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())

    def _looks(self, module: torch.nn.Module) -> bool:
        return module.training and torch.is_grad_enabled() and self._steps.up

    def _replace(self, module: Any, name: str, call: Callable[..., Any]) -> None:
        """Have what is called by this name call ours, which is given what was there."""
        original = getattr(module, name)

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return call(original, *args, **kwargs)

        self._replaced.append((module, name, original, ours))
        setattr(module, name, ours)

    def _backward(self, original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._steps.up:
            return original(tensors, *args, **kwargs)
        if isinstance(tensors, torch.Tensor) and tensors.numel() == 1:
            self._roots.append(tensors.detach())
        with self._steps.during["backward"]:
            return original(tensors, *args, **kwargs)

    def _clip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A norm that lies on several ranks is left alone: reading it would have them wait for each other."""
        norm = original(*args, **kwargs)
        if type(norm) is torch.Tensor and not torch.compiler.is_compiling() and self._steps.up:
            self._steps.gradient_norm(norm)
        return norm

    def tell_loss(self) -> None:
        """The step is about to end. Its loss: as the model gave it in the mean of its passes, else that of which the
        gradient was taken, their sum; unknown where a scaler multiplies it."""
        losses, roots = self._losses, self._roots
        self.forget()
        if losses:
            for loss in losses:
                self._steps.loss(loss / len(losses))
        elif roots and not self._scaled:
            for root in roots:
                self._steps.loss(root)

    def forget(self) -> None:
        """What was seen belongs to no step."""
        self._losses, self._roots, self._given = [], [], []

    def end(self) -> None:
        """It no longer looks; what somebody has put in place of ours since stays."""
        while self._handles:
            self._handles.pop().remove()
        while self._replaced:
            module, name, original, ours = self._replaced.pop()
            if getattr(module, name) is ours:
                setattr(module, name, original)


def find_root(parameters: Iterable[torch.nn.Parameter]) -> torch.nn.Module | None:
    """The outermost module that holds the first parameter that trains; None where none is found.

    All objects that the collector knows are looked through, once: some tenths of a second before the first timed step.
    They are asked for their type and nothing else, since some are proxies that act when they are touched.
    """
    trained = next((one for one in parameters if one.requires_grad), None)
    if trained is None:
        return None
    holders = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.nn.Module) and any(parameter is trained for parameter in one.parameters())
    ]
    inner = {id(child) for holder in holders for child in holder.modules() if child is not holder}
    roots = [holder for holder in holders if id(holder) not in inner]
    return roots[0] if len(roots) == 1 else None


def _can_hook(model: torch.nn.Module) -> bool:
    """Not where the module's own call is compiled in place: a hook would be compiled with it."""
    return getattr(model, "_compiled_call_impl", None) is None


def _parameter_names(model: torch.nn.Module) -> tuple[str, ...]:
    forward: Callable[..., Any] = model.forward
    with contextlib.suppress(TypeError, ValueError):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, one in inspect.signature(forward).parameters.items() if one.kind in kinds]
        return tuple(names)
    return ()


def _has_scaler() -> bool:
    """Whether a loss is multiplied before its gradient is taken, as under float16."""
    return any(type(one).__name__ == "GradScaler" and one.is_enabled() for one in gc.get_objects())
