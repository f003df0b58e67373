"""One call on the host as an instrument recorded it, and which of them anything here reads.

An operator's ancestors say when it ran: everything below ``autograd::engine::evaluate_function`` runs in the backward
pass, so a *forward* operator found there is a recomputation (gradient checkpointing). The call of a module that it
carries says where (see ``calls``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels_check.rules import attention_backend

BACKWARD_ROOT = "autograd::engine::evaluate_function"
OPTIMIZER_ROOT = "Optimizer.step#"
DISPATCH_MODE = "PythonDispatchMode"
"""How a profile records that a dispatch mode of the program was given an operator."""
COMPILED_REGION = "Torch-Compiled Region"
COMPILER_LOOKUP = "TorchDynamo Cache Lookup"
SOFTMAX = frozenset({"aten::softmax", "aten::_softmax", "aten::_softmax_backward_data"})
PRODUCTS = frozenset({
    *("aten::mm", "aten::addmm", "aten::_addmm_activation", "aten::bmm", "aten::baddbmm", "aten::_int_mm"),
    *("aten::_scaled_mm", "aten::convolution", "aten::mv", "aten::addmv", "aten::dot", "aten::linear"),
})  # fmt: skip
"""Matrix products; ``aten::linear`` is the outer name of one, where autocast has not cast its inputs yet."""
FOURBIT = frozenset({"bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit"})
MASKING = frozenset({
    *("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::where"),
    *("aten::masked_fill", "aten::masked_fill_", "aten::minimum", "aten::baddbmm", "aten::tril", "aten::triu"),
    *("aten::index_put_", "aten::_index_put_impl_"),
})  # fmt: skip
"""What a mask is laid over the scores by, where attention is written out."""
REDUCTIONS = frozenset({"aten::sum", "aten::exp", "aten::exp2", "aten::cumsum", "aten::logsumexp"})
_READ = SOFTMAX | REDUCTIONS | PRODUCTS | FOURBIT | MASKING | {"bitsandbytes::dequantize_4bit", COMPILER_LOOKUP}
_DTYPES = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


@dataclass(slots=True)
class Operator:
    """One call on the host, as an instrument recorded it."""

    name: str
    input_shapes: Sequence[Any] = ()
    input_dtypes: Sequence[str] = ()
    """Empty for what is no tensor."""
    concrete_inputs: Sequence[Any] = ()
    """Values of what is no tensor."""
    parent: Operator | None = None
    children: Sequence[Operator] = ()
    """Most of the thousands of a step have none: a list for each would set off the garbage collector."""
    call: int | None = None
    """Number of the call of a module of the model in which it ran; None outside the model."""

    def add_child(self, child: Operator) -> None:
        """Note what was called inside it."""
        if not isinstance(self.children, list):
            self.children = []
        self.children.append(child)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of an input, empty for what is no tensor."""
        return tuple(self.input_shapes[index]) if index < len(self.input_shapes) else ()

    def dtype(self, index: int) -> str | None:
        """Dtype of an input."""
        types = self.input_dtypes
        return _DTYPES.get(types[index], types[index] or None) if index < len(types) else None


@cache
def matters(name: str) -> bool:
    """Whether anything here reads an event of this name: a few hundred of the tens of thousands of a step."""
    prefixes = (BACKWARD_ROOT, OPTIMIZER_ROOT, COMPILED_REGION)
    return name in _READ or name.startswith(prefixes) or attention_backend(name) is not None


def ancestors(operator: Operator) -> Iterator[Operator]:
    """Those around it, the innermost first."""
    while operator.parent is not None:
        operator = operator.parent
        yield operator


def descendants(operator: Operator) -> Iterator[Operator]:
    """Those inside it."""
    for child in operator.children:
        yield child
        yield from descendants(child)


def in_backward(operator: Operator) -> bool:
    """Whether it ran in the backward pass."""
    return any(parent.name.startswith(BACKWARD_ROOT) for parent in ancestors(operator))


def region_of(operator: Operator) -> int | None:
    """Identity of the entry into compiled code that it ran in; None for what ran eagerly."""
    return next((id(parent) for parent in ancestors(operator) if parent.name.startswith(COMPILED_REGION)), None)


def by_place(operators: Iterable[Operator]) -> dict[tuple[int | None, bool], list[Operator]]:
    """Operators by the call of a module and the pass in which they ran, in their order."""
    found: dict[tuple[int | None, bool], list[Operator]] = {}
    for operator in operators:
        found.setdefault((operator.call, in_backward(operator)), []).append(operator)
    return found
