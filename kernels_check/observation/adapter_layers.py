"""What of a model is an adapter's, asked of the layers that hold it and never of a name.

PEFT wraps each target in its own class per method and quantisation backend, and says in ``adapter_layer_names`` and
``other_param_names`` which of its attributes are the adapter's; copies that are trained beside it (``modules_to_save``,
trainable tokens) say so in the same way. Whatever else a model holds is its base, however it is called: a model kept
as ``self.lora_model`` has no adapter by that.

A LoRA layer keeps the wrapped layer as ``base_layer`` and one ``lora_A``, ``lora_B`` and ``lora_dropout`` per adapter
name, and is recognised by that rather than by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from kernels_check.observation.calls import Calls

_PREFIX = "lora_"
_EMBEDDING_A = "lora_embedding_A"
_FACTORS = {"A": ("lora_A", _EMBEDDING_A), "B": ("lora_B", "lora_embedding_B")}
_DROPOUT = "lora_dropout"
_PARTS = ("lora_A", "lora_B", _EMBEDDING_A, "lora_embedding_B", _DROPOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """One wrapped layer, seen with the adapters that are active in it."""

    name: str
    module: nn.Module
    adapters: tuple[str, ...]
    """Active adapters that this layer has weights for."""

    @property
    def base(self) -> Any:
        """The wrapped layer."""
        return self.module.base_layer

    @property
    def disabled(self) -> bool:
        """Whether the layer skips its adapters."""
        return bool(getattr(self.module, "disable_adapters", False))

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters whose product is folded into the base weight."""
        return tuple(getattr(self.module, "merged_adapters", ()))

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Qualified name and object of every active factor and dropout."""
        return self._held_by(_PARTS)

    def weights(self, letter: str) -> Iterator[tuple[str, Tensor]]:
        """Parameter name and tensor of every active factor ``A`` or ``B``."""
        for name, part in self._held_by(_FACTORS[letter]):
            yield (name, part) if isinstance(part, Tensor) else (f"{name}.weight", part.weight)

    def dropouts(self) -> Iterator[tuple[str, Any]]:
        """Qualified name and module of every active dropout."""
        return self._held_by((_DROPOUT,))

    def was_called(self, calls: Calls) -> bool:
        """Whether the calls, by name, show that a factor ``A`` ran.

        The layer's own call proves its base only, but for an embedding: its factors are bare parameters and call no
        hook.
        """
        if any(calls.ran(name) for name, _ in self._held_by(_FACTORS["A"])):
            return True
        return calls.ran(self.name) and any(True for _ in self._held_by((_EMBEDDING_A,)))

    def _held_by(self, holders: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for holder in holders:
            held = getattr(self.module, holder, None)
            for adapter in self.adapters:
                if held is not None and adapter in held:
                    yield f"{self.name}.{holder}.{adapter}", held[adapter]


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every layer that has weights of an active adapter; where no adapter is active, every layer with any adapter."""
    layers = [
        LoraLayer(name=name, module=module, adapters=_active(module))
        for name, module in model.named_modules()
        if _is_lora(module)
    ]
    return [layer for layer in layers if layer.adapters] or layers


def adapter_paths(model: nn.Module) -> frozenset[str]:
    """Qualified names of the attributes that are an adapter's; whatever is held below them is its, too."""
    return frozenset(
        f"{name}.{holder}" if name else holder for name, module in model.named_modules() for holder in _holders(module)
    )


def is_below(name: str, paths: frozenset[str]) -> bool:
    """Whether a qualified name is one of these paths or below one."""
    return not paths.isdisjoint(_paths_to(name))


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are an adapter's: of any method of PEFT, and copies that are trained beside it."""
    paths = adapter_paths(model)
    return frozenset(name for name, _ in model.named_parameters() if is_below(name, paths))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every other parameter, by name."""
    adapter = adapter_parameters(model)
    return {name: value for name, value in model.named_parameters() if name not in adapter}


def _holders(module: Any) -> Iterator[str]:
    """Attributes of one layer that are an adapter's."""
    yield from getattr(module, "adapter_layer_names", ())
    yield from getattr(module, "other_param_names", ())
    if _is_lora(module):  # also where a class of one's own lists nothing
        yield from (name for name in (*module._modules, *module._parameters) if name.startswith(_PREFIX))


def _paths_to(name: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    return accumulate(name.split("."), lambda path, part: f"{path}.{part}")


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and any(hasattr(module, holder) for holder in _FACTORS["A"])


def _active(module: Any) -> tuple[str, ...]:
    held = {adapter for holder in _FACTORS["A"] for adapter in getattr(module, holder, ())}
    active = getattr(module, "active_adapters", None)
    return tuple(sorted(held)) if active is None else tuple(name for name in active if name in held)
