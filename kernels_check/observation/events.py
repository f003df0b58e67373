"""From the operators of one watched step to the few facts that the judges need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kernels_check.check import Evidence
from kernels_check.observation.attention_calls import AttentionCall, attention_calls
from kernels_check.observation.operators import (
    COMPILED_REGION,
    COMPILER_LOOKUP,
    OPTIMIZER_ROOT,
    SOFTMAX,
    UPDATES,
    Operator,
    ancestors,
    in_backward,
)
from kernels_check.observation.products import Product, fourbit_products, plain_products
from kernels_check.rules import classify


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one watched step executed."""

    attention: tuple[AttentionCall, ...]
    fourbit: tuple[Product, ...]
    """Products with a 4-bit weight, in the forward pass or recomputed for the backward pass."""
    products: tuple[Product, ...] = ()
    """All others of the forward pass."""
    mixing: frozenset[int] = frozenset()
    """Numbers of the module calls of the forward pass with a batched product, or a softmax of at least 3 dimensions."""
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
        attention=tuple(attention_calls(operators)),
        fourbit=tuple(fourbit_products(operators, on_cuda=on_cuda or bool(known or unclassified))),
        products=tuple(plain_products(operators)),
        mixing=frozenset(operator.call for operator in operators if operator.call is not None and _mixes(operator)),
        optimizer_ops=Counter(operator.name for operator in operators if _is_update(operator)),
        kernels=known,
        unclassified=unclassified,
        compiled_regions=regions,
        compiler_lookups=lookups,
    )


def compiler_entries(names: Iterable[str]) -> tuple[int, int]:
    """Count the compiled regions entered, and the look-ups in the compiler's cache."""
    counts = Counter(COMPILED_REGION if name.startswith(COMPILED_REGION) else name for name in names)
    return counts[COMPILED_REGION], counts[COMPILER_LOOKUP]


def _mixes(event: Operator) -> bool:
    """Whether it may mix tokens: what a router or a projection does is over fewer dimensions."""
    batched = event.name in ("aten::bmm", "aten::baddbmm")
    return (batched or (event.name in SOFTMAX and len(event.shape(0)) >= 3)) and not in_backward(event)


def _is_update(event: Operator) -> bool:
    """Whether it belongs to an update; a closure's forward and backward run inside the optimizer's step, too."""
    if not event.name.startswith(UPDATES) or event.call is not None:
        return False
    return any(parent.name.startswith(OPTIMIZER_ROOT) for parent in ancestors(event))
