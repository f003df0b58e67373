"""FLOPs as torch counts them, operator by operator, while something runs.

torch's counter knows aten's products and the fused attentions of CUDA, and passes over what it does not know without a
word. Missing are the CPU's flash attention and bitsandbytes' products of quantised weights, the inside of which a
dispatch mode does not see; their formulas are here. The backward of a 4-bit layer needs none: it dequantises and calls
aten's own product, as int8 does both ways on a CPU. Taken out are products that sum over nothing: older transformers
write the angles of rotary embeddings, positions times frequencies, as one.

Counted is what an operator is given: attention over every pair of a row, whatever its mask. The operators of the
flash-attn package are not known here, nor is what happens inside code of torch.compile: such a step counts short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedFlops:
    """What one call announced."""

    total: int
    by_operator: Mapping[str, int]
    """FLOPs by the operator's name ("aten.mm")."""

    @property
    def fused(self) -> bool:
        """Whether attention was one operator, whose backward pass computes the scores again."""
        return any("dot_product" in name for name in self.by_operator)


def counted_flops(call: Callable[[], object]) -> CountedFlops:
    """Call once and count. A dispatch mode looks at every operator, so the call is not one to be timed."""
    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
        call()
    found = {str(operator): int(flops) for operator, flops in counter.get_flop_counts().get("Global", {}).items()}
    return CountedFlops(total=sum(found.values()), by_operator=found)


Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, _each_head(key, query), _each_head(value, query)))


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, _each_head(key, query), _each_head(value, query)))


def _each_head(shape: Shape, query: Shape) -> Shape:
    """Keys or values (rows, heads, length, width) as each head of the query meets them; torch 2.11 counts no
    others."""
    return (shape[0], query[1], *shape[2:])


def _batched_product(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """(b, m, k) by (b, k, n); one that sums over a single term is an outer product, which is no matrix product."""
    return 2 * prod(left) * right[2] if left[2] > 1 else 0


def _packed_product(inputs: Shape, packed: Shape, weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """`inputs` (..., k) by a weight of shape `weight` = (n, k), stored in another shape."""
    return 2 * prod(inputs) * weight[0]


def _product(inputs: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    """`inputs` (..., k) by `weight` (n, k)."""
    return 2 * prod(inputs) * weight[0]


def _mixed_product(inputs: Shape, quantised: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    """`inputs` (..., k) by `weight` (n, k) in 8 bits, without the outlier columns, a separate product."""
    return 2 * prod(inputs) * weight[0]


_FORMULAS: Mapping[tuple[str, str], Callable[..., int]] = {
    ("aten", "bmm"): _batched_product,
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"): _attention,
    ("aten", "_scaled_dot_product_flash_attention_for_cpu_backward"): _attention_backward,
    ("bitsandbytes", "gemm_4bit"): _packed_product,
    ("bitsandbytes", "gemv_4bit"): _packed_product,
    ("bitsandbytes", "int8_linear_matmul"): _product,
    ("bitsandbytes", "int8_scaled_mm"): _product,
    ("bitsandbytes", "int8_mixed_scaled_mm"): _mixed_product,
}


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas by the operators that this installation has; looked up by name, so that it need not have them all."""
    found = {}
    for (library, name), formula in _FORMULAS.items():
        operator = getattr(getattr(torch.ops, library), name, None)
        if operator is not None:
            found[operator] = formula
    return found
