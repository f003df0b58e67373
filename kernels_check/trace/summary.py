"""What a recording says, in the words of the requirements and in shares of its time.

Shares are of the summed durations of everything that ran on the device, so they add up to one, whatever overlapped.
Time that no rule knows is part of ``other`` and, with its names, of ``unclassified``: it never disappears.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kernels_check.rules import CATEGORIES, UNDECIDED, Category, Rule
from kernels_check.trace.arguments import KernelNameFacts
from kernels_check.trace.timeline import StepCounts

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """All launches of one name (on a trace without a GPU: all calls of one operator)."""

    name: str
    calls: int
    time_ms: float
    rule: Rule | None
    facts: KernelNameFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How often something ran, and its part of the time."""

    calls: int
    time_share: float
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUse(Use):
    """One attention backend. Calls are launches: one backward pass of flash attention is three of them."""

    forward_calls: int
    backward_calls: int
    dtypes: Mapping[str, int]
    """Launches of each number format that their names prove."""
    causal_calls: int
    not_causal_calls: int
    """Of the launches whose template arguments say it; the others prove neither."""
    kernels: Mapping[str, int]
    """The evidence: launches of each full name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention backends by the names of ``attention.backend``."""

    backends: Mapping[str, BackendUse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fourbit:
    """How 4-bit weights were used."""

    paths: Mapping[str, Use]
    """``fused``: multiplied without unpacking; ``dequantize``: unpacked for an ordinary product; ``dequantize_8bit``:
    blockwise 8-bit values, beside 4-bit weights the constants of double quantisation; ``gemv``: older decoding kernel;
    ``packed_cpu``: the CPU's own layout."""
    quant_types: Mapping[str, Use]
    """Only a kernel that dequantizes names it."""
    dtypes: Mapping[str, int]
    """Launches of each compute dtype, of the 4-bit paths without ``dequantize_8bit``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclassified:
    """What no rule knows."""

    time_share: float
    kernels: Mapping[str, Use]
    """Largest first."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names, largest first."""
        return tuple(self.kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSummary:
    """The judgement of one recording."""

    source: Literal["kineto", "nsys"]
    device: Literal["gpu", "cpu"]
    """``cpu``: no kernel was recorded, operators on the host stand in their place."""
    calls: int
    time_ms: float
    attention: Attention
    fourbit: Fourbit
    matmul_dtypes: Mapping[str, Use]
    """Matrix products by number format; ``unknown`` where the name does not say."""
    categories: Mapping[str, float]
    """Share of the time of each category; they add up to one."""
    category_time_ms: Mapping[str, float]
    busy_share: float | None
    """Part of the recorded time in which a device worked; None where the recording has no intervals of kernels."""
    kernels_per_step: StepCounts | None
    unclassified: Unclassified
    notices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One document of JSON values."""
        document = {"schema": SCHEMA} | asdict(self)
        document["unclassified"] = {
            "time_share": self.unclassified.time_share,
            "names": list(self.unclassified.names),
            "kernels": {name: asdict(use) for name, use in self.unclassified.kernels.items()},
        }
        document["notices"] = list(self.notices)
        return document


def summarise(
    launches: Iterable[Launches],
    *,
    source: Literal["kineto", "nsys"],
    device: Literal["gpu", "cpu"] = "gpu",
    operators: Collection[str] = (),
    busy_share: float | None = None,
    kernels_per_step: StepCounts | None = None,
    notices: Iterable[str] = (),
) -> KernelSummary:
    """Sum up what ran.

    Args:
        launches: with a time above zero in all.
        source: kind of recording.
        device: what the names are of.
        operators: names of the host's operators, where recorded: they tell attention's math backend from eager.
        busy_share: passed on.
        kernels_per_step: passed on.
        notices: what the reader should know beside the numbers.
    """
    ran = [one for one in launches if one.calls or one.time_ms > 0.0]
    total_ms = math.fsum(one.time_ms for one in ran)

    def use(some: Collection[Launches]) -> Use:
        time_ms = math.fsum(one.time_ms for one in some)
        return Use(calls=sum(one.calls for one in some), time_share=time_ms / total_ms, time_ms=time_ms)

    by_category: dict[Category, list[Launches]] = {category: [] for category in CATEGORIES}
    for one in ran:
        by_category[one.rule.category_of(one.name) if one.rule is not None else "other"].append(one)
    attention = _grouped(by_category["attention"], lambda one: _backend(one, operators))
    paths = _grouped(ran, lambda one: one.rule.path if one.rule is not None else None)
    quant_types = _grouped(ran, lambda one: one.rule.quant_type if one.rule is not None else None)
    products = _grouped(by_category["matmul"], lambda one: (one.facts and one.facts.dtype) or "unknown")
    unknown = sorted((one for one in ran if one.rule is None), key=lambda one: (-one.time_ms, one.name))
    fourbit = [one for path, some in paths.items() if path != "dequantize_8bit" for one in some]
    return KernelSummary(
        source=source,
        device=device,
        calls=sum(one.calls for one in ran),
        time_ms=total_ms,
        attention=Attention(
            backends={name: _backend_use(use(some), some) for name, some in _by_time(attention).items()}
        ),
        fourbit=Fourbit(
            paths={name: use(some) for name, some in _by_time(paths).items()},
            quant_types={name: use(some) for name, some in _by_time(quant_types).items()},
            dtypes=_dtypes(fourbit),
        ),
        matmul_dtypes={name: use(some) for name, some in _by_time(products).items()},
        categories={category: use(some).time_share for category, some in by_category.items()},
        category_time_ms={category: use(some).time_ms for category, some in by_category.items()},
        busy_share=busy_share,
        kernels_per_step=kernels_per_step,
        unclassified=Unclassified(
            time_share=use(unknown).time_share, kernels={one.name: use([one]) for one in unknown}
        ),
        notices=tuple(notices),
    )


def _grouped(launches: Iterable[Launches], key: Callable[[Launches], str | None]) -> dict[str, list[Launches]]:
    groups: dict[str, list[Launches]] = {}
    for one in launches:
        name = key(one)
        if name is not None:
            groups.setdefault(name, []).append(one)
    return groups


def _by_time(groups: Mapping[str, list[Launches]]) -> dict[str, list[Launches]]:
    return dict(sorted(groups.items(), key=lambda group: (-sum(one.time_ms for one in group[1]), group[0])))


def _backend(one: Launches, operators: Collection[str]) -> str:
    """Name the backend; a softmax kernel alone cannot tell SDPA's math from a model that writes attention out.

    The host's operators can: math calls ``_safe_softmax``, and eager attention never enters SDPA.
    """
    assert one.rule is not None
    backend = one.rule.backend or one.rule.name
    if backend != UNDECIDED or not operators:
        return backend
    if any(
        name == "aten::_safe_softmax" or name.startswith("aten::_scaled_dot_product_attention_math")
        for name in operators
    ):
        return "math"
    if "aten::scaled_dot_product_attention" not in operators and {"aten::softmax", "aten::_softmax"} & set(operators):
        return "eager"
    return backend


def _backend_use(use: Use, some: list[Launches]) -> BackendUse:
    def calls(*, direction: str | None = None, causal: bool | None = None) -> int:
        return sum(
            one.calls
            for one in some
            if one.facts is not None
            and (direction is None or one.facts.direction == direction)
            and (causal is None or one.facts.causal is causal)
        )

    return BackendUse(
        calls=use.calls,
        time_share=use.time_share,
        time_ms=use.time_ms,
        forward_calls=calls(direction="forward"),
        backward_calls=calls(direction="backward"),
        dtypes=_dtypes(some),
        causal_calls=calls(causal=True),
        not_causal_calls=calls(causal=False),
        kernels={one.name: one.calls for one in sorted(some, key=lambda one: (-one.time_ms, one.name)) if one.calls},
    )


def _dtypes(some: Iterable[Launches]) -> dict[str, int]:
    counts = Counter[str]()
    for one in some:
        if one.facts is not None and one.facts.dtype is not None:
            counts[one.facts.dtype] += one.calls
    return dict(counts.most_common())
