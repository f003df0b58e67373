"""How the modules of a model were executed: in compiled code, again in the backward pass, or by fused kernels.

Compiled code calls no hook, and its regions are entered in some call of a module, or outside all of them. A block
whose hooks were called ran eagerly, unless a region was entered in it: then what counts is whether any layer of
weights, product or attention in it ran outside. A block that called no hook ran in compiled code if a region was
entered where it is called from, and it ran at all. The record of breaks and recompilations is that of the process and
not of one model; a place counts once.

A module that is called while the autograd engine runs is being recomputed. Each call of a block to which a gradient
comes back has to be matched.

Libraries of fused kernels swap classes, bind other forwards to modules, or put other functions into the module of a
model's code. All of that is read from the current bindings: the class and the forward of each module, and the function
that the forward's own globals name. Patching that came too late, or for another architecture, silently leaves the
model's own functions. The library of an attention's forward does not show which parts are fused, so rotary embeddings
and projections are recognised by the functions that the forward calls. A fused loss runs only where the forward is
given labels, and is trained on only where a gradient reaches the returned loss.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from traceback import FrameSummary
from typing import Any, Literal

from torch import nn

from kernels_check.check import name_some
from kernels_check.observe.calls import Calls
from kernels_check.observe.loss import ModelCall, training_calls
from kernels_check.observe.modules import ModelTree, block_names, block_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilations:
    """The record of this process; every entry is a phrase that names what, where and why."""

    breaks: tuple[str, ...] = ()
    """Places in the user's code where a graph ended early."""
    recompiles: tuple[str, ...] = ()
    """Functions that were compiled again, each time with the guard that failed."""
    refused: tuple[str, ...] = ()
    """Recompilations that failed, such as those beyond the limit: what they were for runs eagerly."""
    unreadable: str | None = None
    """Why this version of torch cannot be read."""

    @property
    def empty(self) -> bool:
        """Whether nothing is on record."""
        return self == Compilations()

    def __str__(self) -> str:
        if self.unreadable is not None:
            return f"graph breaks and recompiles are unknown: {self.unreadable}"
        parts = [_counted(self.breaks, "graph breaks"), _counted(self.recompiles, "recompiles")]
        parts += [_counted(self.refused, "recompiles refused")] if self.refused else []
        more = "; TORCH_LOGS=graph_breaks,recompiles shows each as it happens" if not self.empty else ""
        return f"in this process so far {', '.join(parts)}{more}"


def read_compilations() -> Compilations:
    """Read the record; empty where nothing has loaded the compiler."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilations()
    try:
        metrics = dynamo.get_compilation_metrics()
        breaks = [_place(one.reason, one.user_stack) for one in dynamo.graph_break_reasons]
        for one in metrics:
            if one.fail_user_frame_filename is not None:
                frame = FrameSummary(one.fail_user_frame_filename, one.fail_user_frame_lineno, "")
                breaks.append(_place(one.fail_reason, [frame]))
        again = [one for one in metrics if one.recompile_reason is not None]
        return Compilations(
            breaks=tuple(dict.fromkeys(breaks)),
            recompiles=tuple(
                f"{one.co_name} at {_short(one.co_filename)}:{one.co_firstlineno}: {_guard(one)}"
                for one in again
                if one.fail_reason is None
            ),
            refused=tuple(f"{_title(one.fail_reason)}: {_guard(one)}" for one in again if one.fail_reason),
        )
    except (AttributeError, TypeError) as error:
        return Compilations(unreadable=str(error))


def _place(reason: str, stack: Sequence[FrameSummary]) -> str:
    """The innermost frame; a break before the first line of a function has none."""
    if not stack:
        return _title(reason)
    code = f" `{stack[-1].line}`" if stack[-1].line else ""
    return f"{_title(reason)} at {_short(stack[-1].filename)}:{stack[-1].lineno}{code}"


def _guard(compilation: Any) -> str:
    """The guard that failed, without the number of the compilation before it (``0/1: ``) and the source line behind."""
    return _title(str(compilation.recompile_reason).partition(": ")[2]).partition("  # ")[0].rstrip()


def _title(reason: str) -> str:
    return reason.partition("\n")[0]


def _short(file: str) -> str:
    return "/".join(PurePath(file).parts[-2:])


def _counted(phrases: tuple[str, ...], what: str) -> str:
    return f"{len(phrases)} {what}" + (f" ({name_some(phrases, '; ')})" if phrases else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledBlocks:
    """The blocks that ran, sorted."""

    compiled: tuple[str, ...] = ()
    """All of it ran in compiled code."""
    partly: tuple[str, ...] = ()
    """Some of it did."""
    eager: tuple[str, ...] = ()
    regions: int = 0
    """Compiled regions of the model."""
    helpers: int = 0
    """Regions in which none of its blocks or other modules ran, as of a loss."""

    @property
    def ran(self) -> int:
        """How many blocks ran."""
        return len(self.compiled) + len(self.partly) + len(self.eager)


def compiled_blocks(
    tree: ModelTree, calls: Calls, regions: Iterable[int | None], eager: Collection[int], gradients: Collection[str]
) -> CompiledBlocks:
    """Sort the blocks that ran in the forward pass.

    Args:
        tree: the model.
        calls: of its modules, as far as they call hooks.
        regions: for each compiled region that was entered in the forward pass, the call that it was entered in.
        eager: calls in which products or attention ran outside of any region.
        gradients: names of the parameters that a gradient reached.
    """
    entered = [one for one in regions if one is None or one in calls.relevant]
    covered = calls.around(entered)
    callers = {calls.all[number].caller for number in calls.forward}

    def is_eager(number: int) -> bool:
        """Whether a layer of weights, a product or attention ran in this call itself outside of any region."""
        if number in covered or number in callers:
            return number in eager
        return number in eager or bool(tree.model.get_submodule(calls.all[number].name)._parameters)

    names = block_names(tree)
    blocks = frozenset(names)
    fired: dict[str, list[int]] = {}
    for number in calls.forward:
        block, _ = _locate(calls.all[number].names, blocks)
        if block is not None:
            fired.setdefault(block, []).append(number)
    found: dict[str, set[str]] = {"compiled": set(), "partly": set(), "eager": set()}
    for block, numbers in fired.items():
        state = "partly" if any(map(is_eager, numbers)) else "compiled"
        found["eager" if covered.isdisjoint(numbers) else state].add(block)
    silent = {block for block in names if block not in fired and _is_around(block, entered, calls)}
    for block in silent:
        reached = any(block_of(name, frozenset({block})) is not None for name in gradients)
        frozen = not any(value.requires_grad for value in tree.model.get_submodule(block).parameters())
        siblings = {other for other in fired if _parent(other) == _parent(block)}
        if reached or (frozen and siblings <= found["compiled"]):
            found["compiled"].add(block)
    proven = not found["compiled"] <= fired.keys()
    ours = sum(proven or _is_ours(region, blocks, calls) for region in entered)
    in_order = {state: tuple(name for name in names if name in members) for state, members in found.items()}
    return CompiledBlocks(**in_order, regions=ours, helpers=len(entered) - ours)


def _locate(names: Sequence[str], blocks: frozenset[str]) -> tuple[str | None, str]:
    """The block that a module of these names lies in, and its name there."""
    found = ((block_of(name, blocks), name) for name in names)
    return next((one for one in found if one[0] is not None), (None, names[0]))


def _is_around(block: str, regions: Collection[int | None], calls: Calls) -> bool:
    """Whether a region was entered directly in the innermost call that a silent block can have been called from."""
    name = block
    while name:
        name = _parent(name)
        numbers = calls.called(name)
        if numbers:
            return not set(numbers).isdisjoint(regions)
    return None in regions


def _is_ours(region: int | None, blocks: frozenset[str], calls: Calls) -> bool:
    """Whether a region is of the model; what holds the blocks may call helpers, such as a loss."""
    if region is None:
        return False
    names = calls.all[region].names
    holds = any(not name or any(block.startswith(f"{name}.") for block in blocks) for name in names)
    return not holds or _locate(names, blocks)[0] is not None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecomputed:
    """One block to which gradients came back."""

    name: str
    calls: int
    """Calls of the forward pass that a gradient comes back to."""
    again: int
    """How many of them were computed again."""
    modules: int
    """Modules inside the block that ran in them; itself where there are none."""
    repeated: int
    """How many of those were called again."""
    kept: tuple[str, ...] = ()
    """Parts of the block that were not computed again where others were: their activations were kept."""

    @property
    def whole(self) -> bool:
        """Whether all of it was computed again, at each of its calls."""
        return self.again >= self.calls and not self.kept


def recomputed_blocks(tree: ModelTree, calls: Calls) -> tuple[BlockRecomputed, ...]:
    """Every block that was called and to which a gradient comes back."""
    names = block_names(tree)
    blocks = frozenset(names)
    around: dict[int | None, int] = {}
    """The call of a block that each call lies in; where the block itself calls no hook, each counts as one."""
    forward: dict[str, dict[str, list[int]]] = {}
    """By block and module, the calls of the block that its calls of the forward pass lie in."""
    again: dict[str, Counter[str]] = {}
    """By block and module, its calls in the backward pass."""
    for number in sorted(calls.relevant):
        call = calls.all[number]
        block, name = _locate(call.names, blocks)
        if block is None:
            continue
        if call.in_backward:
            again.setdefault(block, Counter())[name] += 1
            continue
        around[number] = number if name == block else around.get(call.caller, number)
        if calls.all[around[number]].differentiable:
            forward.setdefault(block, {}).setdefault(name, []).append(around[number])
    matrices = {
        name
        for name, module in tree.model.named_modules(remove_duplicate=False)
        if any(value is not None and value.dim() > 1 for value in module._parameters.values())
    }
    return tuple(
        _recomputed(name, forward[name], again.get(name, Counter()), matrices) for name in names if name in forward
    )


def _recomputed(
    block: str, forward: Mapping[str, Sequence[int]], again: Counter[str], matrices: Collection[str]
) -> BlockRecomputed:
    calls = {name: len(set(within)) for name, within in forward.items()}
    needing = calls.get(block) or max(calls.values())
    matched = max(again[name] * calls[name] // len(within) for name, within in forward.items())
    inside = [name for name in forward if name != block] or list(forward)
    repeated = frozenset(name for name, within in forward.items() if again[name] >= len(within))
    return BlockRecomputed(
        name=block,
        calls=needing,
        again=min(matched, needing),
        modules=len(inside),
        repeated=len(repeated.intersection(inside)),
        kept=_kept(block, [name for name in inside if name in matrices], repeated),
    )


def ran_without_gradient(tree: ModelTree, calls: Calls, judged: Iterable[BlockRecomputed]) -> tuple[str, ...]:
    """Blocks that ran and are none of ``recomputed_blocks``: there is nothing to recompute in them.

    A block whose ``forward`` is called directly, as in SqueezeBERT, calls no hook: the calls of its modules show that
    it ran.
    """
    known = {block.name for block in judged}
    names = block_names(tree)
    ran = {block_of(name, frozenset(names)) for number in calls.forward for name in calls.all[number].names}
    return tuple(name for name in names if name in ran and name not in known)


def _kept(block: str, matrices: Sequence[str], repeated: frozenset[str]) -> tuple[str, ...]:
    """The outermost parts of a block in which nothing was computed again.

    Args:
        block: the block.
        matrices: its modules with a matrix of their own, in the order in which they were called.
        repeated: what was computed again at each of its calls.
    """
    left = [name for name in matrices if block_of(name, repeated) is None]
    if len(matrices) > 1 and left == list(matrices[-1:]):  # it saves nothing, so that the recomputation ended before it
        return ()
    begun = {".".join(parts[:end]) for parts in (name.split(".") for name in repeated) for end in range(len(parts) + 1)}
    outermost = dict[str, None]()
    for name in left:
        parts = name.split(".")
        places = (".".join(parts[:end]) for end in range(block.count(".") + 2 if block else 1, len(parts) + 1))
        outermost[next((place for place in places if place not in begun), name)] = None
    return tuple(outermost)


Kind = Literal["rms_norm", "rope", "mlp", "loss", "qkv", "o"]
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


def fused_kernel_sites(tree: ModelTree, calls: Calls, inputs: Sequence[ModelCall]) -> list[FusedKernelSite]:
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
    """The library of the function of rotary embeddings that a forward calls."""
    known = getattr(forward, "__globals__", {})
    called = (name for name in _named(forward) if any(word in name.lower() for word in _ROTARY))
    return next((library for name in called if (library := _library(known.get(name)))), None)


def _projection(module: nn.Module, forward: Any, name: str) -> str | None:
    """The library whose fused projections an attention calls by a name that the library has bound to it.

    Unsloth and Axolotl bind the plain ones under the same name where they cannot fuse: theirs lie outside ``kernels``.
    """
    bound = getattr(module, name, None)
    library = _library(bound)
    fused = library is not None and _plain(bound).__module__.startswith(f"{library}.kernels.")
    return library if fused and name in _named(forward) else None


def _named(forward: Any) -> tuple[str, ...]:
    """Names in the code of a function: attributes, globals, and strings as for ``getattr``."""
    code = getattr(forward, "__code__", None)
    texts = (one for one in getattr(code, "co_consts", ()) if isinstance(one, str))
    return (*getattr(code, "co_names", ()), *texts)


def _plain(function: Any) -> Any:
    """The function below what binds or wraps it."""
    return inspect.unwrap(getattr(function, "__func__", function))


def _library(function: Any) -> str | None:
    """The library of a function: by its module, and by its file where it was loaded from the hub."""
    function = _plain(function) if function is not None else None
    root = str(getattr(function, "__module__", "")).partition(".")[0]
    if root in _LIBRARIES:
        return root
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return _HUB if _HUB in file else None
