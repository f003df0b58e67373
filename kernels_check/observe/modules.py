"""Reads, hooks and restores a model.

A check needs the modules and parameters about fifty times, so they are read once and cached (``ModelTree``). A
transformer keeps its layers in a numbered list. A member of such a list with more than one weight layer is a block;
lists inside a block (the experts of a mixture) belong to it. In a model without such a list every weight layer is a
block.

Hooks change nothing in a step. An exception in a hook is recorded and does not reach the step. torch.compile does not
trace hooks. Copying or saving a module also copies its hooks; in the copy and in the file they do nothing and do not
refer to this project.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTree:
    """A model at one moment, with a cache of everything read from it.

    It is valid as long as nothing adds a module or switches an adapter.
    """

    model: nn.Module
    modules: tuple[tuple[str, nn.Module], ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    readings: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Cached results by the name of the function, see ``reading``."""

    @classmethod
    def of(cls, model: nn.Module | ModelTree) -> ModelTree:
        """Read a model; a ``ModelTree`` is returned unchanged."""
        if isinstance(model, ModelTree):
            return model
        return cls(model=model, modules=tuple(model.named_modules()), parameters=tuple(model.named_parameters()))


def reading(read: Callable[[ModelTree], _T]) -> Callable[[nn.Module | ModelTree], _T]:
    """Cache the result of a function of a model in its ``ModelTree``."""

    @wraps(read)
    def kept(model: nn.Module | ModelTree) -> _T:
        tree = ModelTree.of(model)
        if read.__qualname__ not in tree.readings:
            tree.readings[read.__qualname__] = read(tree)
        found: _T = tree.readings[read.__qualname__]
        return found

    return kept


@reading
def block_names(tree: ModelTree) -> tuple[str, ...]:
    """Qualified names of the blocks, in model order."""
    lists = list[dict[str, nn.Module]]()
    """The outermost lists."""
    inside: tuple[str, ...] = ()
    for name, module in tree.modules:
        prefix = f"{name}." if name else ""
        items = {} if name.startswith(inside) else _items(module, prefix)
        if items:
            lists.append(items)
            inside += (prefix,)
    # A single weight layer is no block, with or without an adapter.
    of_blocks = [
        items for items in lists if not all(not item._modules or hasattr(item, "base_layer") for item in items.values())
    ] or lists
    named = {id(item): name for items in reversed(of_blocks) for name, item in reversed(items.items())}
    layers = (name for name, module in tree.modules if module._parameters or hasattr(module, "base_layer"))
    return tuple(reversed(named.values())) if named else tuple(outermost(layers))


def outermost(names: Iterable[str]) -> list[str]:
    """Names of modules that are not inside another of the named modules."""
    names = list(names)
    within = Below(names)
    return [name for name in names if not name or ("" not in names and not within[name.rpartition(".")[0]])]


def block_of(name: str, blocks: frozenset[str]) -> str | None:
    """The block with this name or the block that contains the named module; None if there is none."""
    while name not in blocks:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _items(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Members of a module list that have parameters, by name; empty if the module is not a list of blocks.

    A sequence whose members are all of different classes holds the parts of a model, not its blocks.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return {}
    items = {
        f"{prefix}{key}": child
        for key, child in module.named_children()
        if any(True for _ in child.parameters()) and key.isdigit()
    }
    kinds = {_kind(child) for child in items.values()}
    return items if isinstance(module, nn.ModuleList) or len(kinds) < len(items) else {}


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a block inside its wrappers for compilation, parallelism or recomputation."""
    while True:
        children = list(module.children())
        if len(children) != 1 or module._parameters:
            return type(module)
        module = children[0]


def is_checkpointing_enabled(module: Any) -> bool:
    """Whether a model of transformers has its flag for gradient checkpointing on."""
    # transformers renamed the flag, and reading the old name gives a warning.
    name = "is_activation_checkpointing"
    return bool(getattr(module, name if hasattr(module, name) else "is_gradient_checkpointing", False))


_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def without_repacking(model: nn.Module) -> Iterator[None]:
    """Keep the storage layout of 4-bit weights unchanged inside the block."""
    layers = [(module, getattr(module, _SWITCH)) for module in model.modules() if _SWITCH in vars(module)]
    try:
        for layer, _ in layers:
            setattr(layer, _SWITCH, False)
        yield
    finally:
        for layer, repacks in layers:
            setattr(layer, _SWITCH, repacks)


def plain_parts(tensor: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside a tensor subclass, each with its name; a plain tensor yields itself."""
    if is_wrapper(tensor):
        for part, inner in _inner(tensor):
            yield from plain_parts(inner, f"{name}.{part}")
    elif tensor.layout == torch.sparse_coo:
        sparse = tensor.detach().coalesce()
        yield from ((f"{name}.indices", sparse.indices()), (f"{name}.values", sparse.values()))
    else:
        yield name, tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor has no memory of its own, only inner tensors."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def _inner(tensor: Any) -> list[tuple[str, Tensor]]:
    names, _ = tensor.__tensor_flatten__()
    return [(name, part) for name in names if isinstance(part := getattr(tensor, name), Tensor)]


NO_MEMORY = "it has no memory: freed, or of a class whose parts cannot be read"


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements are in memory; reading a freed tensor crashes the process."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = int(tensor.storage_offset() + last + 1) * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        return bool(storage.data_ptr()) and storage.nbytes() >= end
    except RuntimeError:  # a class without storage
        return False


def largest(gradient: Tensor) -> Tensor | None:
    """Largest magnitude in this rank's part of a gradient, on its device; None if this rank has no part of it.

    The result is zero if all elements are zero, and infinite or NaN if any element is.
    """
    with torch.no_grad():
        gradient = gradient.detach()
        if gradient.layout == torch.sparse_coo:
            gradient = gradient.coalesce().values()
        if is_wrapper(gradient):
            sizes = [size for _, part in plain_parts(gradient) if part.numel() and (size := largest(part)) is not None]
            return torch.stack(sizes).amax() if sizes else None
        if not gradient.numel():
            return gradient.new_zeros(()).float()  # a sparse gradient of no rows
        norm: Tensor = torch.linalg.vector_norm(gradient, float("inf"), dtype=torch.float32)
        return norm


class Below(dict[str, bool]):
    """Whether a qualified name is one of some paths or below one; caches each answer.

    Args:
        paths: qualified names.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self._paths = frozenset(paths)

    def __missing__(self, name: str) -> bool:
        above, dot, _ = name.rpartition(".")
        self[name] = found = name in self._paths or (bool(dot) and self[above])
        return found


Hook: TypeAlias = Callable[..., Any]


def backward_task() -> int:
    """Number of the autograd run that this thread executes; -1 outside a backward pass."""
    return torch._C._current_graph_task_id()


class ModuleHook:
    """A hook on one module that ignores calls of the module's copies.

    A shallow copy shares the module's dictionary of hooks, and a deep copy has a copy of it. The replicas of
    ``DataParallel`` count as the module itself: their gradients flow to its parameters.

    Args:
        module: the module on which it is registered.
        hook: called with the arguments of a torch hook.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = module, hook
        _keep_from_compiler(ModuleHook.__call__.__code__)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Called by torch as a module hook."""
        if module is self._module or getattr(module, "_is_replica", False):
            return self._hook(module, *given)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a function that takes any arguments and does nothing."""
        return getattr, (nullcontext(), "__exit__")


class HookGuard:
    """Keeps the first exception of its hooks."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def __call__(self, hook: Hook) -> Hook:
        """Wrap a hook so that it raises nothing; after a failure it does nothing."""

        def shielded(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.fault = self.fault or f"{type(error).__name__}: {error}"
                return None

        _keep_from_compiler(shielded.__code__)
        return wraps(hook)(shielded) if hasattr(hook, "__name__") else shielded


@cache
def _keep_from_compiler(code: Any) -> None:
    """Keep torch.compile from compiling the code of a function and of all that it calls."""
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class RandomState:
    """The generators of Python, NumPy (if loaded), torch on the CPU, and CUDA (if initialised)."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set every generator back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def advanced(self) -> bool:
        """Whether torch has drawn random numbers since the object was created."""
        moved = not torch.equal(self._torch, torch.get_rng_state())
        if self._cuda is None:
            return moved
        pairs = zip(self._cuda, torch.cuda.get_rng_state_all(), strict=True)
        return moved or any(not torch.equal(before, now) for before, now in pairs)


class Modes:
    """The train/eval mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Restore every module's mode one by one: ``model.train()`` would lose mixed modes."""
        for module, training in self._modes:
            module.training = training


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the state of a training at the end of the block, also after an exception.

    These are restored bit for bit: values of the parameters of ``model`` that require gradients, and of those that an
    optimizer updates in the block; gradients of all parameters of ``model``; state and parameter groups of every
    ``torch.optim.Optimizer`` that steps in the block; the generators of Python, NumPy and torch; the train/eval mode of
    every module. Nothing else is restored: not buffers, frozen parameters or attributes of modules, and not schedulers,
    gradient scalers, data iterators or counters in other objects.
    """
    synchronise()
    modes, numbers = Modes(model), RandomState()
    gradients = [(one, one.grad, None if one.grad is None else one.grad.detach().clone()) for one in model.parameters()]
    values = {id(value): (value, value.detach().clone()) for value in model.parameters() if value.requires_grad}
    groups = dict[int, tuple[Optimizer, list[Any]]]()
    mappings = list[tuple[Any, dict[Any, Any], dict[Any, Tensor]]]()
    """The optimizers' states and groups: each mapping, its contents, and copies of its tensors."""

    def before_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in groups:
            return
        groups[id(optimizer)] = optimizer, list(optimizer.param_groups)
        for mapping in (optimizer.state, *optimizer.state.values(), *optimizer.param_groups):
            copies = {key: value.detach().clone() for key, value in mapping.items() if isinstance(value, Tensor)}
            mappings.append((mapping, dict(mapping), copies))
        for value in (value for group in optimizer.param_groups for value in group["params"]):
            if id(value) not in values and (value.requires_grad or value.grad is not None):
                values[id(value)] = value, value.detach().clone()

    handle = register_optimizer_step_pre_hook(before_update)
    try:
        yield
    finally:
        handle.remove()
        synchronise()
        with torch.no_grad():
            for parameter, value in values.values():
                if parameter.dtype == value.dtype and parameter.shape == value.shape:
                    parameter.detach().copy_(value)
                else:  # bitsandbytes casts a bias in the first forward
                    parameter.data = value
            for parameter, gradient, kept in gradients:
                if gradient is not None and kept is not None:
                    gradient.copy_(kept)
                parameter.grad = gradient
            for mapping, held, copies in mappings:
                mapping.clear()
                mapping.update(held)
                for key, copy in copies.items():
                    held[key].detach().copy_(copy)
            for optimizer, kept_groups in groups.values():
                optimizer.param_groups[:] = kept_groups
        modes.restore()
        numbers.restore()


def synchronise() -> None:
    """Wait for the device, if one is in use; never initialises CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
