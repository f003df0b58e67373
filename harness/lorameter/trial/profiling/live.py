"""Which tensors are alive while a step runs, by kind, without asking the allocator.

Every operator's results pass a dispatch mode, which keeps a weak reference to each storage: while that lives, its bytes
count. What autograd keeps for the backward pass is seen by its own hooks (torch.autograd.graph.saved_tensors_hooks):
under checkpointing they see what is kept, and not what will be computed again. Views share a storage and count once;
what an operator allocates and frees inside itself is never seen.

A compiled step runs without the mode, which would make it run uncompiled: only what is saved and the gradients are then
seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANK = ("temporaries", "activations", "gradients", "kv_cache", "logits")
"""A storage's kind can only rise in this order: a temporary becomes an activation when it is saved."""


class LiveTensors:
    """Bytes of live storages by kind, the resident ones left out."""

    def __init__(
        self, *, resident: Collection[int], vocabulary: int, device: str, looked: Callable[[dict[str, int]], None]
    ) -> None:
        """Counts tensors, and reports to `looked`.

        Args:
            resident: addresses of storages that are counted elsewhere.
            vocabulary: a tensor whose last dimension is this is one of logits.
            device: tensors elsewhere are not counted.
            looked: called with the bytes by kind after each operator; it must not change them.
        """
        self._resident = resident
        self._vocabulary = vocabulary
        self._device = torch.device(device).type
        self._looked = looked
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.bytes: dict[str, int] = dict.fromkeys(RANK, 0)
        """Alive now."""

    def note(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage as of this kind, or of a higher one that it has."""
        if tensor.device.type != self._device or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._resident:
            return
        if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            kind = "logits"
        key = id(storage)
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._kinds[key], self._sizes[key] = kind, storage.nbytes()
            self.bytes[kind] += self._sizes[key]
        elif RANK.index(kind) > RANK.index(self._kinds[key]):
            self.bytes[self._kinds[key]] -= self._sizes[key]
            self.bytes[kind] += self._sizes[key]
            self._kinds[key] = kind

    @contextlib.contextmanager
    def watching(self, parameters: Sequence[torch.nn.Parameter], *, compiled: bool = False) -> Iterator[None]:
        """For the time of a step on these trained parameters."""
        mode = contextlib.nullcontext() if compiled else _Mode(self)
        hooks = [parameter.register_post_accumulate_grad_hook(self._accumulated) for parameter in parameters]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._saved, _unpacked), mode:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def look(self) -> None:
        """Something has changed."""
        self._looked(self.bytes)

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.note(tensor, "activations")
        self.look()
        return tensor.detach()  # itself would be a cycle, which only the collector frees

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.note(parameter.grad, "gradients")

    def _forget(self, key: int) -> None:
        self.bytes[self._kinds.pop(key)] -= self._sizes.pop(key)
        del self._alive[key]


def _unpacked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Mode(TorchDispatchMode):
    def __init__(self, live: LiveTensors) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._live.note(leaf, "temporaries")
        self._live.look()
        return result
