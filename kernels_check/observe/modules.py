"""The modules, parameters, repeated blocks and plain tensors of a model.

``nn.Module.named_modules`` hands every module up through one generator for each level above it; a walk with a stack
of its own takes a tenth. A check asks for them some fifty times: at a moment when nothing else runs, they are read
once for all (``ModelTree``).

A transformer keeps its layers in a numbered list. What is in such a list and is more than one layer of weights is a
block; lists inside a block (the experts of a mixture) are its own. A model without such a list is taken apart into
the layers of weights that it has.

The fingerprint of a tensor is XXH3 of its bytes. On a GPU a large one is folded first: 64-bit words are mixed,
multiplied with odd weights that belong to their place in the row, and summed. Fingerprints of one kind of device are
not those of another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTree:
    """A model as it is at one moment, and what has been read of it then.

    It is valid as long as nothing adds a module or switches an adapter.
    """

    model: nn.Module
    modules: tuple[tuple[str, nn.Module], ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    readings: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """By the name of the function, see ``reading``."""

    @classmethod
    def of(cls, model: Model) -> ModelTree:
        """Read a model; one that has been read stays as it was."""
        if isinstance(model, ModelTree):
            return model
        modules = tuple(named_modules(model))
        return cls(model=model, modules=modules, parameters=tuple(_parameters(modules)))


Model: TypeAlias = nn.Module | ModelTree


def reading(read: Callable[[ModelTree], _T]) -> Callable[[Model], _T]:
    """What is read of a model, and of a tree only once."""

    @wraps(read)
    def kept(model: Model) -> _T:
        tree = ModelTree.of(model)
        if read.__qualname__ not in tree.readings:
            tree.readings[read.__qualname__] = read(tree)
        found: _T = tree.readings[read.__qualname__]
        return found

    return kept


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute, None where there is none; torch words an exception for each module that has none."""
    kind: Any = type(module)
    if kind.__getattr__ is not nn.Module.__getattr__ or hasattr(kind, name):
        return getattr(module, name, None)
    for held in (vars(module), module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    return None


def named_modules(model: Model, prefix: str = "", *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name; the model itself is called ``prefix``.

    Args:
        model: of any kind.
        prefix: what each name begins with.
        remove_duplicate: whether each module comes once, by the first of its names, or once by each.
    """
    if isinstance(model, ModelTree):
        if remove_duplicate and not prefix:
            yield from model.modules
            return
        model = model.model
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [(prefix, model)]
    while waiting:
        name, module = waiting.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield name, module
        if module._modules:
            path = f"{name}." if name else ""
            children = reversed(module._modules.items())
            waiting += [(path + key, child) for key, child in children if child is not None]


def every_module(model: Model) -> Iterator[nn.Module]:
    """Every module once."""
    return (module for _, module in named_modules(model))


def named_parameters(model: Model, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by the first of its names, which begins with ``prefix``."""
    if isinstance(model, ModelTree) and not prefix:
        return iter(model.parameters)
    return _parameters(named_modules(model, prefix))


def _parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[int] = set()
    for name, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{key}" if name else key), parameter


def every_parameter(model: Model) -> Iterator[nn.Parameter]:
    """Every parameter once."""
    return (parameter for _, parameter in named_parameters(model))


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the blocks, in the order in which the model holds them."""
    lists = [items for items in _lists(model, "") if _of_blocks(items)] or list(_lists(model, ""))
    named = {id(item): name for items in reversed(lists) for name, item in reversed(items)}
    if not named:
        named = {id(module): name for name, module in named_modules(model) if _own_parameters(module)}
        inside = tuple(f"{name}." if name else "" for name in named.values())
        return tuple(name for name in named.values() if not any(name != one and name.startswith(one) for one in inside))
    return tuple(reversed(named.values()))


def block_of(name: str, blocks: frozenset[str]) -> str | None:
    """The block that a module of this name is or lies in."""
    while name not in blocks:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _lists(module: nn.Module, name: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """The outermost lists of blocks."""
    items = _items(module, name)
    if items:
        yield items
        return
    for key, child in module.named_children():
        yield from _lists(child, _path(name, key))


def _of_blocks(items: list[tuple[str, nn.Module]]) -> bool:
    return any(not _is_leaf(item) for _, item in items)


def _items(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """What a list holds that has parameters; empty where it is no list of blocks.

    A sequence whose members are all of different kinds is a model taken apart, not a list of its blocks.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    items = [
        (_path(name, key), child)
        for key, child in module.named_children()
        if any(True for _ in child.parameters()) and key.isdigit()
    ]
    kinds = [_kind(child) for _, child in items]
    repeats = isinstance(module, nn.ModuleList) or len(set(kinds)) < len(kinds)
    return items if repeats else []


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a block below what wraps it alone: a compiled, parallel or recomputing wrapper."""
    while True:
        children = list(module.children())
        if len(children) != 1 or module._parameters:
            return type(module)
        module = children[0]


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is a single layer of weights; an adapter makes it no more than that."""
    return not module._modules or hasattr(module, "base_layer")


def _own_parameters(module: nn.Module) -> bool:
    return bool(module._parameters) or hasattr(module, "base_layer")


_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def without_repacking(model: nn.Module) -> Iterator[None]:
    """Keep the layout in which 4-bit weights are stored, whatever is called inside the block."""
    layers = [(module, getattr(module, _SWITCH)) for module in model.modules() if _SWITCH in vars(module)]
    try:
        for layer, _ in layers:
            setattr(layer, _SWITCH, False)
        yield
    finally:
        for layer, repacks in layers:
            setattr(layer, _SWITCH, repacks)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def plain_parts(tensor: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors without structure that one is made of, each with its name; a plain one is its own only part."""
    if is_wrapper(tensor):
        for part, inner in _inner(tensor):
            yield from plain_parts(inner, f"{name}.{part}")
    elif tensor.layout == torch.sparse_coo:
        yield f"{name}.indices", tensor.detach()._indices()
        yield f"{name}.values", tensor.detach()._values()
    elif tensor.layout in _COMPRESSED:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield f"{name}.compressed_indices", tensor.detach().crow_indices() if rows else tensor.detach().ccol_indices()
        yield f"{name}.plain_indices", tensor.detach().col_indices() if rows else tensor.detach().row_indices()
        yield f"{name}.values", tensor.detach().values()
    else:
        yield name, tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor has no bytes of its own but other tensors inside."""
    return type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor)


def _inner(tensor: Any) -> list[tuple[str, Tensor]]:
    names, _ = tensor.__tensor_flatten__()
    return [(name, part) for name in names if isinstance(part := getattr(tensor, name), Tensor)]


_WORDS = 4096
"""In a row."""
_ROW_BYTES = _WORDS * 8
NO_MEMORY = "it has no memory: freed, or of a class that cannot be taken apart"
_ROWS = 2048
"""In a block."""
_SHIFT = 29
"""Brings down the highest bits, pairs of which would cancel in a sum of products. It is no distance of two lanes of a
word, such as 8, 16 or 32, at which all elements may have been changed alike, as by a negation."""
_SEED = 20_240_229


class Fingerprinter:
    """Takes fingerprints, and each tensor's only once, however many names it has.

    Args:
        folds: whether what lies on a kind of device is folded before it is read.
    """

    def __init__(self, folds: Callable[[str], bool] = "cpu".__ne__) -> None:
        self._folds = folds
        self._weights: dict[torch.device, Tensor] = {}
        self._taken: dict[object, tuple[Tensor, str]] = {}
        self.bytes = 0
        """Of all memory that was read."""

    def __call__(self, tensor: Tensor) -> str:
        """Fingerprint type, shape and bytes of a dense tensor, in the order of its elements.

        Raises:
            Exception: it cannot be read.
        """
        if not has_memory(tensor):
            raise ValueError(NO_MEMORY)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._taken:
            self._taken[place] = (tensor, self._take(tensor))  # kept alive, so that nothing else comes to lie there
            self.bytes += tensor.numel() * tensor.element_size()
        return self._taken[place][1]

    def _take(self, tensor: Tensor) -> str:
        raw = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        hashed = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if raw.numel() > 2 * _ROW_BYTES and self._folds(raw.device.type):
            whole = raw.numel() // _ROW_BYTES * _ROW_BYTES
            sums = torch.cat([self._fold(block) for block in _blocks(raw[:whole].view(-1, _ROW_BYTES))])
            _add(hashed, sums.view(torch.uint8))
            raw = raw[whole:]
        _add(hashed, raw)
        return hashed.hexdigest()

    def _fold(self, block: Tensor) -> Tensor:
        words = block.view(torch.int64)
        mixed = words >> _SHIFT
        mixed &= (1 << 64 - _SHIFT) - 1
        mixed ^= words
        mixed *= self._weights_on(block.device)
        return mixed.sum(-1)

    def _weights_on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            chance = torch.Generator().manual_seed(_SEED)
            self._weights[device] = (torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=chance) | 1).to(device)
        return self._weights[device]


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in memory; reading one that was freed ends the process."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = int(tensor.storage_offset() + last + 1) * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        return bool(storage.data_ptr()) and storage.nbytes() >= end
    except RuntimeError:  # a class without any
        return False


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    aligned = rows.storage_offset() % 8 == 0
    for block in rows.split(_ROWS):
        yield block if aligned else block.clone()


def _add(hashed: xxhash.xxh3_128, raw: Tensor) -> None:
    """Not by way of numpy: memory that it has seen can never be resized again, which some trainers do."""
    here = raw.cpu().contiguous()
    if here.numel():
        hashed.update((ctypes.c_char * here.numel()).from_address(here.data_ptr()))


def largest(gradient: Tensor) -> Tensor | None:
    """Largest magnitude of the part of a gradient that is here, on its device; None where no part of it is here.

    It is zero where all are, infinite or not a number where any is.
    """
    with torch.no_grad():
        gradient = gradient.detach()
        if gradient.layout == torch.sparse_coo:
            values: list[Tensor] = [gradient.coalesce().values()]
        elif gradient.layout != torch.strided:
            values = [gradient.values()]
        else:
            values = [part for _, part in plain_parts(gradient)]
        if not is_wrapper(gradient) and not values[0].numel():
            return values[0].new_zeros(()).float()  # a sparse gradient of no rows
        sizes = [torch.linalg.vector_norm(part.float(), float("inf")) for part in values if part.numel()]
        return torch.stack(sizes).amax() if sizes else None


class Below(dict[str, bool]):
    """Whether a qualified name is one of some paths or below one, each found out once.

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
