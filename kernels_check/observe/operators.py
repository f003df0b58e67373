"""Reads the operators of a step from the profiler, and finds the matrix products and the attention among them.

An operator's ancestors show when it ran: everything below ``autograd::engine::evaluate_function`` runs in the backward
pass, so a *forward* operator found there is a recomputation (gradient checkpointing). The module call stored with an
operator shows where it ran.

A fused implementation of attention is a single operator. Eager attention is recognised by its softmax: over scores with
four dimensions, or with three or more that come from one batched product and go into another. An exponential over four
dimensions also counts as a softmax if the same call divides by one number per row. Under autocast only the operator
inside ``aten::scaled_dot_product_attention`` is read, since the outer one still receives float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import torch

from kernels_check.rules import attention_backend

BACKWARD_ROOT = "autograd::engine::evaluate_function"
OPTIMIZER_ROOT = "Optimizer.step#"
COMPILED_REGION = "Torch-Compiled Region"
COMPILER_LOOKUP = "TorchDynamo Cache Lookup"
SOFTMAX = frozenset({"aten::softmax", "aten::_softmax", "aten::_softmax_backward_data"})
PRODUCTS = frozenset({
    *("aten::mm", "aten::addmm", "aten::_addmm_activation", "aten::bmm", "aten::baddbmm", "aten::_int_mm"),
    *("aten::_scaled_mm", "aten::convolution", "aten::mv", "aten::addmv", "aten::dot", "aten::linear"),
})  # fmt: skip
"""Matrix products; ``aten::linear`` is the outer operator of one, before autocast casts its inputs."""
BATCHED_PRODUCTS = ("aten::bmm", "aten::baddbmm")
FOURBIT = frozenset({"bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit"})
MASKING = frozenset({
    *("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::where"),
    *("aten::masked_fill", "aten::masked_fill_", "aten::minimum", "aten::baddbmm", "aten::tril", "aten::triu"),
    *("aten::index_put_", "aten::_index_put_impl_"),
})  # fmt: skip
"""Operators that apply a mask to the scores in eager attention."""
_IN_PLACE_MASKS = ("aten::tril", "aten::triu", "aten::index_put_", "aten::_index_put_impl_")
"""Those of which the scores are the first argument."""
_EXPONENTIALS = frozenset({"aten::exp", "aten::exp2"})
_DIVISIONS = frozenset({"aten::div", "aten::div_"})
REDUCTIONS = _EXPONENTIALS | {"aten::sum", "aten::cumsum", "aten::logsumexp"}
_READ = (
    SOFTMAX
    | REDUCTIONS
    | _DIVISIONS
    | PRODUCTS
    | FOURBIT
    | MASKING
    | {"bitsandbytes::dequantize_4bit", COMPILER_LOOKUP}
)


@dataclass
class Operator:
    """One operator call on the CPU, as the profiler recorded it."""

    name: str
    event: Any
    """Its node in the profiler's tree. Reading its inputs is slow, so only few are read."""
    parent: Operator | None = None
    call: int | None = None
    """Number of the module call in which it ran; None outside the model."""
    in_backward: bool = False
    """Whether it ran in the backward pass."""
    region: int | None = None
    """Id of the entry into compiled code in which it ran; None for eager code."""

    def __post_init__(self) -> None:
        if self.parent is not None:
            name = self.parent.name
            self.in_backward = self.parent.in_backward or name.startswith(BACKWARD_ROOT)
            self.region = id(self.parent) if name.startswith(COMPILED_REGION) else self.parent.region

    @cached_property
    def inputs(self) -> Sequence[Any]:
        """Its arguments: metadata for tensors, values for others."""
        return getattr(self.event.extra_fields, "inputs", ())

    @property
    def node(self) -> int:
        """Number of the next autograd node when it began; of its own node, if it runs one; -1 without autograd."""
        return int(getattr(self.event.extra_fields, "sequence_number", -1))

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of an input; empty if it is not a tensor."""
        return tuple(getattr(self.inputs[index], "sizes", ())) if index < len(self.inputs) else ()

    def dtype(self, index: int) -> str | None:
        """Dtype of an input; None if it is not a tensor."""
        found = getattr(self.inputs[index], "dtype", None) if 0 <= index < len(self.inputs) else None
        return None if found is None else str(found).removeprefix("torch.")

    def value(self, index: int | None) -> Any:
        """A non-tensor input; None if it is unknown."""
        found = self.inputs[index] if index is not None and 0 <= index < len(self.inputs) else None
        return None if hasattr(found, "sizes") else found


@cache
def is_read(name: str) -> bool:
    """Whether this module uses an event of this name: a few hundred of the tens of thousands in a step."""
    prefixes = (BACKWARD_ROOT, OPTIMIZER_ROOT, COMPILED_REGION)
    return name in _READ or name.startswith(prefixes) or attention_backend(name) is not None


def ancestors(operator: Operator) -> Iterator[Operator]:
    """The operators around one, innermost first."""
    while operator.parent is not None:
        operator = operator.parent
        yield operator


def callers_of(operators: Iterable[Operator], names: Collection[str]) -> set[int]:
    """Ids of the operators inside which an operator with one of these names was called."""
    return {id(parent) for one in operators if one.name in names for parent in ancestors(one)}


Path = Literal["dequantize", "fused", "packed_cpu", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One matrix product of the forward pass."""

    dtype: str | None
    """Dtype of the computation, after any autocast."""
    path: Path | None = None
    """How a product with a 4-bit weight was computed; None for other products."""
    call: int | None = None
    """Number of the module call in which it ran; None outside the model."""
    compiled: bool = False
    """Whether it ran inside torch.compile code, where the module is unknown."""


def fourbit_products(host: Sequence[Operator], *, on_cuda: bool) -> Iterator[Product]:
    """Find the path of each 4-bit product from the operators that it calls.

    The operator is ``gemm_4bit`` on every path; dequantising ends in an ordinary ``aten::linear``, the fused CUDA
    kernel in none (bitsandbytes 0.50 ``backends/cuda/ops.py``). Packed weights of AVX512 use ``gemv_4bit``.
    """
    dequantising = callers_of(host, ("aten::linear", "bitsandbytes::dequantize_4bit"))
    for event in (one for one in host if one.name in FOURBIT):
        path: Path = "fused" if on_cuda else "packed_cpu"
        if event.name == "bitsandbytes::gemm_4bit":
            path = "dequantize" if id(event) in dequantising else "fused" if on_cuda else "unknown"
        # The packed kernel computes in bfloat16 for every input dtype.
        yield _product(event, "bfloat16" if path == "packed_cpu" else event.dtype(0), path)


def plain_products(host: Sequence[Operator]) -> Iterator[Product]:
    """Every other product of the forward pass; of nested ones only the innermost."""
    outer = callers_of(host, PRODUCTS)
    innermost = (one for one in host if one.name in PRODUCTS and id(one) not in outer and not one.in_backward)
    for event in innermost:
        if not any(parent.name in FOURBIT for parent in ancestors(event)):
            first = 1 if event.name in ("aten::addmm", "aten::_addmm_activation", "aten::baddbmm", "aten::addmv") else 0
            yield _product(event, event.dtype(first), None)


def _product(event: Operator, dtype: str | None, path: Path | None) -> Product:
    return Product(dtype=dtype, path=path, call=event.call, compiled=event.region is not None)


Direction = Literal["forward", "backward"]
_PROJECTIONS = {"aten::linear": 0, "aten::mm": 0, "aten::addmm": 1, "aten::_addmm_activation": 1} | dict.fromkeys(
    FOURBIT, 0
)
"""Products of a weight layer, with the index of the argument that holds its inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention implementation; a value is None if its operator does not show it."""

    op: str
    backend: str
    direction: Direction
    recomputed: bool = False
    """Whether it is a forward call inside the backward pass."""
    call: int | None = None
    """Number of the module call in which it ran; None outside the model."""
    region: int | None = None
    """Id of the entry into compiled code in which it ran, where the module is unknown; None for eager code."""
    dtype: str | None = None
    mask: bool | None = None
    causal: bool | None = None
    dropout: float | None = None
    grouped: bool | None = None
    """Whether there are fewer key and value heads than query heads."""
    head_size: int | None = None
    heads: int | None = None
    """Number of query heads."""
    width: int | None = None
    """Features that it returns for each token, over all heads."""
    taken: int | None = None
    """Features of each token that the next weight layer takes, usually the output projection."""
    node: int = -1
    """Number of the next autograd node when it began; for a call of the backward pass, of the node that ran it."""

    @property
    def compiled(self) -> bool:
        """Whether it ran inside torch.compile code."""
        return self.region is not None


def attention_calls(host: Sequence[Operator]) -> Iterator[AttentionCall]:
    """All attention calls, those of fused implementations first."""
    taken = _projection_inputs(host)
    for event in host:
        backend = attention_backend(event.name)
        if backend is not None and not any(attention_backend(parent.name) for parent in ancestors(event)):
            yield replace(_named(event, backend), taken=taken.get(id(event)))
    yield from _written_out(host, taken)


def _projection_inputs(host: Sequence[Operator]) -> dict[int, int]:
    """The input features of the first projection after each attention operator, by the operator's id."""
    found: dict[int, int] = {}
    width = None
    for event in reversed(host):
        if event.name in _PROJECTIONS:
            inputs = event.shape(_PROJECTIONS[event.name])
            width = inputs[-1] if inputs else None
        elif width is not None:
            found[id(event)] = width
    return found


def _is_softmax(event: Operator) -> bool:
    """Whether it is a softmax over at least three dimensions, outside any fused operator; the loss uses
    ``_log_softmax``."""
    is_inner = (
        parent.name in ("aten::softmax", "aten::_safe_softmax") or attention_backend(parent.name) is not None
        for parent in ancestors(event)
    )
    return event.name in SOFTMAX and len(event.shape(0)) >= 3 and not any(is_inner)


def _written_out(host: Sequence[Operator], taken: Mapping[int, int]) -> Iterator[AttentionCall]:
    places: dict[tuple[int | None, bool], list[Operator]] = {}
    """By module call and pass."""
    for operator in host:
        places.setdefault((operator.call, operator.in_backward), []).append(operator)
    scores = {
        event.shape(0)
        for events in places.values()
        for index, event in enumerate(events)
        if _is_softmax(event) and _is_over_scores(events, index)
    }
    for (call, backward_pass), events in places.items():
        begin = 0
        for index, event in enumerate(events):
            end = _find_softmax_end(events, index, scores)
            if end is None:
                continue
            backward, by_hand = event.name.endswith("_backward_data"), end > index
            yield AttentionCall(
                op=event.name,
                backend="eager",
                direction="backward" if backward else "forward",
                recomputed=not backward and backward_pass,
                call=call,
                region=event.region,
                dtype=event.dtype(0)
                if backward
                else _precision(events, index) or (event.dtype(0) if by_hand else None),
                mask=any(_masks(other, event.shape(0)) for other in events[begin:end]),
                causal=False,
                heads=event.shape(0)[1] if len(event.shape(0)) == 4 else None,
                width=_width(events, index),
                taken=taken.get(id(event)),
            )
            begin = end + 1


def _find_softmax_end(events: Sequence[Operator], index: int, scores: Collection[tuple[int, ...]]) -> int | None:
    """The index at which an attention softmax that begins here ends: here, or at the division of an exponential by its
    sums."""
    event = events[index]
    if _is_softmax(event):
        backward = event.name.endswith("_backward_data")
        known = event.shape(0) in scores if backward else _is_over_scores(events, index)
        return index if known else None
    if event.name not in _EXPONENTIALS or len(event.shape(0)) != 4:
        return None
    divisions = (place for place in range(index + 1, len(events)) if events[place].name in _DIVISIONS)
    return next((place for place in divisions if events[place].shape(1) == (*event.shape(0)[:-1], 1)), None)


def _is_over_scores(events: Sequence[Operator], index: int) -> bool:
    """Whether the softmax is attention's: a router of experts has fewer dimensions, and no products around it."""
    event = events[index]
    return len(event.shape(0)) == 4 or (
        not event.name.endswith("_backward_data")
        and _find_product_before(events, index) is not None
        and _find_product_after(events, index) is not None
    )


def _find_product_before(events: Sequence[Operator], index: int) -> Operator | None:
    """The product that computed the scores: ``[batch, queries, size] x [batch, size, keys]``."""
    batch, queries, keys = _flatten_shape(events[index].shape(0))
    for event in (one for one in reversed(events[:index]) if one.name in BATCHED_PRODUCTS):
        left, right = (event.shape(position) for position in _operands(event))
        if left[:2] == (batch, queries) and right[::2] == (batch, keys):
            return event
    return None


def _find_product_after(events: Sequence[Operator], index: int) -> Operator | None:
    """The product that uses the attention weights."""
    flattened = _flatten_shape(events[index].shape(0))
    products = (event for event in events[index + 1 :] if event.name in BATCHED_PRODUCTS)
    return next((one for one in products if one.shape(_operands(one)[0]) == flattened), None)


def _width(events: Sequence[Operator], index: int) -> int | None:
    """Features that an attention with separate heads returns for each token."""
    scores, product = events[index].shape(0), _find_product_after(events, index)
    values = () if product is None else product.shape(_operands(product)[1])
    return scores[1] * values[-1] if values and len(scores) == 4 else None


def _operands(product: Operator) -> tuple[int, int]:
    return (1, 2) if product.name == "aten::baddbmm" else (0, 1)


def _flatten_shape(scores: tuple[int, ...]) -> tuple[int, int, int]:
    """Batch, queries and keys, in the shape of a batched product."""
    return math.prod(scores[:-2]), scores[-2], scores[-1]


def _precision(events: Sequence[Operator], index: int) -> str | None:
    """Dtype of the products; None if they are also written out."""
    product = _find_product_before(events, index) or _find_product_after(events, index)
    return None if product is None else product.dtype(_operands(product)[0])


def _masks(event: Operator, scores: tuple[int, ...]) -> bool:
    """Whether an operator applies another tensor, which differs between keys, to the scores."""
    if event.name not in MASKING:
        return False
    shapes = [event.shape(index) for index in range(len(event.inputs))]
    if event.name == "aten::baddbmm":
        batch, queries, keys = _flatten_shape(scores)
        made = event.shape(1)[:2] == (batch, queries) and event.shape(2)[::2] == (batch, keys)
        return made and len(event.shape(0)) >= 2 and event.shape(0)[-1] == keys
    over = next((place for place, shape in enumerate(shapes) if shape in (scores, _flatten_shape(scores))), None)
    if over is None or event.name in _IN_PLACE_MASKS:
        return over == 0
    return any(len(one) >= 2 and one[-1] == scores[-1] for place, one in enumerate(shapes) if place != over)


def _named(event: Operator, backend: str) -> AttentionCall:
    backward = re.search(r"backward|bwd", event.name, re.IGNORECASE) is not None
    if backward:
        node = next((one.node for one in (event, *ancestors(event)) if one.name.startswith(BACKWARD_ROOT)), -1)
        return AttentionCall(op=event.name, backend=backend, direction="backward", dtype=event.dtype(0), node=node)
    if event.name == "aten::_safe_softmax":  # the only trace of an SDPA call that was not recorded otherwise
        return AttentionCall(
            op=event.name,
            backend=backend,
            direction="forward",
            recomputed=event.in_backward,
            call=event.call,
            region=event.region,
        )
    shapes = [event.shape(index) for index in range(min(3, len(event.inputs)))]
    mask = _argument(event.name, ("attn_mask", "attn_bias"))
    causal = event.value(_argument(event.name, ("is_causal", "causal")))
    dropout = event.value(_argument(event.name, ("dropout_p", "p_dropout")))
    four_dimensional = event.name.startswith("aten::_scaled") and [len(shape) for shape in shapes[:2]] == [4, 4]
    return AttentionCall(
        op=event.name,
        backend=backend,
        direction="forward",
        recomputed=event.in_backward,
        call=event.call,
        region=event.region,
        dtype=event.dtype(0),
        mask=None if mask is None else event.dtype(mask) is not None,
        causal=causal if isinstance(causal, bool) else None,
        dropout=float(dropout) if isinstance(dropout, int | float) else None,
        grouped=shapes[0][1] != shapes[1][1] if four_dimensional else None,
        head_size=shapes[0][-1] if shapes and shapes[0] else None,
        heads=shapes[0][1] if four_dimensional else None,
        width=shapes[0][1] * shapes[2][-1] if four_dimensional and event.shape(2) else None,
        node=event.node,
    )


@cache
def _argument(op: str, names: tuple[str, ...]) -> int | None:
    """Position of an argument in the operator's schema; -1 if it has no such argument, None if the schema is
    unknown."""
    namespace, _, name = op.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), name, None) if name else None
    if packet is None:
        return None
    arguments = getattr(packet, packet.overloads()[0])._schema.arguments
    return next((index for index, argument in enumerate(arguments) if argument.name in names), -1)
