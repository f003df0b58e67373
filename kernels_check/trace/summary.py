"""Judges an existing profiler recording: which kernels ran, and where the time went.

    python -m kernels_check trace FILE [--json]

A trace without GPU kernels is judged by its CPU operators, and the summary says so. Operator names also prove the
attention backend and the 4-bit path; only the busy share and the kernels per step are not available.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from kernels_check.check import format_count
from kernels_check.rules import CATEGORIES, UNDECIDED, KernelNameFacts, classify, read_facts
from kernels_check.trace.events import Events, NameTotal, busy_time_us, operator_times, sum_by_name
from kernels_check.trace.recording import (
    Kineto,
    TraceError,
    is_trace,
    read_bytes,
    read_kineto,
    read_nsys,
)

SCHEMA = 1
Fact = TypeVar("Fact", bound=bool | str | None)
_AMD = re.compile(
    r"^(Custom_)?Cijk_A|ck_tile|\bck::|^_ZN(2ck|5aiter)\d|aotriton|\brocprim::|^__amd_rocclr_|^igemm_\w+_gtc|\bhip"
)
"""Names that only ROCm libraries use."""
_MAX_NAME_CHARS = 40
"""Maximum characters of a kernel name in a notice."""
_MIN_UNKNOWN_SHARE = 0.03
"""Minimum share of the time in unknown kernels for a notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Kernels launched in each marked step."""

    steps: int
    lowest: int
    median: float
    highest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How often a kernel or operator ran, and its share of the time."""

    calls: int
    time_share: float
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUse(Use):
    """One attention backend. Calls are launches: one backward pass of flash attention is three of them."""

    forward_calls: int
    backward_calls: int
    dtypes: Mapping[str, int]
    """Launches by number format, as far as kernel names prove it."""
    causal_calls: int
    not_causal_calls: int
    """Launches whose template arguments say that they are not causal; the others are undetermined."""
    kernels: Mapping[str, int]
    """The evidence: launches of each full name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention backends, by the values of ``attention.backend``."""

    backends: Mapping[str, BackendUse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fourbit:
    """How 4-bit weights were used."""

    paths: Mapping[str, Use]
    """``fused``: multiplied without unpacking; ``dequantize``: unpacked for an ordinary product; ``dequantize_8bit``:
    blockwise 8-bit values, with 4-bit weights the constants of double quantisation; ``gemv``: older decoding kernel;
    ``packed_cpu``: the CPU's own layout."""
    quant_types: Mapping[str, Use]
    """Only dequantisation kernels name the quantisation type."""
    dtypes: Mapping[str, int]
    """Launches of each compute dtype on the 4-bit paths, except ``dequantize_8bit``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclassified:
    """Names that no rule matches."""

    time_share: float
    names: tuple[str, ...]
    """Names in order of time, the largest first."""
    kernels: Mapping[str, Use]
    """The use of each kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSummary:
    """The judgement of one recording."""

    source: Literal["kineto", "nsys"]
    device: Literal["gpu", "cpu"]
    """``cpu``: no kernel was recorded, and CPU operators are judged instead."""
    calls: int
    time_ms: float
    attention: Attention
    fourbit: Fourbit
    matmul_dtypes: Mapping[str, Use]
    """Matrix products by number format; ``unknown`` if the name does not show it."""
    categories: Mapping[str, float]
    """Share of the time of each category; the shares add up to one."""
    category_time_ms: Mapping[str, float]
    busy_share: float | None
    """Part of the recorded time in which a device worked; None if the recording has no kernel intervals."""
    kernels_per_step: StepCounts | None
    unclassified: Unclassified
    notices: tuple[str, ...]


def read_trace(path: str | PathLike[str]) -> KernelSummary:
    """Judge a Kineto/Chrome trace (.json, .json.gz) or an nsys ``cuda_gpu_kern_sum`` table (.csv, .csv.gz).

    A trace takes up to three times its size in memory.

    Raises:
        TraceError: the file is missing, empty, damaged, truncated or not a recording, or nothing ran in it.
    """
    path = Path(path)
    content = read_bytes(path)
    if not is_trace(content):
        summary = _summarise(path, map(_describe_kernel, read_nsys(path, content)))
        notice = "an nsys summary has sums and no intervals: neither busy share nor kernels per step can be computed"
        return replace(summary, source="nsys", notices=(notice, *summary.notices))
    trace = read_kineto(path, content)
    del content
    called = frozenset(trace.operators.names)
    if not len(trace.gpu):
        summary = _summarise(path, map(_describe_operator, operator_times(trace.operators)), called)
        notice = (
            f"no GPU kernel in this trace: judged by {len(trace.operators):,} operators of the host, whose time is a "
            "CPU's. If the step ran on a GPU, record again with activities=[ProfilerActivity.CPU, "
            "ProfilerActivity.CUDA]"
        )
        return replace(summary, device="cpu", notices=(notice, *_event_notices(trace.operators)))
    summary = _summarise(path, map(_describe_kernel, sum_by_name(trace.gpu)), called)
    return replace(
        summary,
        busy_share=_busy_share(trace.gpu),
        kernels_per_step=_count_kernels(trace),
        notices=(*_event_notices(trace.gpu), *summary.notices),
    )


def _event_notices(events: Events) -> Iterator[str]:
    if events.repeated:
        yield f"{events.repeated:,} events are in the file more than once and were counted once"
    if untimed := int(np.isnan(events.start_us).sum()):
        yield f"{untimed:,} events have no usable start or duration: counted, with no time"


def _name_notices(launches: Sequence[NameTotal], unknown: Sequence[NameTotal], unknown_share: float) -> Iterator[str]:
    """Notices about kernel names that are not conclusive: from AMD, unknown, truncated or mangled."""
    foreign = [one for one in launches if _AMD.search(one.name)]
    if foreign:
        yield (
            f"this recording is of an AMD GPU ({foreign[0].name[:_MAX_NAME_CHARS]}): its kernels are known from "
            "published recordings only, and shares of CUDA's libraries do not apply to it"
        )
    if unknown_share > _MIN_UNKNOWN_SHARE:
        yield (
            f"{unknown_share:.0%} of the time is in kernels that no rule knows (most in "
            f"{unknown[0].name[:_MAX_NAME_CHARS]}), so each category may have that much more than is "
            "shown; report the names, which --json lists, to have them added"
        )
    names = [one.name for one in unknown]
    if any(name in ("device_kernel", "Kernel", "Kernel2") for name in names):
        yield "names are reduced to the function (device_kernel): record full names, which FlashAttention-3 needs"
    if any(name.startswith("_Z") for name in names):
        yield "some names are mangled (_Z...): pass the file through c++filt, the rules read demangled names"


def _busy_share(events: Events) -> float | None:
    """Share of the time from the first start to the last end in which something ran, averaged over the devices.

    All devices use the same window, so a device that finishes early counts as idle afterwards. None if no event has a
    time.
    """
    busy = busy_time_us(events)
    window = np.nanmax(events.start_us + events.duration_us) - np.nanmin(events.start_us) if busy else 0.0
    return min(1.0, sum(busy.values()) / (window * len(busy))) if window > 0.0 else None


def _count_kernels(trace: Kineto) -> StepCounts | None:
    """Count the kernels of each ProfilerStep; None if no step is marked.

    A kernel belongs to the step that launched it, which its correlation with the host's launch shows. If the
    correlation is missing, the kernel belongs to the step in which it ran.
    """
    on_host, on_gpu = trace.host_steps, trace.gpu_steps or trace.host_steps
    if not on_gpu:
        return None
    events = trace.gpu
    copies = [index for index, name in enumerate(events.names) if name.startswith(("Memcpy", "Memset"))]
    kernels = np.isfinite(events.start_us) & ~np.isin(events.name, copies)
    launches = trace.launches if on_host else {}
    launched = np.array([launches.get(number, math.nan) for number in events.correlation[kernels].tolist()])
    ran = events.start_us[kernels][np.isnan(launched)]
    counts = [
        sum(
            int(((when >= steps[step][0]) & (when < steps[step][1])).sum())
            for steps, when in ((on_host, launched), (on_gpu, ran))
            if step in steps
        )
        for step in on_host or on_gpu
    ]
    return StepCounts(steps=len(counts), lowest=min(counts), median=float(np.median(counts)), highest=max(counts))


# --- sums of what ran -------------------------------------------------------------------------------------------------


def _summarise(path: Path, totals: Iterable[NameTotal], operators: Collection[str] = ()) -> KernelSummary:
    """Sum up the totals of a recording as kernels of a GPU, except the values that need intervals.

    Args:
        path: path of the recording, for messages.
        totals: total of each name, with its rule and facts.
        operators: names of the CPU operators, if recorded: they distinguish attention's math backend from eager.
    """
    ran = [total for total in totals if total.calls or total.time_ms > 0.0]
    ran.sort(key=lambda one: (-one.time_ms, one.name))
    total_ms = math.fsum(one.time_ms for one in ran)
    if not (total_ms > 0.0 and math.isfinite(total_ms)):
        raise TraceError(
            f"{path}: the events have {total_ms} ms in total: no event has a usable duration (dur of phase X), so that "
            "no share can be given. Record it again"
        )

    def use(some: Collection[NameTotal]) -> Use:
        time_ms = math.fsum(one.time_ms for one in some)
        return Use(calls=sum(one.calls for one in some), time_share=time_ms / total_ms, time_ms=time_ms)

    def uses(groups: Mapping[str, Collection[NameTotal]]) -> dict[str, Use]:
        return {name: use(some) for name, some in groups.items()}

    groups = _group(ran, lambda one: one.rule.category_of(one.name) if one.rule is not None else "other")
    by_category = {category: use(groups.get(category, ())) for category in CATEGORIES}
    backends = _group(groups.get("attention", ()), lambda one: _backend(one, operators))
    paths = _group(ran, lambda one: one.rule.path if one.rule is not None else None)
    quant_types = _group(ran, lambda one: one.rule.quant_type if one.rule is not None else None)
    in_4bit = [one for path, some in paths.items() if path != "dequantize_8bit" for one in some]
    unknown = [one for one in ran if one.rule is None]
    unknown_share = use(unknown).time_share
    return KernelSummary(
        source="kineto",
        device="gpu",
        calls=sum(one.calls for one in ran),
        time_ms=total_ms,
        attention=Attention(backends={name: _backend_use(use(some), some) for name, some in backends.items()}),
        fourbit=Fourbit(paths=uses(paths), quant_types=uses(quant_types), dtypes=_count_dtypes(in_4bit)),
        matmul_dtypes=uses(_group(groups.get("matmul", ()), lambda one: one.facts.dtype or "unknown")),
        categories={category: one.time_share for category, one in by_category.items()},
        category_time_ms={category: one.time_ms for category, one in by_category.items()},
        busy_share=None,
        kernels_per_step=None,
        unclassified=Unclassified(
            time_share=unknown_share,
            names=tuple(one.name for one in unknown),
            kernels={one.name: use([one]) for one in unknown},
        ),
        notices=tuple(_name_notices(ran, unknown, unknown_share)),
    )


def _describe_kernel(total: NameTotal) -> NameTotal:
    rule = classify(total.name)
    return total if rule is None else replace(total, rule=rule, facts=read_facts(total.name, rule))


def _describe_operator(total: NameTotal) -> NameTotal:
    return replace(total, facts=KernelNameFacts(direction="backward" if "ackward" in total.name else "forward"))


def _group(launches: Iterable[NameTotal], key: Callable[[NameTotal], str | None]) -> dict[str, list[NameTotal]]:
    """Launches grouped by a key, without those that have none; the group with the most time first."""
    groups: defaultdict[str | None, list[NameTotal]] = defaultdict(list)
    for one in launches:
        groups[key(one)].append(one)
    known = [(name, some) for name, some in groups.items() if name is not None]
    return dict(sorted(known, key=lambda group: (-sum(one.time_ms for one in group[1]), group[0])))


def _backend(one: NameTotal, operators: Collection[str]) -> str:
    """Name the backend; a softmax kernel alone does not distinguish SDPA's math from eager attention.

    CPU operators distinguish them: math calls ``_safe_softmax``, and eager attention never enters SDPA.
    """
    assert one.rule is not None
    backend = one.rule.backend or one.rule.name
    if backend != UNDECIDED:
        return backend
    if any(name.startswith(("aten::_safe_softmax", "aten::_scaled_dot_product_attention_math")) for name in operators):
        return "math"
    if "aten::scaled_dot_product_attention" not in operators and {"aten::softmax", "aten::_softmax"} & set(operators):
        return "eager"
    return backend


def _backend_use(use: Use, some: Iterable[NameTotal]) -> BackendUse:
    directions = _count_calls(some, lambda one: one.facts.direction)
    causal = _count_calls(some, lambda one: one.facts.causal)
    return BackendUse(
        calls=use.calls,
        time_share=use.time_share,
        time_ms=use.time_ms,
        forward_calls=directions["forward"],
        backward_calls=directions["backward"],
        dtypes=_count_dtypes(some),
        causal_calls=causal[True],
        not_causal_calls=causal[False],
        kernels={one.name: one.calls for one in some if one.calls},
    )


def _count_calls(some: Iterable[NameTotal], fact: Callable[[NameTotal], Fact]) -> Counter[Fact]:
    counts = Counter[Fact]()
    for one in some:
        counts[fact(one)] += one.calls
    return counts


def _count_dtypes(some: Iterable[NameTotal]) -> dict[str, int]:
    counts = _count_calls(some, lambda one: one.facts.dtype)
    return {dtype: calls for dtype, calls in counts.most_common() if dtype is not None}


# --- the command -----------------------------------------------------------------------------------------------------

EXIT_BAD_INPUT = 2
_NAMES_SHOWN = 10
"""Unclassified names in the table; the JSON document has all of them."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``trace FILE [--json]``."""
    try:
        summary = read_trace(arguments.file)
    except TraceError as error:
        print(f"kernels_check: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if arguments.json:
        print(json.dumps({"schema": SCHEMA} | asdict(summary), allow_nan=False))
    else:
        _print(summary)
    for notice in summary.notices:
        print(f"notice: {notice}", file=sys.stderr)
    return 0


def _printable(text: str) -> str:
    """The text without control characters: names come from a file, and an escape sequence could hide a line."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


def _print(summary: KernelSummary) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    what = "kernel launches" if summary.device == "gpu" else "operator calls"
    where = "GPU time" if summary.device == "gpu" else "time in operators of the host (no GPU kernel recorded)"
    console.print(f"{summary.calls:,} {what}, {summary.time_ms:,.3f} ms of {where}")
    if summary.busy_share is not None:
        console.print(f"busy share {summary.busy_share:.1%} of the time from the first start to the last end")
    if (steps := summary.kernels_per_step) is not None:
        over = format_count(steps.steps, "step")
        console.print(f"kernels a step: median {steps.median:,g}, {steps.lowest:,} to {steps.highest:,} over {over}")

    def table(title: str, headings: Iterable[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        from rich.table import Table
        from rich.text import Text

        if not rows:
            return
        printed = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for heading in headings:
            printed.add_column(heading, justify="left" if heading in ("", "by name") else "right", overflow="fold")
        for row in rows:
            printed.add_row(*(Text(_printable(cell)) for cell in row))
        console.print(printed)

    used = "", "calls", "time ms", "share"
    backends = summary.attention.backends
    evidence = [(*row, _evidence(use)) for row, use in zip(_rows(backends), backends.values(), strict=True)]
    table("Attention", (*used, "by name"), evidence, "calls are launches")
    formats = ", ".join(f"{calls:,} in {dtype}" for dtype, calls in summary.fourbit.dtypes.items())
    table("4-bit paths", used, _rows(summary.fourbit.paths), f"compute dtype: {formats}" if formats else "")
    table("4-bit formats", used, _rows(summary.fourbit.quant_types))
    table("Matrix products by number format", used, _rows(summary.matmul_dtypes))
    times = summary.category_time_ms
    categories = [(name, f"{times[name]:,.3f}", f"{share:.1%}") for name, share in summary.categories.items()]
    table("Categories", ("", "time ms", "share"), categories)
    unknown = _rows(summary.unclassified.kernels)
    more = len(unknown) - _NAMES_SHOWN
    share = summary.unclassified.time_share
    table(
        f"Names that no rule knows: {len(unknown)} ({share:.1%} of the time, part of other)",
        used,
        unknown[:_NAMES_SHOWN],
        f"and {more} more, see --json" if more > 0 else "",
    )


def _rows(uses: Mapping[str, Use]) -> list[tuple[str, ...]]:
    return [(name, f"{use.calls:,}", f"{use.time_ms:,.3f}", f"{use.time_share:.1%}") for name, use in uses.items()]


def _evidence(use: BackendUse) -> str:
    """Facts that the kernel names prove."""
    known = [f"{calls:,} {dtype}" for dtype, calls in use.dtypes.items()]
    if use.forward_calls or use.backward_calls:
        known.insert(0, f"{use.forward_calls:,} forward, {use.backward_calls:,} backward")
    known += [f"{use.causal_calls:,} causal"] if use.causal_calls else []
    known += [f"{use.not_causal_calls:,} not causal"] if use.not_causal_calls else []
    return ", ".join(known)
