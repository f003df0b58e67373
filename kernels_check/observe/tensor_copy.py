"""A copy of one tensor, and writing it back in place, so that everyone who holds the tensor sees it.

A tensor of a wrapper class (DTensor, the quantised ones of torchao) supports the operators that its class cared for,
and copying need not be among them; the plain tensors inside it support all. So these are what is copied. What cannot be
copied and written back is refused when the copy is made, which is before anything has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kernels_check.observe.mmap_copy import copy_of

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


class TensorCopy:
    """The bytes of a tensor and the place where they lie.

    Args:
        tensor: of any kind; one on the meta device has no bytes and keeps none here.
        name: for messages.
        values: whether to copy the bytes; without, only the place comes back.

    Raises:
        ValueError: the tensor cannot be copied, or not be written back.
    """

    __slots__ = ("_copy", "_parts", "_place", "_size_bytes", "_tensor", "name")

    def __init__(self, tensor: Tensor, name: str, *, values: bool = True) -> None:
        self._tensor, self.name = tensor, name
        self._parts: list[tuple[str, Tensor, TensorCopy]] = []
        self._place: Tensor | None = None
        self._copy: Tensor | None = None
        self._size_bytes = 0
        """Of the storage, which may be freed while something still points there."""
        try:
            self._take(values)
        except Exception as error:
            raise ValueError(f"{name} ({_kind(tensor)}) cannot be copied and written back: {error}") from error

    def _take(self, values: bool) -> None:
        tensor = self._tensor
        if is_lazy(tensor):
            raise ValueError("it has no shape yet, call the model once before")
        if is_wrapper(tensor):
            names = _inner(tensor)
            self._parts = [(name, part, TensorCopy(part, f"{self.name}.{name}", values=values)) for name, part in names]
            return
        if tensor.is_meta:
            return
        place = tensor.detach()
        if tensor.layout == torch.strided and not tensor.is_quantized:
            self._size_bytes = tensor.untyped_storage().nbytes()
            if tensor.numel() and not self._size_bytes:
                raise ValueError("its storage has been freed")
            self._place = place
            self._copy = copy_of(_dense(place)) if values else None
        elif values:
            self._place, self._copy = tensor, place.clone()  # detached, a sparse tensor is one of its own
            with torch.no_grad():
                _write(tensor, self._copy)  # a rehearsal: not every layout can be written to

    @property
    def has_values(self) -> bool:
        """Whether the bytes were copied, not only the place."""
        return self._copy is not None or any(copy.has_values for _, _, copy in self._parts)

    def changed(self) -> bool:
        """Whether the tensor differs from the copy in value, shape or type."""
        if self._parts:
            return any(getattr(self._tensor, name) is not part or copy.changed() for name, part, copy in self._parts)
        if self._copy is None or self._place is None:
            return False
        now = self._tensor.detach()
        if now.shape != self._place.shape or now.dtype != self._place.dtype or now.layout != self._place.layout:
            return True
        if now.layout == torch.strided and not now.is_quantized:
            freed = now.untyped_storage().nbytes() < self._size_bytes
            return freed or not _same_bits(_dense(now), self._copy)
        return not torch.equal(_spread(now), _spread(self._copy))

    def restore_changed(self) -> None:
        """Write only to a tensor that differs: a graph that somebody holds may need it unwritten."""
        if self._moved() or self.changed():
            self.restore()

    def _moved(self) -> bool:
        place = self._place
        return place is not None and place.layout == torch.strided and not _same_place(self._tensor, place)

    def restore(self) -> None:
        """Write the copy back in place, into the memory that was the tensor's when it was copied."""
        for name, part, copy in self._parts:
            if getattr(self._tensor, name) is not part:
                setattr(self._tensor, name, part)
            copy.restore()
        if self._place is None:
            return
        if self._moved():
            self._tensor.data = self._place
        if self._copy is not None:
            if self._size_bytes and self._size_bytes > self._place.untyped_storage().nbytes():
                self._place.untyped_storage().resize_(self._size_bytes)
            with torch.no_grad():
                _write(_dense(self._place), self._copy)


def size_bytes(tensor: Tensor) -> int:
    """Bytes that a copy takes."""
    if is_lazy(tensor):
        return 0
    return sum(part.numel() * part.element_size() for _, part in plain_parts(tensor) if not part.is_meta)


def _inner(tensor: Any) -> list[tuple[str, Tensor]]:
    names, _ = tensor.__tensor_flatten__()
    return [(name, part) for name in names if isinstance(part := getattr(tensor, name), Tensor)]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal byte by byte: what is not a number equals itself, and zero is not its negative."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _dense(place: Tensor) -> Tensor:
    """The memory of a tensor whose elements lie on each other, as expanded ones do; others are their own."""
    if place.layout != torch.strided or place.is_contiguous() or torch._debug_has_internal_overlap(place) != 1:
        return place
    span = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.stride(), strict=True))
    return place.as_strided((span,), (1,))


def _same_place(tensor: Tensor, place: Tensor) -> bool:
    return (
        tensor.data_ptr() == place.data_ptr()
        and tensor.shape == place.shape
        and tensor.stride() == place.stride()
        and tensor.dtype == place.dtype
        and tensor.device == place.device
    )


def _write(target: Tensor, source: Tensor) -> None:
    with torch.inference_mode() if target.is_inference() else nullcontext():
        target.copy_(source)


def _spread(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {str(tensor.layout).removeprefix('torch.')}"
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}{layout}"
