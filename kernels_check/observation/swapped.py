"""Where code of a library of fused kernels stands in place of a model's own, and whether what holds it was called.

Libraries swap classes, bind other forwards to modules, or put other functions into the module of a model's code. All of
that is read off what is really bound now: the class and the forward of each module, and the function that the forward's
own globals name. Patching that came too late, or for another architecture, leaves the model's own there silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from kernels_check.observation.calls import Calls
from kernels_check.observation.module_tree import ModelTree

Kind = Literal["rms_norm", "rope", "mlp", "loss", "qkv", "o"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Norms · rotary embeddings, in each attention · gated feed-forward parts · the loss, fused with the head · the
projections of attention with their adapters, into it and out of it."""

_LIBRARIES = ("liger_kernel", "unsloth", "unsloth_zoo", "axolotl", "apex", "flash_attn")
_HUB = "kernels-community"
_GATED = ("gate_proj", "up_proj", "down_proj")
_ROPE = "apply_rotary_pos_emb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One place of a model where a fused kernel of some kind may stand."""

    kind: Kind
    name: str
    """Of the module."""
    library: str | None
    """Whose code is bound there; None where it is none of those that are known."""
    called: bool
    """Whether the module was called in the forward pass."""
    hidden: bool
    """Whether a call of it would not have been seen."""


def swapped_places(tree: ModelTree, calls: Calls) -> list[Place]:
    """Every place of every kind, in the order of the modules.

    Args:
        tree: the model.
        calls: of its modules.
    """
    unseen = tuple(f"{name}." if name else "" for name in calls.unhooked)
    return [
        Place(kind=kind, name=name, library=library, called=calls.ran(name), hidden=name.startswith(unseen))
        for name, module in tree.modules
        for kind, library in _kinds(module)
    ]


def _kinds(module: nn.Module) -> Iterator[tuple[Kind, str | None]]:
    """Which kinds a module is a place of, with the library whose code is bound there."""
    children = module._modules
    forward = _plain(module.forward)
    if "rmsnorm" in type(module).__name__.lower().replace("_", ""):
        yield "rms_norm", _library(forward)
    if all(name in children for name in _GATED):
        yield "mlp", _library(forward)
    if "q_proj" in children and "k_proj" in children:
        named = getattr(forward, "__globals__", {}).get(_ROPE)
        yield "rope", _library(forward) or _library(named)
        yield "qkv", _library(forward) or _library(getattr(module, "apply_qkv", None))
        yield "o", _library(forward) or _library(getattr(module, "apply_o", None))
    if "lm_head" in children and hasattr(module, "config"):
        yield "loss", _library(forward) or _library(getattr(module, "loss_function", None))


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
