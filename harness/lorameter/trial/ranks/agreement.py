"""Whether several ranks train what one rank trains on the same batches: their losses, step by step.

They cannot be equal to the bit. A mean over ranks adds in another order, and Adam's first updates have the size of the
learning rate whatever the size of the gradient, so that an element whose gradient is rounding alone may go the other
way. Seen of right runs over 6 to 9 steps: 2e-7 in float32, 1.2e-4 in bfloat16; of NF4 that FSDP2 gathers wrongly 1.7e-2
in the second step already (docs/machines.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorameter.studies.variant import LoraVariant, Variant

PATH = "ranks.losses"
FEWEST = 3
"""Steps without which nothing is said: the known faults begin with the second."""
EXACT, ROUNDED = 1e-4, 3e-3
"""How far a loss may be from that of one rank, over it: of what computes in float32, and in 16 bits."""


def tolerance_of(variant: Variant) -> float:
    """The largest allowed relative difference of losses."""
    compute = {variant.autocast or variant.dtype, variant.compute_dtype if variant.is_4bit else variant.dtype}
    return EXACT if compute == {"float32"} and variant.adapter_dtype in (None, "float32") else ROUNDED


def compare_losses(several: Sequence[float], one: Sequence[float], variant: Variant, ranks: int) -> dict[str, Any]:
    """A check, as data: the losses of several ranks compared with those of one, from the first step on."""
    pairs = list(zip(several, one, strict=False))
    if isinstance(variant, LoraVariant) and variant.lora_dropout:
        return _check(None, None, "not_applicable", "ranks draw their own dropout, so losses are not those of one rank")
    if len(pairs) < FEWEST:
        return _check(True, None, "unknown", f"{len(pairs)} steps are too few to compare: take {FEWEST} or more")
    tolerance = tolerance_of(variant)
    for step, (ours, its) in enumerate(pairs, start=1):
        if not abs(ours - its) <= tolerance * abs(its):
            return _check(
                True,
                False,
                "fallback",
                f"step {step} has a loss of {ours:.5f} by {ranks} ranks and of {its:.5f} by one with the same batches "
                f"(within {tolerance:.2%} is equal): they do not train the same",
            )
    apart = max(abs(ours - its) / abs(its) for ours, its in pairs)
    return _check(
        True, True, "active", f"losses of {len(pairs)} steps within {apart:.2g} of those of one rank ({tolerance:g})"
    )


def _check(required: bool | None, observed: bool | None, status: str, reason: str) -> dict[str, Any]:
    return {"path": PATH, "required": required, "observed": observed, "status": status, "reason": reason}
