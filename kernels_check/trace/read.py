"""Judges a recording made elsewhere: which kernels ran, and what they spent the time on.

    python -m kernels_check trace FILE [--json]

A trace without GPU kernels is judged by the operators of the host, and says so: names of operators prove the attention
backend and the 4-bit path as well, only busy share and kernels a step have no meaning there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from kernels_check.rules import classify
from kernels_check.trace.events import KernelTotal, Kineto, read_kineto, read_nsys
from kernels_check.trace.file import KernelNameFacts, TraceError, TraceFile, open_recording, read_facts
from kernels_check.trace.summary import (
    EventArrays,
    KernelSummary,
    Launches,
    busy_share,
    columns,
    operator_times,
    step_counts,
    summarise,
    totals,
)

_AMD = re.compile(
    r"^(Custom_)?Cijk_A|ck_tile|\bck::|^_ZN(2ck|5aiter)\d|aotriton|\brocprim::|^__amd_rocclr_|^igemm_\w+_gtc|\bhip"
)
"""Names that only ROCm's libraries give."""
_SHOWN = 40
"""Characters of such a name that the notice has."""
_MUCH = 0.03
"""Share of the time in unknown kernels from which a notice warns of it."""


def read_trace(path: str | PathLike[str]) -> KernelSummary:
    """Judge a Kineto/Chrome trace (.json, .json.gz) or an nsys ``cuda_gpu_kern_sum`` table (.csv, .csv.gz).

    Hundreds of megabytes are streamed; what is kept grows by some forty bytes an event.

    Raises:
        TraceError: the file is missing, empty, damaged or cut off, no recording, or without anything that ran.
    """
    with open_recording(Path(path)) as (recording, kind):
        if kind == "nsys":
            return _judge_table(recording)
        trace = read_kineto(recording)
        if len(trace.gpu):
            return _judge_kernels(recording, trace)
        return _judge_operators(recording, trace)


def _judge_table(recording: TraceFile) -> KernelSummary:
    rows, notices = read_nsys(recording)
    launches = _launches(rows)
    _require_time(recording, launches)
    notices.append("an nsys summary has sums and no intervals: neither busy share nor kernels per step can be computed")
    return summarise(launches, source="nsys", notices=[*notices, *_name_notices(launches)])


def _judge_kernels(recording: TraceFile, trace: Kineto) -> KernelSummary:
    kept = columns(trace.gpu)
    launches = _launches(totals(trace.gpu, kept))
    _require_time(recording, launches)
    return summarise(
        launches,
        source="kineto",
        operators=frozenset(trace.operators.names),
        busy_share=busy_share(trace.gpu, kept),
        kernels_per_step=step_counts(trace, kept),
        notices=[*_event_notices(kept, trace.not_complete), *_name_notices(launches)],
    )


def _judge_operators(recording: TraceFile, trace: Kineto) -> KernelSummary:
    if not len(trace.operators):
        raise TraceError(
            f"{recording.path}: {trace.events:,} trace events, none of them a GPU kernel or an operator: another "
            "program's trace? Record with torch.profiler and activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]"
        )
    kept = columns(trace.operators)
    launches = [
        Launches(name=one.name, calls=one.calls, time_ms=one.time_ms, rule=one.rule, facts=_operator_facts(one.name))
        for one in operator_times(trace.operators, kept)
    ]
    _require_time(recording, launches)
    notice = (
        f"no GPU kernel in this trace: judged by {len(kept.name):,} operators of the host, whose time is a CPU's. If "
        "the step ran on a GPU, record again with activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]"
    )
    return summarise(
        launches,
        source="kineto",
        device="cpu",
        operators=frozenset(trace.operators.names),
        notices=[notice, *_event_notices(kept, 0)],
    )


def _launches(rows: Iterable[KernelTotal]) -> list[Launches]:
    launches = []
    for row in rows:
        rule = classify(row.name)
        read = read_facts(row.name, rule) if rule is not None else None
        launches.append(Launches(name=row.name, calls=row.calls, time_ms=row.time_ms, rule=rule, facts=read))
    return launches


def _operator_facts(name: str) -> KernelNameFacts:
    return KernelNameFacts(dtype=None, causal=None, direction="backward" if "ackward" in name else "forward")


def _require_time(recording: TraceFile, launches: Iterable[Launches]) -> None:
    total_ms = sum(one.time_ms for one in launches)
    if not (total_ms > 0.0 and math.isfinite(total_ms)):
        raise TraceError(
            f"{recording.path}: what ran has {total_ms} ms in all: no event has a usable duration (dur of phase X), so "
            "no share can be given. Record it again"
        )


def _event_notices(kept: EventArrays, not_complete: int) -> Iterator[str]:
    untimed = sum(map(math.isnan, kept.duration_us.tolist()))
    unplaced = sum(map(math.isnan, kept.start_us.tolist()))
    if kept.duplicates:
        yield f"{kept.duplicates:,} events stood in the file more than once and were counted once"
    if untimed:
        yield f"{untimed:,} events have no usable duration (missing, negative or no number): counted, with no time"
    if unplaced:
        yield f"{unplaced:,} events have no usable start: in the sums, but neither in the busy share nor in a step"
    if not_complete:
        yield f"{not_complete:,} GPU events are not of phase X and were left out"


def _name_notices(launches: Iterable[Launches]) -> Iterator[str]:
    """Names that hide what ran, which full demangled names would show."""
    launches = list(launches)
    foreign = [one for one in launches if _AMD.search(one.name)]
    if foreign:
        most = min(foreign, key=lambda one: (-one.time_ms, one.name))
        yield (
            f"this recording is of an AMD GPU ({most.name[:_SHOWN]}): its kernels are known from published "
            "recordings only, and nothing that is said here of CUDA's libraries is about it"
        )
    unknown = [one for one in launches if one.rule is None]
    share = sum(one.time_ms for one in unknown) / sum(one.time_ms for one in launches)
    if share > _MUCH:
        largest = min(unknown, key=lambda one: (-one.time_ms, one.name))
        yield (
            f"{share:.0%} of the time is in kernels that no rule knows (most in {largest.name[:_SHOWN]}), so each "
            "category may have that much more than is shown; report the names, which --json lists, to have them added"
        )
    names = [one.name for one in unknown]
    if any(name in ("device_kernel", "Kernel", "Kernel2") for name in names):
        yield "names are cut down to the function (device_kernel): record full names, FlashAttention-3 shows only there"
    if any(name.startswith("_Z") for name in names):
        yield "some names are mangled (_Z...): pass the file through c++filt, the rules read demangled names"
