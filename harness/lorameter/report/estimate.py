"""Expected memory of a variant by kind, and the measured peaks of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lorameter.records.memory_account import in_order, title_of
from lorameter.records.units import format_bytes
from lorameter.report.blocks import Block, Cell, Document, Row, Table, name_columns, say, write_row
from lorameter.report.phrases import say_request

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.models.costs.memory import MemoryEstimate
    from lorameter.studies.variant import Variant
    from lorameter.studies.workload import Workload


MIB = 2**20
_BESIDE = {"context": "outside: CUDA's context", "paged_optimizer_state": "outside: paged optimizer state"}


def describe_estimate(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    *,
    elsewhere: bool = False,
) -> Document:
    """One row a kind, one column a phase; `measured` are peaks in bytes by phase, where a run has them.

    Without estimates, as of a model whose layers are not known, there are the measured peaks alone. `elsewhere` is said
    of another device: whether it fits on that is another document (`lorameter.report.memory_fit`).
    """
    return tuple(_blocks(variant, workload, machine, estimates, measured, elsewhere))


def _blocks(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    elsewhere: bool,
) -> Iterator[Block]:
    where = "device memory" if machine.device == "cuda" else "host memory"
    yield say(
        f"{variant.name} on {workload.model}, {workload.batch_size} × {workload.sequence_length} "
        f"tokens a batch, {say_request(workload)} a request; nothing was loaded",
        indented=False,
    )
    if not estimates:
        yield say("estimated peak: unknown", indented=False)
        for phase, peak in measured.items():
            yield say(f"measured peak, {phase}: {_mib(peak).text} MiB of {where}", indented=False)
        return
    heads = name_columns(f"{where}, MiB", *(estimate.phase for estimate in estimates))
    yield Table(heads=heads, rows=(*_kinds(estimates), *_peaks(estimates, measured), *_beside(estimates)))
    if elsewhere:
        return
    if not measured:
        yield say("No earlier run of this variant and workload on this machine has measured it.", indented=False)
    has = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    if has is not None:
        needed = max(one.needed_bytes for one in estimates)
        yield say(f"{format_bytes(needed)} of {format_bytes(has)} here", indented=False)


def _kinds(estimates: Sequence[MemoryEstimate]) -> Iterator[Row]:
    kinds = in_order({kind: 1 for estimate in estimates for kind in estimate.kinds})
    for place, kind in enumerate(kinds, start=1):
        cells = (Cell(text=title_of(kind)), *(_mib(estimate.kinds.get(kind, 0)) for estimate in estimates))
        yield Row(cells=cells, ends_group=place == len(kinds))


def _peaks(estimates: Sequence[MemoryEstimate], measured: Mapping[str, int]) -> Iterator[Row]:
    yield write_row("estimated peak", *(_mib(estimate.total_bytes) for estimate in estimates), strong=True)
    if measured:
        yield write_row("measured peak", *(_mib(measured.get(estimate.phase, 0)) for estimate in estimates))
        yield write_row("error of the estimate", *(_error(estimate, measured) for estimate in estimates))


def _beside(estimates: Sequence[MemoryEstimate]) -> Iterator[Row]:
    for kind, title in _BESIDE.items():
        if any(estimate.beside.get(kind) for estimate in estimates):
            yield write_row(title, *(_mib(estimate.beside.get(kind, 0)) for estimate in estimates))


def _mib(size: int) -> Cell:
    return Cell(text=f"{size / MIB:,.1f}", value=size, unit="byte") if size else Cell()


def _error(estimate: MemoryEstimate, measured: Mapping[str, int]) -> Cell:
    peak = measured.get(estimate.phase)
    if not peak:
        return Cell()
    error = estimate.total_bytes / peak - 1
    return Cell(text=f"{error:+.1%}", value=error, unit="1")
