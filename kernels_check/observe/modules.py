"""Reads, hooks and restores a model.

A check needs the modules and parameters about fifty times, so they are read once and cached (``ModelTree``). A
transformer keeps its layers in a numbered list. A member of such a list with more than one weight layer is a block;
lists inside a block (the experts of a mixture) belong to it. In a model without such a list every weight layer is a
block.

Hooks change nothing in a step. An exception in a hook is recorded and does not reach the step. torch.compile does not
trace hooks. A copy of a module and a saved module carry none of these hooks. Only a class that lists its own state
copies them; then they do nothing in the copy and do not refer to this project.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_T = TypeVar("_T")


class ModelTree:
    """A model at one moment, with a cache of everything read from it.

    It is valid as long as nothing adds a module or switches an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = tuple(model.named_modules())
        self.parameters = tuple(model.named_parameters())
        self.readings: dict[str, Any] = {}
        """Cached results by the name of the function, see ``cache_in_tree``."""


def cache_in_tree(read: Callable[[ModelTree], _T]) -> Callable[[nn.Module | ModelTree], _T]:
    """Cache the result of a function of a model in its ``ModelTree``."""

    @wraps(read)
    def cached(model: nn.Module | ModelTree) -> _T:
        tree = model if isinstance(model, ModelTree) else ModelTree(model)
        if read.__qualname__ not in tree.readings:
            tree.readings[read.__qualname__] = read(tree)
        found: _T = tree.readings[read.__qualname__]
        return found

    return cached


def training_modes(tree: ModelTree) -> dict[str, bool]:
    """``training`` of every module."""
    return {name: module.training for name, module in tree.modules}


@cache_in_tree
def modules_by_name(tree: ModelTree) -> dict[str, nn.Module]:
    """Every module under each of its names: a module held in several places has several."""
    return dict(tree.model.named_modules(remove_duplicate=False))


@cache_in_tree
def block_names(tree: ModelTree) -> dict[str, None]:
    """Qualified names of the blocks, in model order, as the keys of a dictionary."""
    lists: dict[str, dict[str, nn.Module]] = {}
    """The outermost lists, by the prefix of their members."""
    for name, module in tree.modules:
        prefix = f"{name}." if name else ""
        if not name.startswith(tuple(lists)) and (items := _items(module, prefix)):
            lists[prefix] = items
    # A single weight layer is no block, with or without an adapter.
    of_blocks = [
        items
        for items in lists.values()
        if not all(not item._modules or hasattr(item, "base_layer") for item in items.values())
    ] or list(lists.values())
    named = {id(item): name for items in reversed(of_blocks) for name, item in reversed(items.items())}
    layers = (name for name, module in tree.modules if module._parameters or hasattr(module, "base_layer"))
    return dict.fromkeys(list(reversed(named.values())) or outermost(layers))


def outermost(names: Iterable[str]) -> list[str]:
    """Names of modules that are not inside another of the named modules."""
    found = dict.fromkeys(names)
    return [name for name in found if not name or find_enclosing(name.rpartition(".")[0], found) is None]


def find_enclosing(name: str, names: Container[str]) -> str | None:
    """The first of ``name`` and the names above it that is among ``names``; None if there is none.

    ``""`` is the model itself, above every name.
    """
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name if name in names else None


def _items(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Members of a module list that have parameters, by name; empty if the module is not a list of blocks.

    A sequence whose members are all of different classes holds the parts of a model, not its blocks.
    """
    items = {
        f"{prefix}{key}": child
        for key, child in (module.named_children() if isinstance(module, nn.ModuleList | nn.Sequential) else ())
        if any(True for _ in child.parameters()) and key.isdigit()
    }
    return items if isinstance(module, nn.ModuleList) or len(set(map(_kind, items.values()))) < len(items) else {}


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a block inside its wrappers for compilation, parallelism or recomputation."""
    while len(children := list(module.children())) == 1 and not module._parameters:
        module = children[0]
    return type(module)


def is_checkpointing_enabled(module: Any) -> bool:
    """Whether a model of transformers has its flag for gradient checkpointing on."""
    # transformers renamed the flag, and reading the old name gives a warning.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(module, name) for name in names if hasattr(module, name)), False))


_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def without_repacking(model: nn.Module) -> Iterator[None]:
    """Keep the storage layout of 4-bit weights unchanged inside the block."""
    with ExitStack() as stack:
        for layer in (module for module in model.modules() if _SWITCH in vars(module)):
            stack.enter_context(patch.object(layer, _SWITCH, False))
        yield


def plain_parts(tensor: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside a tensor subclass, each with its name; a plain tensor yields itself."""
    if is_wrapper(tensor):
        keys, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {key: getattr(tensor, key) for key in keys}
        yield from (
            part
            for key, value in inner.items()
            if isinstance(value, Tensor)
            for part in plain_parts(value, f"{name}.{key}")
        )
    elif tensor.layout == torch.sparse_coo:
        sparse = tensor.detach().coalesce()
        yield from ((f"{name}.indices", sparse.indices()), (f"{name}.values", sparse.values()))
    else:
        yield name, tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor has no memory of its own, only inner tensors."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


NO_MEMORY = "it has no memory: freed, or of a class whose parts cannot be read"


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements are in memory; reading a freed tensor crashes the process."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = int(tensor.storage_offset() + last + 1) * tensor.element_size()
    with suppress(RuntimeError):  # a class without storage
        storage = tensor.untyped_storage()
        return not tensor.numel() or (bool(storage.data_ptr()) and storage.nbytes() >= end)
    return not tensor.numel()


def largest_magnitude(gradient: Tensor) -> Tensor | None:
    """Largest magnitude in this rank's part of a gradient, on its device; None if this rank has no part of it.

    The result is zero if all elements are zero, and infinite or NaN if any element is.
    """
    with torch.no_grad():
        gradient = gradient.detach()
        if gradient.layout == torch.sparse_coo:
            gradient = gradient.coalesce().values()
        if is_wrapper(gradient):
            sizes = [
                size
                for _, part in plain_parts(gradient)
                if part.numel() and (size := largest_magnitude(part)) is not None
            ]
            return torch.stack(sizes).amax() if sizes else None
        if not gradient.numel():
            return gradient.new_zeros(()).float()  # a sparse gradient of no rows
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(gradient, float("inf"), dtype=wide)
        return norm


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

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Called by torch as a module hook."""
        is_own = module is self._module or getattr(module, "_is_replica", False)
        return self._hook(module, *arguments) if is_own else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a function that takes any arguments and does nothing."""
        return getattr, (nullcontext(), "__exit__")


@contextmanager
def left_out_of_copies() -> Iterator[None]:
    """Leave the hooks of this module out of every copy, and of every file, made of a module inside the block."""

    def state(module: nn.Module) -> Any:
        kept = dict(vars(module))
        for hooks, *options in _HOOKS:
            own = [key for key, hook in kept[hooks].items() if isinstance(hook, ModuleHook)]
            for name in (hooks, *options) if own else ():
                kept[name] = type(kept[name])((key, value) for key, value in kept[name].items() if key not in own)
        return kept

    with patch.object(nn.Module, "__getstate__", state):
        yield


_HOOKS = (
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
"""Attributes of a module with its hooks, each with those that hold the options of these hooks by the same keys."""


def hook_gradient(hooks: ExitStack, parameter: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """Call a hook with each gradient of a parameter, until the stack is closed."""
    hooks.callback(_drop_empty_hooks, parameter)
    hooks.push(parameter.register_hook(hook))


def _drop_empty_hooks(parameter: Tensor) -> None:
    """Without this, autograd calls into Python for each parameter that has had a hook, in every later step."""
    if not parameter._backward_hooks:
        parameter._backward_hooks = None


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
        before, now = [self._torch], [torch.get_rng_state()]
        if self._cuda is not None:
            before, now = before + self._cuda, now + torch.cuda.get_rng_state_all()
        return not all(map(torch.equal, before, now))


class Modes:
    """The train/eval mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Restore every module's mode one by one: ``model.train()`` would lose mixed modes."""
        for module, training in self._modes:
            module.training = training


class Buffers:
    """The buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (one._buffers, name, value, value._version, value.detach().clone())
            for one in model.modules()
            for name, value in one._buffers.items()
            if value is not None
        ]

    def restore(self) -> None:
        """Restore the buffers that were replaced, and the values of those that were written to."""
        for buffers, name, value, version, values in self._held:
            buffers[name] = value
            if value._version != version:
                value.detach().copy_(values)


@contextmanager
def restore_training(model: nn.Module) -> Iterator[None]:
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
            for parameter, gradient, gradient_copy in gradients:
                if gradient is not None and gradient_copy is not None:
                    gradient.copy_(gradient_copy)
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
