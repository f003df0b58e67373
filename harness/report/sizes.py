"""What the variants of a study train, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from harness.trial.building.sizes import Sizes

MIB = 2**20
_HEADS = ("setting", "trainable parameters", "of the base", "adapter, MiB", "optimizer, MiB", "gradients, MiB")


def print_sizes(model: str, sizes: Sequence[Sizes], console: Console) -> None:
    """One row a variant; exact counts, so no interval."""
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
