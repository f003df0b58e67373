"""From the operators of one watched step to the few facts that the judges need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kernels_check.observe.attention_calls import AttentionCall, attention_calls
from kernels_check.observe.operators import (
    COMPILED_REGION,
    COMPILER_LOOKUP,
    FOURBIT,
    PRODUCTS,
    REDUCTIONS,
    SOFTMAX,
    Operator,
    in_backward,
    region_of,
)
from kernels_check.observe.products import Product, fourbit_products, plain_products
from kernels_check.observe.updates import Write
from kernels_check.rules import attention_backend, classify


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerSeen:
    """What one step shows of torch.compile."""

    entered: tuple[int | None, ...] = ()
    """For each compiled region of the forward pass the module call that it was entered in; None outside the model."""
    regions: int = 0
    """All of them, those of the backward pass included."""
    lookups: int = 0
    """Dynamo cache look-ups; without a compiled region they mean that the code ran eagerly after all."""
    eager: frozenset[int] = frozenset()
    """Numbers of the module calls in which products or attention of the forward pass ran outside of any region."""


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
    reductions: frozenset[int] = frozenset()
    """The same with a sum or an exponential, of which attention could be written out element by element."""
    writes: tuple[Write, ...] = ()
    """What wrote tensors inside the steps of optimizers."""
    writes_hidden: bool = False
    """Whether a dispatch mode of the program hid what optimizers wrote."""
    kernels: Mapping[str, int]
    """Launches of each kernel rule (see ``rules``); empty without CUDA."""
    unclassified: Mapping[str, int]
    """Launches of each kernel that no rule knows."""
    compiler: CompilerSeen = field(default_factory=CompilerSeen)
    missing: str | None = None
    """Why nothing was recorded, so that whatever rests on operators is unknown."""

    @property
    def compiled_regions(self) -> int:
        """Compiled regions that were entered in either pass."""
        return self.compiler.regions

    @property
    def compiler_lookups(self) -> int:
        """Look-ups in the compiler's cache."""
        return self.compiler.lookups


def reduce_operators(
    operators: list[Operator],
    *,
    kernels: Iterable[str] = (),
    writes: Iterable[Write] = (),
    writes_hidden: bool = False,
) -> StepProfile:
    """Reduce what one step called on the host, and the names of the kernels that it launched.

    Args:
        operators: those that ``matters`` keeps, each linked to its nearest kept caller.
        kernels: names as the profiler spells them.
        writes: inside the steps of optimizers.
        writes_hidden: see ``StepProfile``.
    """
    known, unclassified = Counter[str](), Counter[str]()
    for name in kernels:
        rule = classify(name)
        if rule is None:
            unclassified[name] += 1
        else:
            known[rule.name] += 1
    return StepProfile(
        attention=tuple(attention_calls(operators)),
        fourbit=tuple(fourbit_products(operators, on_cuda=bool(known or unclassified))),
        products=tuple(plain_products(operators)),
        mixing=frozenset(operator.call for operator in operators if operator.call is not None and _mixes(operator)),
        reductions=frozenset(
            operator.call
            for operator in operators
            if operator.call is not None and operator.name in REDUCTIONS and not in_backward(operator)
        ),
        writes=tuple(writes),
        writes_hidden=writes_hidden,
        kernels=known,
        unclassified=unclassified,
        compiler=compiler_seen(operators),
    )


def not_recorded(reason: str) -> StepProfile:
    """A profile without anything in it."""
    return replace(reduce_operators([]), missing=reason)


def compiler_seen(operators: Sequence[Operator]) -> CompilerSeen:
    """What the operators of a step show of torch.compile; names are all that is read."""
    regions = [operator for operator in operators if operator.name.startswith(COMPILED_REGION)]
    return CompilerSeen(
        entered=tuple(operator.call for operator in regions if not in_backward(operator)),
        regions=len(regions),
        lookups=sum(operator.name == COMPILER_LOOKUP for operator in operators),
        eager=frozenset(
            operator.call
            for operator in operators
            if operator.call is not None
            and _computes(operator)
            and region_of(operator) is None
            and not in_backward(operator)
        ),
    )


def _computes(event: Operator) -> bool:
    return event.name in PRODUCTS or event.name in FOURBIT or attention_backend(event.name) is not None


def _mixes(event: Operator) -> bool:
    """Whether it may mix tokens: what a router or a projection does is over fewer dimensions."""
    batched = event.name in ("aten::bmm", "aten::baddbmm")
    return (batched or (event.name in SOFTMAX and len(event.shape(0)) >= 3)) and not in_backward(event)
