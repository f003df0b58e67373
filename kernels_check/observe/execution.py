"""How the modules of a model were executed: in compiled code, again in the backward pass, or by fused kernels.

Compiled code calls no hooks, and its regions are entered inside a module call or outside all of them. A block whose
hooks were called ran eagerly, unless a region was entered inside it: then the block counts as compiled if no weight
layer, product or attention ran outside of regions. A block that called no hook ran in compiled code if a region was
entered in its caller, and if it ran at all. The record of graph breaks and recompilations covers the process, not one
model; each place counts once.

A module call during an autograd run is a recomputation. Every call of a block that receives a gradient must have a
matching recomputation.

Libraries of fused kernels replace classes, the forwards of modules, or functions in the Python module of a model. All
of these are read from the current bindings: the class and the forward of each module, and the functions in the
forward's globals. Patching too late, or for another architecture, silently keeps the model's own functions. The library
of an attention's forward does not show which parts are fused, so rotary embeddings and projections are recognised by
the functions that the forward calls. A fused loss runs only if the forward receives labels, and trains only if a
gradient reaches the returned loss.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import PurePath
from traceback import FrameSummary
from typing import Any, Literal

from torch import nn

from kernels_check.check import name_some
from kernels_check.observe.calls import Calls
from kernels_check.observe.loss import ModelCall, training_calls
from kernels_check.observe.modules import ModelTree, block_names, find_enclosing, modules_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilations:
    """The compiler's record in this process; every entry is a phrase that says what, where and why."""

    breaks: tuple[str, ...] = ()
    """Places in the user's code where a graph ended early."""
    recompiles: tuple[str, ...] = ()
    """Functions that were recompiled, each time with the guard that failed."""
    refused: tuple[str, ...] = ()
    """Recompilations that failed, for example beyond the limit: such code runs eagerly."""
    unreadable: str | None = None
    """Why the record of this torch version cannot be read."""

    @property
    def empty(self) -> bool:
        """Whether the record is empty."""
        return self == Compilations()

    def __str__(self) -> str:
        if self.unreadable is not None:
            return f"graph breaks and recompiles are unknown: {self.unreadable}"
        parts = [_count_phrases(self.breaks, "graph breaks"), _count_phrases(self.recompiles, "recompiles")]
        parts += [_count_phrases(self.refused, "recompiles refused")] if self.refused else []
        more = "; TORCH_LOGS=graph_breaks,recompiles shows each as it happens" if not self.empty else ""
        return f"in this process so far {', '.join(parts)}{more}"


def read_compilations() -> Compilations:
    """Read the record; it is empty if the compiler is not loaded."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilations()
    try:
        metrics = dynamo.get_compilation_metrics()
        breaks = [(one.reason, one.user_stack) for one in dynamo.graph_break_reasons]
        breaks += [
            (one.fail_reason, [FrameSummary(one.fail_user_frame_filename, one.fail_user_frame_lineno, "")])
            for one in metrics
            if one.fail_user_frame_filename is not None
        ]
        again = [one for one in metrics if one.recompile_reason is not None]
        return Compilations(
            breaks=tuple(dict.fromkeys(_place(reason, stack) for reason, stack in breaks)),
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
    """The innermost frame; a graph break before a function's first line has none."""
    if not stack:
        return _title(reason)
    code = f" `{stack[-1].line}`" if stack[-1].line else ""
    return f"{_title(reason)} at {_short(stack[-1].filename)}:{stack[-1].lineno}{code}"


def _guard(compilation: Any) -> str:
    """The failed guard, without the number of the compilation before it (``0/1: ``) and the source line after it."""
    return _title(str(compilation.recompile_reason).partition(": ")[2]).partition("  # ")[0].rstrip()


def _title(reason: str) -> str:
    return reason.partition("\n")[0]


def _short(file: str) -> str:
    return "/".join(PurePath(file).parts[-2:])


def _count_phrases(phrases: tuple[str, ...], what: str) -> str:
    return f"{len(phrases)} {what}" + (f" ({name_some(phrases, '; ')})" if phrases else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledBlocks:
    """The blocks that ran, by how they ran."""

    compiled: tuple[str, ...] = ()
    """Blocks that ran entirely in compiled code."""
    partly: tuple[str, ...] = ()
    """Blocks that ran partly in compiled code."""
    eager: tuple[str, ...] = ()
    regions: int = 0
    """Compiled regions of the model."""
    helpers: int = 0
    """Regions in which no block or other module of the model ran, such as a loss."""

    @property
    def ran(self) -> int:
        """The number of blocks that ran."""
        return len(self.compiled) + len(self.partly) + len(self.eager)


def compiled_blocks(
    tree: ModelTree, calls: Calls, regions: Iterable[int | None], eager: Collection[int], gradients: Collection[str]
) -> CompiledBlocks:
    """Classify the blocks that ran in the forward pass.

    Args:
        tree: the model.
        calls: calls of its modules, as far as they call hooks.
        regions: for each compiled region entered in the forward pass, the call in which it was entered.
        eager: calls in which products or attention ran outside all regions.
        gradients: names of the parameters that received a gradient.
    """
    entered = [one for one in regions if one is None or one in calls.relevant]
    covered = calls.around(entered)
    callers = {calls.all[number].caller for number in calls.forward}

    def is_eager(number: int) -> bool:
        """Whether a weight layer, a product or attention ran directly in this call, outside all regions."""
        has_weights = bool(modules[calls.all[number].name]._parameters)
        return number in eager or (has_weights and number not in covered and number not in callers)

    names, modules = block_names(tree), modules_by_name(tree)
    with_hooks: dict[str, list[int]] = {}
    for number in calls.forward:
        if (block := _locate(calls.all[number].names, names)[0]) is not None:
            with_hooks.setdefault(block, []).append(number)
    found: dict[str, set[str]] = {"compiled": set(), "partly": set(), "eager": set()}
    for block, numbers in with_hooks.items():
        state = "partly" if any(map(is_eager, numbers)) else "compiled"
        found["eager" if covered.isdisjoint(numbers) else state].add(block)
    for block in (one for one in names if one not in with_hooks and _is_around(one, entered, calls)):
        reached = any(find_enclosing(name, {block}) is not None for name in gradients)
        frozen = not any(value.requires_grad for value in modules[block].parameters())
        siblings = {other for other in with_hooks if _parent(other) == _parent(block)}
        if reached or (frozen and siblings <= found["compiled"]):
            found["compiled"].add(block)
    proven = not found["compiled"] <= with_hooks.keys()
    of_model = sum(proven or _belongs_to_model(region, names, calls) for region in entered)
    in_order = {state: tuple(name for name in names if name in members) for state, members in found.items()}
    return CompiledBlocks(**in_order, regions=of_model, helpers=len(entered) - of_model)


def _locate(names: Sequence[str], blocks: Collection[str]) -> tuple[str | None, str]:
    """The block that contains the module with these names, and the module's name inside it."""
    found = ((find_enclosing(name, blocks), name) for name in names)
    return next((one for one in found if one[0] is not None), (None, names[0]))


def _is_around(block: str, regions: Collection[int | None], calls: Calls) -> bool:
    """Whether a region was entered directly in the innermost call that may have called a block without hooks."""
    caller = find_enclosing(_parent(block), {name for name in calls.by_name if calls.ran(name)}) if block else None
    return None in regions if caller is None else not set(calls.called(caller)).isdisjoint(regions)


def _belongs_to_model(region: int | None, blocks: Collection[str], calls: Calls) -> bool:
    """Whether a region belongs to the model; the module that holds the blocks may call helpers, such as a loss."""
    names = ("",) if region is None else calls.all[region].names
    holds = any(not name or any(block.startswith(f"{name}.") for block in blocks) for name in names)
    return region is not None and (not holds or _locate(names, blocks)[0] is not None)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecomputed:
    """One block that received gradients."""

    name: str
    calls: int
    """Forward calls that received a gradient."""
    recomputed_calls: int
    """Number of calls that were recomputed."""
    modules: int
    """Modules inside the block that ran in these calls; the block itself if there are none."""
    recomputed_modules: int
    """Number of these modules that were recomputed."""
    kept: tuple[str, ...] = ()
    """Parts of the block that were not recomputed although others were: their activations were kept."""

    @property
    def is_complete(self) -> bool:
        """Whether the whole block was recomputed, for each of its calls."""
        return self.recomputed_calls >= self.calls and not self.kept


SAVED = "the products that a selective checkpoint saved"


def recomputed_blocks(tree: ModelTree, calls: Calls) -> tuple[BlockRecomputed, ...]:
    """Every block that was called and received a gradient."""
    names = block_names(tree)
    around: dict[int | None, int] = {}
    """For each call, the block call that contains it; if the block calls no hooks, each call counts as one."""
    forward: dict[str, dict[str, list[int]]] = {}
    """By block and module: the block calls that contain the module's forward calls."""
    again: dict[str, Counter[str]] = {}
    """By block and module: the module's calls in the backward pass."""
    replayed: set[str] = set()
    """Blocks that a selective checkpoint recomputed with saved products."""
    for number in sorted(calls.relevant):
        call = calls.all[number]
        block, name = _locate(call.names, names)
        if block is not None and call.in_backward:
            again.setdefault(block, Counter())[name] += 1
            replayed |= {block} if call.replays else set()
        elif block is not None:
            around[number] = number if name == block else around.get(call.caller, number)
            if calls.all[around[number]].differentiable:
                forward.setdefault(block, {}).setdefault(name, []).append(around[number])
    matrices = {
        name
        for name, module in modules_by_name(tree).items()
        if any(value is not None and value.dim() > 1 for value in module._parameters.values())
    }
    blocks = (
        _measure_block(name, forward[name], again.get(name, Counter()), matrices) for name in names if name in forward
    )
    return tuple(replace(one, kept=(*one.kept, SAVED)) if one.name in replayed else one for one in blocks)


def _measure_block(
    block: str, forward: Mapping[str, Sequence[int]], again: Counter[str], matrices: Collection[str]
) -> BlockRecomputed:
    calls = {name: len(set(within)) for name, within in forward.items()}
    block_calls = calls.get(block) or max(calls.values())
    matched = max(again[name] * calls[name] // len(within) for name, within in forward.items())
    inside = [name for name in forward if name != block] or list(forward)
    repeated = frozenset(name for name, within in forward.items() if again[name] >= len(within))
    return BlockRecomputed(
        name=block,
        calls=block_calls,
        recomputed_calls=min(matched, block_calls),
        modules=len(inside),
        recomputed_modules=len(repeated.intersection(inside)),
        kept=_kept(block, [name for name in inside if name in matrices], repeated),
    )


def ran_without_gradient(tree: ModelTree, calls: Calls, judged: Iterable[BlockRecomputed]) -> tuple[str, ...]:
    """Blocks that ran but are not in ``recomputed_blocks``: they have nothing to recompute.

    A block whose ``forward`` is called directly, as in SqueezeBERT, calls no hooks; the calls of its modules show that
    it ran.
    """
    known, names = {block.name for block in judged}, block_names(tree)
    ran = {find_enclosing(name, names) for number in calls.forward for name in calls.all[number].names}
    return tuple(name for name in names if name in ran and name not in known)


def _kept(block: str, matrices: Sequence[str], repeated: frozenset[str]) -> tuple[str, ...]:
    """The outermost parts of a block that were not recomputed at all.

    Args:
        block: the block.
        matrices: its modules that have a weight matrix, in call order.
        repeated: modules that were recomputed for each of their calls.
    """
    left = [name for name in matrices if find_enclosing(name, repeated) is None]
    if len(matrices) > 1 and left == list(matrices[-1:]):  # it saves nothing, so the recomputation ended before it
        return ()
    begun = {place for name in (*repeated, block) for place in accumulate(name.split("."), "{}.{}".format)}
    parts = (list(accumulate(name.split("."), "{}.{}".format)) for name in left)
    return tuple(dict.fromkeys(next((place for place in places if place not in begun), places[-1]) for places in parts))


Kind = Literal["rms_norm", "rope", "mlp", "loss", "qkv", "o"]
"""Norms · rotary embeddings, in each attention · gated feed-forward parts · the loss, fused with the head · input and
output projections of attention, with their adapters."""

_LIBRARIES = ("liger_kernel", "unsloth", "unsloth_zoo", "axolotl", "apex", "flash_attn")
_HUB = "kernels-community"
_GATED = ("gate_proj", "up_proj", "down_proj")
_ROTARY = ("rotary", "rope")
"""Substrings in the names of rotary-embedding functions."""
_LABELS = ("labels", "shift_labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernelSite:
    """One place in a model where a fused kernel of some kind may be bound."""

    kind: Kind
    name: str
    """Name of the module."""
    library: str | None
    """The library of the bound code; None if it is not a known one."""
    called: bool
    """Whether the module was called in the forward pass."""
    hidden: bool
    """Whether a call of the module could not have been observed."""


def fused_kernel_sites(tree: ModelTree, calls: Calls, inputs: Sequence[ModelCall]) -> list[FusedKernelSite]:
    """Every place of every kind, in module order.

    Args:
        tree: the model.
        calls: calls of its modules.
        inputs: calls of the model itself; empty if they could not be observed.
    """
    unseen = tuple(f"{name}." if name else "" for name in calls.unhooked)
    trained = [call for call in training_calls(inputs) if call.gradients]
    given = all(any(call.arguments.get(name) is not None for name in _LABELS) for call in trained)
    # A fused loss runs only with labels, and trains only if the loss that it returns receives a gradient.
    trains = bool(trained) and given and all(call.loss_gradients for call in trained)
    return [
        FusedKernelSite(
            kind=kind,
            name=name,
            library=library,
            called=calls.ran(name) and (kind != "loss" or trains),
            hidden=name.startswith(unseen) or (kind == "loss" and not inputs),
        )
        for name, module in tree.modules
        for kind, library in _find_kernel_kinds(module)
    ]


def _find_kernel_kinds(module: nn.Module) -> Iterator[tuple[Kind, str | None]]:
    """The kinds of fused kernels for which a module is a place, with the library whose code is bound there."""
    children = module._modules
    forward = _unwrap(module.forward)
    if any("rmsnorm" in kind.__name__.lower().replace("_", "") for kind in type(module).__mro__):
        yield "rms_norm", _find_library(forward)
    if all(name in children for name in _GATED):
        yield "mlp", _find_library(forward)
    if "q_proj" in children and "k_proj" in children:
        yield "rope", _rotary(forward)
        yield "qkv", _projection(module, forward, "apply_qkv")
        yield "o", _projection(module, forward, "apply_o")
    if "lm_head" in children and hasattr(module, "config"):
        yield "loss", _find_library(forward) or _find_library(getattr(module, "loss_function", None))


def _rotary(forward: Any) -> str | None:
    """The library of the rotary-embedding function that a forward calls."""
    known = getattr(forward, "__globals__", {})
    called = (name for name in _named(forward) if any(word in name.lower() for word in _ROTARY))
    return next((library for name in called if (library := _find_library(known.get(name)))), None)


def _projection(module: nn.Module, forward: Any, name: str) -> str | None:
    """The library of the fused projections that an attention calls through a name bound by the library.

    If Unsloth or Axolotl cannot fuse, they bind plain projections under the same name, which are defined outside
    ``kernels``.
    """
    bound = getattr(module, name, None)
    library = _find_library(bound) if name in _named(forward) else None
    return library if library and _unwrap(bound).__module__.startswith(f"{library}.kernels.") else None


def _named(forward: Any) -> tuple[str, ...]:
    """Names in a function's code: attributes, globals, and strings as for ``getattr``."""
    code = getattr(forward, "__code__", None)
    texts = (one for one in getattr(code, "co_consts", ()) if isinstance(one, str))
    return (*getattr(code, "co_names", ()), *texts)


def _unwrap(function: Any) -> Any:
    """The function without bound methods and wrappers."""
    return inspect.unwrap(getattr(function, "__func__", function))


def _find_library(function: Any) -> str | None:
    """The library of a function: by its module, or by its file if it was loaded from the hub."""
    function = _unwrap(function) if function is not None else None
    root = str(getattr(function, "__module__", "")).partition(".")[0]
    if root in _LIBRARIES:
        return root
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return _HUB if _HUB in file else None
