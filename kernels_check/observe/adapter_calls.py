"""What each call of an adapter's layer found: whether the adapter was enabled then, and which of its parts ran.

Flags that are read before or after a step say nothing of the step: ``disable_adapter()`` around the forward switches
back before anybody looks. A part is counted for the layer in whose call it ran, since layers may share one. Calls
without gradients, such as those of a reference or of an evaluation inside the step, are kept apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kernels_check.observe.adapter_kinds import AdapterLayer, active_in, is_disabled
from kernels_check.observe.adapter_layers import adapter_layers
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.module_tree import ModelTree
from kernels_check.observe.safe_hooks import HookGuard, ModuleHook


@dataclass(slots=True, kw_only=True)
class LayerCall:
    """One call of one layer."""

    active: tuple[str, ...]
    disabled: bool
    merged: bool
    with_gradients: bool
    aside: bool = False
    """Whether the whole entry into the model records no gradients, as an evaluation or a reference does."""
    number: int | None = None
    """Of the call in the log of all calls, where there is one."""
    ran: dict[str, float] = field(default_factory=dict)
    """Parts that ran in it, by name; of a dropout the probability by which it dropped, which is 0 in evaluation."""

    @property
    def adapted(self) -> bool:
        """Whether the layer was to use its adapter."""
        return bool(self.active) and not self.disabled and not self.merged


@dataclass(slots=True)
class AdapterCalls:
    """Hooks on the layers of a model's adapters and on their parts, and what they noted."""

    shield: HookGuard
    """What hooks are wrapped in."""
    layers: dict[str, list[LayerCall]] = field(default_factory=dict)
    """The calls of each layer, by its name."""
    _log: CallRecorder | None = None
    _entered: dict[int, list[tuple[str, LayerCall]]] = field(default_factory=dict)
    """The layers that a thread is in, outermost first."""

    @contextmanager
    def watched(self, tree: ModelTree, log: CallRecorder) -> Iterator[None]:
        """Hook every layer and part; all hooks are off afterwards, whatever raised.

        Args:
            tree: of the model as it is.
            log: of all calls, which hooks the same modules.
        """
        self.forget()
        self._log = log
        found = adapter_layers(tree)
        with ExitStack() as hooks:
            parts: dict[int, tuple[nn.Module, dict[str, str]]] = {}
            for layer in found:
                self._hook_layer(hooks, layer)
                for name, part in layer.parts():
                    parts.setdefault(id(part), (part, {}))[1][layer.name] = name
            for part, names in parts.values():
                noted = ModuleHook(part, self.shield(partial(self._note_part, names)))
                hooks.push(part.register_forward_pre_hook(noted))
            yield

    def forget(self) -> None:
        """Drop what was noted."""
        self.layers = {}
        self._entered.clear()
        self._log = None

    def drop(self, failed: Set[int]) -> None:
        """Drop the calls of these numbers, which came to nothing."""
        for name, calls in self.layers.items():
            self.layers[name] = [call for call in calls if call.number not in failed]

    def _hook_layer(self, hooks: ExitStack, layer: AdapterLayer) -> None:
        if layer.module._compiled_call_impl is not None:  # compiled in place, it would be compiled again with the hook
            return
        entered = ModuleHook(layer.module, self.shield(partial(self._enter, layer)))
        left = ModuleHook(layer.module, self.shield(self._leave))
        hooks.push(layer.module.register_forward_pre_hook(entered))
        hooks.push(layer.module.register_forward_hook(left, always_call=True))

    def _enter(self, layer: AdapterLayer, module: nn.Module, inputs: Any) -> None:
        call = LayerCall(
            active=tuple(name for name in layer.held if name in active_in(module, layer.held)),
            disabled=is_disabled(module),
            merged=bool(layer.merged),
            with_gradients=torch.is_grad_enabled(),
            aside=self._log is not None and not self._log.in_training(),
            number=None if self._log is None else self._log.current(),
        )
        self.layers.setdefault(layer.name, []).append(call)
        self._entered.setdefault(threading.get_ident(), []).append((layer.name, call))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        entered = self._entered.get(threading.get_ident())
        if entered:
            entered.pop()

    def _note_part(self, names: dict[str, str], part: nn.Module, inputs: Any) -> None:
        for layer, call in reversed(self._entered.get(threading.get_ident(), [])):
            if layer in names:
                probability = getattr(part, "p", None)
                dropped = float(probability) if isinstance(probability, float | int) and part.training else 0.0
                call.ran[names[layer]] = max(dropped, call.ran.get(names[layer], 0.0))
                return
