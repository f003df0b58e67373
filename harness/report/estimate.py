"""Expected memory of a variant by kind, with the measured peaks of an earlier run beside it, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.records.memory_account import in_order, title_of
from harness.records.units import format_bytes

if TYPE_CHECKING:
    from harness.machine.provenance import Machine
    from harness.models.costs.memory import MemoryEstimate
    from harness.studies.variant import Variant
    from harness.studies.workload import Workload
    from harness.trial.building.sizes import Sizes


MIB = 2**20
_BESIDE = {"context": "beside: CUDA's context", "paged_optimizer_state": "beside: paged optimizer state"}


def print_estimate(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    console: Console,
) -> None:
    """One row a kind, one column a phase; `measured` are peaks in bytes by phase, where a run has them.

    Without estimates, as of a model whose layers are not known, there are the measured peaks alone.
    """
    where = "device memory" if machine.device == "cuda" else "host memory"
    console.print(
        f"{escape(variant.name)} on {escape(workload.model)}, {workload.batch_size} × {workload.sequence_length} "
        f"tokens a batch, {workload.prompt_tokens} + {workload.new_tokens} a request; nothing was loaded"
    )
    if not estimates:
        console.print("estimated peak: unknown")
        for phase, peak in measured.items():
            console.print(f"measured peak, {phase}: {_mib(peak)} MiB of {where}")
        return
    table = Table()
    table.add_column(f"{where}, MiB")
    for estimate in estimates:
        table.add_column(estimate.phase, justify="right")
    for kind in in_order({kind: 1 for estimate in estimates for kind in estimate.kinds}):
        table.add_row(title_of(kind), *(_mib(estimate.kinds.get(kind, 0)) for estimate in estimates))
    table.add_section()
    table.add_row("estimated peak", *(_mib(estimate.total_bytes) for estimate in estimates), style="bold")
    if measured:
        table.add_row("measured peak", *(_mib(measured.get(estimate.phase, 0)) for estimate in estimates))
        table.add_row("error of the estimate", *(_error(estimate, measured) for estimate in estimates))
    for kind, title in _BESIDE.items():
        if any(estimate.beside.get(kind) for estimate in estimates):
            table.add_row(title, *(_mib(estimate.beside.get(kind, 0)) for estimate in estimates))
    console.print(table)
    if not measured:
        console.print("No earlier run of this variant and workload on this machine has measured it.")
    has = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    if has is not None:
        console.print(f"{format_bytes(max(one.needed_bytes for one in estimates))} of {format_bytes(has)} here")


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}" if size else ""


def _error(estimate: MemoryEstimate, measured: Mapping[str, int]) -> str:
    peak = measured.get(estimate.phase)
    return f"{estimate.total_bytes / peak - 1:+.1%}" if peak else ""


_HEADS = ("setting", "trainable parameters", "of the base", "adapter, MiB", "optimizer, MiB", "gradients, MiB")


def print_sizes(model: str, sizes: Sequence[Sizes], console: Console, *, unknown: str | None = None) -> None:
    """One row a variant; exact counts, so no interval. `unknown` is why a formula cannot be held against them."""
    console.print(f"{escape(model)}: {sizes[0].base_parameters:,} parameters in the base; counted, nothing was loaded")
    table = Table()
    for index, head in enumerate(_HEADS):
        table.add_column(head, justify="right" if index else "left")
    for one in sizes:
        table.add_row(
            escape(one.variant),
            f"{one.trainable_parameters:,}",
            f"{100 * one.share:.3f} %",
            *(f"{size / MIB:.2f}" for size in (one.adapter_bytes, one.optimizer_state_bytes, one.gradient_bytes)),
        )
    console.print(table)
    if unknown is not None:
        console.print(f"counted by PEFT alone, and what training takes beside is unknown: {escape(unknown)}")
