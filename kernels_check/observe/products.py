"""The matrix products of a forward pass, each with the module that it ran in: 4-bit ones, and all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kernels_check.observe.operators import (
    FOURBIT,
    PRODUCTS,
    Operator,
    ancestors,
    descendants,
    in_backward,
    region_of,
)

Path = Literal["dequantize", "fused", "packed_cpu", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One product of the forward pass."""

    op: str
    dtype: str | None
    """In which it was computed, after any autocast."""
    path: Path | None = None
    """How a product with a 4-bit weight was computed; None for any other."""
    call: int | None = None
    """Number of the call of a module of the model in which it ran; None outside the model."""
    compiled: bool = False
    """Whether it ran inside code of torch.compile, where no module is known."""
    recomputed: bool = False


def fourbit_products(host: Sequence[Operator], *, on_cuda: bool) -> Iterator[Product]:
    """Tell the path of each 4-bit product by what the operator calls inside.

    The operator is ``gemm_4bit`` on every path; dequantising ends in an ordinary ``aten::linear``, the fused CUDA
    kernel in none (bitsandbytes 0.50 ``backends/cuda/ops.py``). Packed weights of AVX512 use ``gemv_4bit``.
    """
    for event in host:
        if event.name not in FOURBIT:
            continue
        path: Path = "fused" if on_cuda else "packed_cpu"
        if event.name == "bitsandbytes::gemm_4bit":
            inside = {child.name for child in descendants(event)}
            dequantised = bool(inside & {"aten::linear", "bitsandbytes::dequantize_4bit"})
            path = "dequantize" if dequantised else "fused" if on_cuda else "unknown"
        # The packed kernel computes in bfloat16 whatever it is given.
        dtype = "bfloat16" if path == "packed_cpu" else event.dtype(0)
        yield _product(event, dtype, path)


def plain_products(host: Sequence[Operator]) -> Iterator[Product]:
    """Every other product of the forward pass; the innermost where one is recorded inside another."""
    for event in host:
        if event.name not in PRODUCTS or any(child.name in PRODUCTS for child in descendants(event)):
            continue
        if not in_backward(event) and not any(parent.name in FOURBIT for parent in ancestors(event)):
            first = 1 if event.name in ("aten::addmm", "aten::_addmm_activation", "aten::baddbmm", "aten::addmv") else 0
            yield _product(event, event.dtype(first), None)


def _product(event: Operator, dtype: str | None, path: Path | None) -> Product:
    return Product(
        op=event.name,
        dtype=dtype,
        path=path,
        call=event.call,
        compiled=region_of(event) is not None,
        recomputed=in_backward(event),
    )
