"""Where code of a library of fused kernels replaces a model's own, and whether what holds it was called.

Libraries swap classes, bind other forwards to modules, or put other functions into the module of a model's code. All
of that is read off what is really bound now: the class and the forward of each module, and the function that the
forward's own globals name. Patching that came too late, or for another architecture, leaves the model's own there
silently.

Whose forward an attention has says little of what is fused in it: one that only calls another attention keeps the
model's own rotary embeddings and projections. So these are recognised by the functions that the forward calls. A fused
loss runs only where the forward is given labels, and is trained on only where a gradient reaches what it returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from kernels_check.observe.calls import Calls
from kernels_check.observe.inputs import ModelCall, training_calls
from kernels_check.observe.modules import ModelTree

Kind = Literal["rms_norm", "rope", "mlp", "loss", "qkv", "o"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Norms · rotary embeddings, in each attention · gated feed-forward parts · the loss, fused with the head · the
projections of attention with their adapters, into it and out of it."""

_LIBRARIES = ("liger_kernel", "unsloth", "unsloth_zoo", "axolotl", "apex", "flash_attn")
_HUB = "kernels-community"
_GATED = ("gate_proj", "up_proj", "down_proj")
_ROTARY = ("rotary", "rope")
"""What the name of a function of rotary embeddings holds."""
_LABELS = ("labels", "shift_labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernelSite:
    """One place of a model where a fused kernel of some kind may be bound."""

    kind: Kind
    name: str
    """Of the module."""
    library: str | None
    """Whose code is bound there; None where it is none of those that are known."""
    called: bool
    """Whether the module was called in the forward pass."""
    hidden: bool
    """Whether a call of it would not have been seen."""


def swapped_places(tree: ModelTree, calls: Calls, inputs: Sequence[ModelCall]) -> list[FusedKernelSite]:
    """Every place of every kind, in the order of the modules.

    Args:
        tree: the model.
        calls: of its modules.
        inputs: calls of the model itself; none where those could not be seen.
    """
    unseen = tuple(f"{name}." if name else "" for name in calls.unhooked)
    returned = _trains_on_what_it_returns(inputs)
    return [
        FusedKernelSite(
            kind=kind,
            name=name,
            library=library,
            called=calls.ran(name) and (kind != "loss" or returned),
            hidden=name.startswith(unseen) or (kind == "loss" and not inputs),
        )
        for name, module in tree.modules
        for kind, library in _kinds(module)
    ]


def _trains_on_what_it_returns(inputs: Sequence[ModelCall]) -> bool:
    """Whether every call that was trained on was given labels, and a gradient reached the loss that it returned."""
    trained = [call for call in training_calls(inputs) if call.gradients]
    given = all(any(call.arguments.get(name) is not None for name in _LABELS) for call in trained)
    return bool(trained) and given and all(call.loss_gradients for call in trained)


def _kinds(module: nn.Module) -> Iterator[tuple[Kind, str | None]]:
    """Which kinds a module is a place of, with the library whose code is bound there."""
    children = module._modules
    forward = _plain(module.forward)
    if any("rmsnorm" in kind.__name__.lower().replace("_", "") for kind in type(module).__mro__):
        yield "rms_norm", _library(forward)
    if all(name in children for name in _GATED):
        yield "mlp", _library(forward)
    if "q_proj" in children and "k_proj" in children:
        yield "rope", _rotary(forward)
        yield "qkv", _projection(module, forward, "apply_qkv")
        yield "o", _projection(module, forward, "apply_o")
    if "lm_head" in children and hasattr(module, "config"):
        yield "loss", _library(forward) or _library(getattr(module, "loss_function", None))


def _rotary(forward: Any) -> str | None:
    """Whose function of rotary embeddings a forward calls."""
    known = getattr(forward, "__globals__", {})
    called = (name for name in _named(forward) if any(word in name.lower() for word in _ROTARY))
    return next((library for name in called if (library := _library(known.get(name)))), None)


def _projection(module: nn.Module, forward: Any, name: str) -> str | None:
    """Whose fused projections an attention calls by a name that a library has bound to it.

    Unsloth and Axolotl bind the plain ones under the same name where they cannot fuse: theirs lie outside ``kernels``.
    """
    bound = getattr(module, name, None)
    library = _library(bound)
    fused = library is not None and _plain(bound).__module__.startswith(f"{library}.kernels.")
    return library if fused and name in _named(forward) else None


def _named(forward: Any) -> tuple[str, ...]:
    """What the code of a function names: attributes and globals, and what it asks for by ``getattr``."""
    code = getattr(forward, "__code__", None)
    texts = (one for one in getattr(code, "co_consts", ()) if isinstance(one, str))
    return (*getattr(code, "co_names", ()), *texts)


def _plain(function: Any) -> Any:
    """The function below what binds or wraps it."""
    return inspect.unwrap(getattr(function, "__func__", function))


def _library(function: Any) -> str | None:
    """Whose code a function is: by its module, and by its file where it was loaded from the hub."""
    function = _plain(function) if function is not None else None
    root = str(getattr(function, "__module__", "")).partition(".")[0]
    if root in _LIBRARIES:
        return root
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return _HUB if _HUB in file else None
