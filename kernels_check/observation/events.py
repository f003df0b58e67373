"""From the events of one profiled step to the few facts that the judges need.

An operator's name says which implementation the dispatcher chose, its input types say in which precision it ran, and
its ancestors say when: everything below ``autograd::engine::evaluate_function`` runs in the backward pass, so a
*forward* operator found there is a recomputation (gradient checkpointing). Under autocast the outer
``aten::scaled_dot_product_attention`` still sees float, hence only the operator inside it is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch

from kernels_check.check import Evidence
from kernels_check.rules import attention_backend, classify

Direction = Literal["forward", "backward"]

BACKWARD_ROOT = "autograd::engine::evaluate_function"
OPTIMIZER_ROOT = "Optimizer.step#"
UPDATES = ("aten::_fused_", "aten::_foreach_", "aten::addcdiv", "bitsandbytes::optimizer")
"""How the operators of an optimizer's update begin."""
_COMPILED_REGION = "Torch-Compiled Region"
_COMPILER_LOOKUP = "TorchDynamo Cache Lookup"
_READ = frozenset({
    *("aten::softmax", "aten::_softmax", "aten::_softmax_backward_data", "aten::add", "aten::linear"),
    *("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit", "bitsandbytes::dequantize_4bit", _COMPILER_LOOKUP),
})  # fmt: skip
_DTYPES = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


@dataclass(slots=True)
class Operator:
    """One call on the host, as an instrument recorded it."""

    name: str
    input_shapes: list[Any] = field(default_factory=list)
    input_dtypes: list[str] = field(default_factory=list)
    """Empty for what is no tensor."""
    concrete_inputs: list[Any] = field(default_factory=list)
    """Values of what is no tensor."""
    parent: Operator | None = None
    children: list[Operator] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention implementation; None where its operator does not say."""

    op: str
    backend: str
    direction: Direction
    recomputed: bool = False
    """A forward call inside the backward pass."""
    dtype: str | None = None
    mask: bool | None = None
    causal: bool | None = None
    dropout: float | None = None
    grouped: bool | None = None
    """Fewer key and value heads than query heads."""
    head_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FourbitCall:
    """One forward multiplication with a 4-bit weight."""

    op: str
    path: Literal["dequantize", "fused", "packed_cpu", "unknown"]
    dtype: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one profiled step executed."""

    attention: tuple[AttentionCall, ...]
    fourbit: tuple[FourbitCall, ...]
    optimizer_ops: Mapping[str, int]
    """Update operators below an optimizer step, with their number of calls."""
    kernels: Mapping[str, int]
    """Launches of each kernel rule (see ``rules``); empty without CUDA."""
    unclassified: Mapping[str, int]
    """Launches of each kernel that no rule knows."""
    compiled_regions: int
    compiler_lookups: int
    """Dynamo cache look-ups; without a compiled region they mean that the code ran eagerly after all."""
    blind: Mapping[Evidence, str] = field(default_factory=dict)
    """Evidence that the instrument could not collect in this step, with the reason; empty for the profiler."""


def reduce_operators(operators: list[Operator], *, kernels: Iterable[str] = (), on_cuda: bool = False) -> StepProfile:
    """Reduce what one step called on the host, and the names of the kernels that it launched.

    Args:
        operators: those that ``matters`` keeps, each linked to its nearest kept caller.
        kernels: names as the profiler spells them.
        on_cuda: whether the step ran on a GPU, where no kernels were recorded to tell.
    """
    known, unclassified = Counter[str](), Counter[str]()
    for name in kernels:
        rule = classify(name)
        if rule is None:
            unclassified[name] += 1
        else:
            known[rule.name] += 1
    regions, lookups = compiler_entries(operator.name for operator in operators)
    return StepProfile(
        attention=tuple(_attention_calls(operators)),
        fourbit=tuple(_fourbit_calls(operators, on_cuda=on_cuda or bool(known or unclassified))),
        optimizer_ops=Counter(operator.name for operator in operators if _is_update(operator)),
        kernels=known,
        unclassified=unclassified,
        compiled_regions=regions,
        compiler_lookups=lookups,
    )


def compiler_entries(names: Iterable[str]) -> tuple[int, int]:
    """Count the compiled regions entered, and the look-ups in the compiler's cache."""
    counts = Counter(_COMPILED_REGION if name.startswith(_COMPILED_REGION) else name for name in names)
    return counts[_COMPILED_REGION], counts[_COMPILER_LOOKUP]


@cache
def matters(name: str) -> bool:
    """Whether anything here reads an event of this name: a few hundred of the tens of thousands of a step."""
    prefixes = (BACKWARD_ROOT, OPTIMIZER_ROOT, _COMPILED_REGION, *UPDATES)
    return name in _READ or name.startswith(prefixes) or attention_backend(name) is not None


def _ancestors(event: Operator) -> Iterator[Operator]:
    while event.parent is not None:
        event = event.parent
        yield event


def _descendants(event: Operator) -> Iterator[Operator]:
    for child in event.children:
        yield child
        yield from _descendants(child)


def _in_backward(event: Operator) -> bool:
    return any(parent.name.startswith(BACKWARD_ROOT) for parent in _ancestors(event))


def _is_update(event: Operator) -> bool:
    if not event.name.startswith(UPDATES):
        return False
    return any(parent.name.startswith(OPTIMIZER_ROOT) for parent in _ancestors(event))


def _attention_calls(host: list[Operator]) -> Iterator[AttentionCall]:
    scores: set[tuple[int, ...]] = set()
    eager: list[Operator] = []
    for event in host:
        backend = attention_backend(event.name)
        if backend is not None and not any(attention_backend(parent.name) for parent in _ancestors(event)):
            yield _named_call(event, backend)
        elif _is_score_softmax(event):
            eager.append(event)
            scores.add(tuple(event.input_shapes[0]))
    masked = any(_adds_mask(event, scores) for event in host) if eager else False
    for event in eager:
        backward = event.name.endswith("_backward_data")
        yield AttentionCall(
            op=event.name,
            backend="eager",
            direction="backward" if backward else "forward",
            recomputed=not backward and _in_backward(event),
            dtype=_dtype(event, 0),
            mask=masked,
            causal=False,
        )


def _is_score_softmax(event: Operator) -> bool:
    """Recognise the softmax of attention written out: over scores of four dimensions, outside any fused operator.

    The loss uses ``_log_softmax``, a router of experts a softmax over fewer dimensions.
    """
    if event.name not in ("aten::softmax", "aten::_softmax", "aten::_softmax_backward_data"):
        return False
    if not event.input_shapes or len(event.input_shapes[0]) != 4:
        return False
    return not any(
        parent.name in ("aten::softmax", "aten::_safe_softmax") or attention_backend(parent.name)
        for parent in _ancestors(event)
    )


def _adds_mask(event: Operator, scores: set[tuple[int, ...]]) -> bool:
    if event.name != "aten::add" or len(event.input_shapes) < 2:
        return False
    left, right = (tuple(shape) for shape in event.input_shapes[:2])
    return left in scores and len(right) == 4 and right[1] == 1 and right[-1] == left[-1]


def _named_call(event: Operator, backend: str) -> AttentionCall:
    backward = re.search(r"backward|bwd", event.name, re.IGNORECASE) is not None
    if backward:
        return AttentionCall(op=event.name, backend=backend, direction="backward", dtype=_dtype(event, 0))
    shapes = event.input_shapes
    mask = _argument(event.name, ("attn_mask", "attn_bias"))
    causal = _value(event, _argument(event.name, ("is_causal", "causal")))
    dropout = _value(event, _argument(event.name, ("dropout_p", "p_dropout")))
    four_dimensional = event.name.startswith("aten::_scaled") and all(len(shape) == 4 for shape in shapes[:2])
    return AttentionCall(
        op=event.name,
        backend=backend,
        direction="forward",
        recomputed=_in_backward(event),
        dtype=_dtype(event, 0),
        mask=None if mask is None else mask >= 0 and bool(event.input_dtypes[mask]),
        causal=causal if isinstance(causal, bool) else None,
        dropout=float(dropout) if isinstance(dropout, int | float) else None,
        grouped=shapes[0][1] != shapes[1][1] if four_dimensional else None,
        head_size=shapes[0][-1] if shapes and shapes[0] else None,
    )


@cache
def _argument(op: str, names: tuple[str, ...]) -> int | None:
    """Position of an argument in the operator's schema: -1 where it takes none, None where no schema is known."""
    namespace, _, name = op.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), name, None) if name else None
    if packet is None:
        return None
    arguments = getattr(packet, packet.overloads()[0])._schema.arguments
    return next((index for index, argument in enumerate(arguments) if argument.name in names), -1)


def _value(event: Operator, index: int | None) -> Any:
    if index is None or not 0 <= index < len(event.concrete_inputs):
        return None
    return event.concrete_inputs[index]


def _dtype(event: Operator, index: int) -> str | None:
    types = event.input_dtypes
    return _DTYPES.get(types[index], types[index] or None) if types and index < len(types) else None


def _fourbit_calls(host: list[Operator], *, on_cuda: bool) -> Iterator[FourbitCall]:
    """Tell the path of each 4-bit product by what the operator calls inside.

    The operator is ``gemm_4bit`` on every path; dequantising ends in an ordinary ``aten::linear``, the fused CUDA
    kernel in none (bitsandbytes 0.50 ``backends/cuda/ops.py``). Packed weights of AVX512 use ``gemv_4bit``.
    """
    for event in host:
        if event.name == "bitsandbytes::gemv_4bit":
            path: Any = "fused" if on_cuda else "packed_cpu"
        elif event.name == "bitsandbytes::gemm_4bit":
            inside = {child.name for child in _descendants(event)}
            if inside & {"aten::linear", "bitsandbytes::dequantize_4bit"}:
                path = "dequantize"
            else:
                path = "fused" if on_cuda else "unknown"
        else:
            continue
        # The packed kernel computes in bfloat16 whatever it is given.
        yield FourbitCall(op=event.name, path=path, dtype="bfloat16" if path == "packed_cpu" else _dtype(event, 0))
