"""The layers that carry a LoRA adapter, recognised by what they hold rather than by class.

PEFT wraps each target in its own class per quantisation backend; all of them keep the wrapped layer as ``base_layer``
and one ``lora_A``, ``lora_B`` and ``lora_dropout`` per adapter name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
        """Qualified name and object of every active lora_A, lora_B and lora_dropout."""
        for holder in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_dropout"):
            held = getattr(self.module, holder, None)
            for adapter in self.adapters:
                if held is not None and adapter in held:
                    yield f"{self.name}.{holder}.{adapter}", held[adapter]

    def weights(self, letter: str) -> Iterator[tuple[str, Tensor]]:
        """Parameter name and tensor of every active factor ``A`` or ``B``."""
        for name, part in self.parts():
            if f".lora_{letter}." in name or f".lora_embedding_{letter}." in name:
                yield (name, part) if isinstance(part, Tensor) else (f"{name}.weight", part.weight)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every layer that has weights of an active adapter; where no adapter is active, every layer with any adapter."""
    wrapped = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and (hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A"))
    ]
    layers = [LoraLayer(name=name, module=module, adapters=_active(module)) for name, module in wrapped]
    return [layer for layer in layers if layer.adapters] or layers


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter: a LoRA factor, or a trained copy of a module or of some tokens."""
    return any(mark in name for mark in ("lora_", ".modules_to_save.", ".trainable_tokens_"))


def _active(module: Any) -> tuple[str, ...]:
    held = {*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())}
    active = getattr(module, "active_adapters", None)
    return tuple(sorted(held)) if active is None else tuple(name for name in active if name in held)
