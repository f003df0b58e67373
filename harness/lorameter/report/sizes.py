"""What each variant of a study trains, by exact count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorameter.report.blocks import Cell, Document, Row, Table, name_columns, say, write_row

if TYPE_CHECKING:
    from lorameter.trial.building.sizes import Sizes

MIB = 2**20
_HEADS = name_columns(
    "setting", "trainable parameters", "of the base", "adapter, MiB", "optimizer, MiB", "gradients, MiB"
)


def describe_sizes(model: str, sizes: Sequence[Sizes], *, unknown: str | None = None) -> Document:
    """One row a variant; exact counts, so no interval. `unknown` is why a formula cannot be held against them."""
    base = f"{model}: {sizes[0].base_parameters:,} parameters in the base; counted, nothing was loaded"
    alone = f"counted by PEFT alone; other memory of the training is unknown: {unknown}"
    return (
        say(base, indented=False),
        Table(heads=_HEADS, rows=tuple(map(_row, sizes))),
        *((say(alone, indented=False),) if unknown else ()),
    )


def _row(one: Sizes) -> Row:
    return write_row(
        one.variant,
        Cell(text=f"{one.trainable_parameters:,}", value=one.trainable_parameters, unit="1"),
        Cell(text=f"{100 * one.share:.3f} %", value=one.share, unit="1"),
        *map(_mib, (one.adapter_bytes, one.optimizer_state_bytes, one.gradient_bytes)),
    )


def _mib(size: int) -> Cell:
    return Cell(text=f"{size / MIB:.2f}", value=size, unit="byte")
