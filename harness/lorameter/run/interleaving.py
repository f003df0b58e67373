"""Chooses the interleaving: the finest level that the variants and the memory allow.

The granularity of interleaving matters more than the choice of the test. On a noisy machine, the measured standard
deviation of the log ratio of two identical builds is 27 % if their processes alternate, 2.2 % if two live processes
take turns step by step, and 1.9 % if all variants take turns inside one process. So the level depends on the
differences between the variants and on the memory, and every result contains the reason. On a CPU one process is no
better than several, because its variants share a heap (`ONE_HEAP`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.errors import UsageError, require
from lorameter.models.methods import method_facts
from lorameter.records.record import Interleaving
from lorameter.records.units import format_bytes
from lorameter.studies.variant import ADAPTER_FIELDS, AnyVariant, LoraVariant, Variant

LEVELS: tuple[Interleaving, ...] = ("shared-base", "lockstep", "replicates")
SCATTER: dict[Interleaving, float] = {"shared-base": 0.019, "lockstep": 0.022, "replicates": 0.27}
"""Standard deviations of a ratio, assumed on a machine without earlier runs."""
MEMORY_SHARE = 0.8
"""Share of the free memory that live processes are expected to use at most: estimates have errors, and measurements on
a swapping machine are useless."""
ONE_HEAP = "variants in one process would be served from each other's memory"
"""Why variants on a CPU do not share a base in one process. Memory that the C library keeps from a memory-intensive
variant serves the next variant, which then waits for fewer new pages than in its own process. Measured on a tiny model
(page faults of a step, and its time): r 16 alone 1,250 and 53.3 ms, with DoRA in its process 0 and 47.0 ms, while DoRA
took 76 ms in both cases."""


def choose_interleaving(
    variants: Sequence[AnyVariant],
    *,
    together_bytes: int | None,
    free_bytes: int | None,
    requested: str | None = None,
    workloads: int = 1,
    ranks: int = 1,
    adapters: int = 1,
    sided: bool = False,
    one_heap: bool = False,
) -> tuple[Interleaving, str]:
    """The level and its reason.

    Args:
        variants: the variants to compare.
        together_bytes: expected memory of all trials of a replicate if each has its own live process; None if unknown.
        free_bytes: memory that is free on the device now; None if unknown.
        requested: the level that the user requests; None to choose one.
        workloads: number of different workloads.
        ranks: ranks of a trial.
        adapters: maximum number of adapters on the base during a trial's requests.
        sided: whether the variants are on the sides of an A/B.
        one_heap: whether variants in one process share a heap, as on a CPU, and are faster there than alone: each then
            has its own process if memory allows.

    Raises:
        UsageError: the requested level is unknown, or not possible for these variants.
    """
    obstacles = (
        (sided, "base and candidate are separate processes"),
        (
            adapters > 1,
            f"requests have {adapters} adapters on a base, and those of other trials would take part in a switch",
        ),
        (ranks > 1, f"a trial has {ranks} ranks, each of which is a process"),
        # Trials on one base share values, such as its held-out loss, that depend on the workload.
        (workloads > 1, f"the variants are measured on {workloads} workloads"),
    )
    obstacle = next((why for applies, why in obstacles if applies), None) or shared_base_obstacle(variants)
    if requested is not None:
        if requested not in LEVELS:
            raise UsageError(f"interleave = {requested!r}: not known. Use one of {', '.join(LEVELS)}.")
        require(
            requested != "shared-base" or obstacle is None,
            f"interleave = 'shared-base': {obstacle}. Use lockstep, or leave the choice to lorameter.",
        )
        return requested, "requested"
    on_one_base = "the variants differ in their adapters only"
    if obstacle is None and not one_heap:
        return "shared-base", on_one_base
    other: Interleaving = "replicates" if obstacle else "shared-base"
    why = obstacle or on_one_base
    if free_bytes is None:
        return other, f"{why}, and the amount of free memory is unknown"
    if together_bytes is None:
        return other, f"{why}, and their total memory is unknown"
    sizes = f"all live together need about {format_bytes(together_bytes)} of {format_bytes(free_bytes)} free"
    if not fits_in_memory(together_bytes, free_bytes):
        return other, f"{why}, and {sizes}"
    return "lockstep", f"{obstacle or ONE_HEAP}; {sizes}"


_PER_PROCESS = {
    "compile": "compile = True would recompile for every adapter, and fall back at its limit",
    "merge_adapter": "merge_adapter = True changes the base during its requests",
    "liger_kernel": "liger_kernel = True swaps functions of the architecture for the whole process",
}
"""Why a variant with one of these keys shares no process."""


def fits_in_memory(needed_bytes: int, free_bytes: int) -> bool:
    """Whether processes with this memory can be live at the same time."""
    return needed_bytes <= int(MEMORY_SHARE * free_bytes)


def shared_base_obstacle(variants: Sequence[AnyVariant]) -> str | None:
    """Why these variants cannot share one base model, with the variant's name; None if they can."""
    first = variants[0]
    for variant in variants:
        label = variant.name or variant.id
        if not isinstance(variant, Variant):
            return f"{label} is a command, which has its own model"
        if variant.method_name != first.method_name:
            return f"{label} and {first.name or first.id} have different methods, and PEFT allows one method on a base"
        if isinstance(variant, LoraVariant):
            if variant.rewrites_base:
                return f"{label}: init_lora_weights = {variant.init_lora_weights!r} rewrites the base"
            if variant.trains_base:
                return f"{label}: bias = {variant.bias!r} trains the base's own biases"
        else:
            facts = method_facts([variant])[variant.name]
            if variant.trains_base or not (facts.keeps_base and facts.several):
                return f"{label}: {variant.method_name} changes the base, or allows only one adapter on it"
        if why := next((why for key, why in _PER_PROCESS.items() if getattr(variant, key)), None):
            return f"{label}: {why}"
        differing = sorted(
            key for key in variant.differences(first) if key not in ADAPTER_FIELDS and not key.startswith("peft.")
        )
        if differing:
            return f"{label} differs from {first.name or first.id} in {', '.join(differing)}"
    return None
