"""The plain tensors that a tensor of a wrapper class (DTensor, the quantised ones of torchao) is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
