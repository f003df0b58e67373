"""Biases of the base that train as a part of the adapter, since PEFT was asked for them.

By ``bias="all"`` PEFT trains every bias of the model that it wraps, by ``bias="lora_only"`` (or another method's name)
those of the layers that carry the adapter, and it saves them with the adapter. They are then as much of the adapter as
its factors: nobody asks that they stay as they are, and everybody that they learn. What wraps a part of the model to
train a copy of it keeps its own biases (``AuxiliaryTrainingWrapper``).

Only an adapter in use asks. PEFT leaves the biases of another one trainable when that is put aside; nobody asked for
that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kernels_check.observe.adapter_kinds import holders_in, in_use, is_a, is_tuner, layers_at, roles_of
from kernels_check.observe.module_tree import ModelTree, every_module, named_modules, named_parameters, reading


@reading
def biases_of_adapters(model: ModelTree) -> dict[str, str]:
    """The biases of the base that an adapter in use trains: qualified name, and what PEFT was asked, ``bias='all'``.

    A tensor that several modules share has a name for each.
    """
    holders = every_module(model)
    asked = {id(bias): f"bias={setting!r}" for holder in holders for setting, bias in _asked_of(holder, model)}
    if not asked:
        return {}
    return {
        f"{name}.{key}" if name else key: asked[id(value)]
        for name, module in named_modules(model)
        for key, value in (*module._parameters.items(), *module._buffers.items())  # GPTQ keeps a bias as a buffer
        if id(value) in asked
    }


def _asked_of(holder: Any, model: ModelTree) -> Iterator[tuple[str, Tensor]]:
    """Settings, and the tensors they mean, of a tuner, or of a model in which PEFT has left only its layers."""
    configurations = vars(holder).get("peft_config")
    if not isinstance(configurations, dict):
        return
    settings = {adapter: getattr(one, "bias", "none") for adapter, one in configurations.items()}
    if all(setting == "none" for setting in settings.values()):
        return
    wrapped = holder._modules["model"] if is_tuner(holder) else holder
    used = in_use(model, (layer for name, module in named_modules(wrapped) for layer in layers_at(name, module)))
    for adapter, setting in settings.items():
        if adapter in used and setting == "all":
            yield from ((setting, bias) for bias in _every(wrapped, mixed=_is_mixed(holder)))
        elif adapter in used and str(setting).endswith("_only"):
            yield from ((setting, bias) for bias in _of_layers(wrapped))


def _every(wrapped: nn.Module, *, mixed: bool) -> Iterator[Tensor]:
    apart = tuple(_apart(wrapped))
    for name, value in named_parameters(wrapped):
        is_bias = "bias" in name if mixed else name.rpartition(".")[2] == "bias"
        if is_bias and not name.startswith(apart):
            yield value


def _apart(wrapped: nn.Module) -> Iterator[str]:
    """Beginnings of the names of what is an adapter's in any case, or stays frozen behind its copy."""
    for name, module in named_modules(wrapped):
        prefix = f"{name}." if name else ""
        yield from (f"{prefix}{held}" for held in holders_in(module))
        if "copy" in roles_of(module):
            yield prefix


def _of_layers(wrapped: nn.Module) -> Iterator[Tensor]:
    for module in every_module(wrapped):
        roles = roles_of(module)
        bias = getattr(module, "bias", None) if "layer" in roles and "copy" not in roles else None
        if isinstance(bias, Tensor):
            yield bias


def _is_mixed(holder: nn.Module) -> bool:
    """Whether a tuner holds adapters of several methods; it takes whatever has ``bias`` in its name."""
    return is_a(holder, "peft.tuners.mixed.model", "MixedModel")
