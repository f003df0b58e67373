"""Which level of interleaving: the finest that the variants and the memory allow.

How finely variants alternate matters more than which test is used. Measured on a noisy machine, the standard deviation
of the log ratio of two identical builds is 27 % when their processes alternate, 2.2 % when two live processes take
turns step by step, and 1.9 % when all take turns inside one process. So the level is chosen from what differs between
the variants and from what fits into memory, and the reason is part of every result.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import UsageError
from harness.records.record import Interleaving
from harness.records.units import format_bytes
from harness.studies.variant import ADAPTER_FIELDS, Variant

LEVELS: tuple[Interleaving, ...] = ("shared-base", "lockstep", "replicates")
MEMORY_SHARE = 0.8
"""Share of the free memory that live processes may be expected to take: a forecast errs, and a machine that swaps
measures nothing."""


def choose_level(
    variants: Sequence[Variant],
    *,
    together_bytes: int | None,
    free_bytes: int | None,
    asked: str | None = None,
    workloads: int = 1,
    ranks: int = 1,
    adapters: int = 1,
    apart: str | None = None,
) -> tuple[Interleaving, str]:
    """The level and the reason for it.

    Args:
        variants: what will be compared.
        together_bytes: expected memory of all trials of a replicate when each has a live process of its own; None where
            it cannot be known.
        free_bytes: memory that is free on the device now; None where it cannot be known.
        asked: the level that the user asks for; None to choose.
        workloads: on how many different workloads they are measured.
        ranks: processes of a trial.
        adapters: those that a trial's requests have on its base, at most.
        apart: why each variant should have a process of its own where memory allows for that; None where none needs it.

    Raises:
        UsageError: the level asked for is unknown, or not possible for these variants.
    """
    obstacle = shared_base_obstacle(variants)
    if workloads > 1:  # what trials on one base find out once for all, such as its held-out loss, is of one workload
        obstacle = f"the variants are measured on {workloads} workloads"
    if ranks > 1:
        obstacle = f"a trial has {ranks} ranks, which are processes of its own"
    if adapters > 1:
        obstacle = f"requests have {adapters} adapters on a base, and those of other trials would take part in a switch"
    if asked is not None:
        if asked not in LEVELS:
            raise UsageError(f"interleave = {asked!r}: not known. Use one of {', '.join(LEVELS)}.")
        if asked == "shared-base" and obstacle is not None:
            raise UsageError(f"interleave = 'shared-base': {obstacle}. Use lockstep, or leave the choice to lorameter.")
        return asked, "asked for"
    together = free_bytes is not None and together_bytes is not None and fits(together_bytes, free_bytes)
    if obstacle is None and (apart is None or not together):
        return "shared-base", "the variants differ in their adapters only"
    if free_bytes is None:
        return "replicates", f"{obstacle}, and how much memory is free cannot be known"
    if together_bytes is None:
        return "replicates", f"{obstacle}, and how much memory they need together cannot be known"
    sizes = f"all live together need about {format_bytes(together_bytes)} of {format_bytes(free_bytes)} free"
    if not together:
        return "replicates", f"{obstacle}, and {sizes}"
    return "lockstep", f"{obstacle or apart}; {sizes}"


def fits(needed_bytes: int, free_bytes: int) -> bool:
    """Whether processes that need so much may be live together."""
    return needed_bytes <= int(MEMORY_SHARE * free_bytes)


def shared_base_obstacle(variants: Sequence[Variant]) -> str | None:
    """Why these variants cannot stand on one base model, naming the variant; None if they can."""
    first = variants[0]
    for variant in variants:
        label = variant.name or variant.id
        if variant.command:
            return f"{label} is a command, which has a model of its own"
        if variant.rewrites_base:
            return f"{label}: init_lora_weights = {variant.init_lora_weights!r} rewrites the base"
        if variant.bias != "none":
            return f"{label}: bias = {variant.bias!r} trains the base's own biases"
        if variant.compile:
            return f"{label}: compile = True would recompile for every adapter, and fall back at its limit"
        if variant.merge_adapter:
            return f"{label}: merge_adapter = True changes the base for its requests"
        if variant.liger_kernel:
            return f"{label}: liger_kernel = True swaps functions of the architecture for the whole process"
        differing = sorted(set(variant.differences(first)) - ADAPTER_FIELDS)
        if differing:
            return f"{label} differs from {first.name or first.id} in {', '.join(differing)}"
    return None
