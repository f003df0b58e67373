"""Which interleaving: the finest that the variants and the memory allow.

How finely variants alternate matters more than which test is used. Measured on a noisy machine, the standard deviation
of the log ratio of two identical builds is 27 % when their processes alternate, 2.2 % when two live processes take
turns step by step, and 1.9 % when all take turns inside one process. So the level is chosen from what differs between
the variants and from what fits into memory, and the reason is part of every result. On a CPU one process is no finer
than several: variants have one heap in it (`ONE_HEAP`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.errors import UsageError
from lorameter.models.methods import facts_of
from lorameter.records.record import Interleaving
from lorameter.records.units import format_bytes
from lorameter.studies.variant import ADAPTER_FIELDS, AnyVariant, LoraVariant, Variant

LEVELS: tuple[Interleaving, ...] = ("shared-base", "lockstep", "replicates")
SCATTER: dict[Interleaving, float] = {"shared-base": 0.019, "lockstep": 0.022, "replicates": 0.27}
"""These standard deviations, which are assumed on a machine without runs."""
MEMORY_SHARE = 0.8
"""Share of the free memory that live processes may be expected to take: a forecast errs, and a machine that swaps
measures nothing."""
ONE_HEAP = "variants in one process would be served from each other's memory"
"""Why variants that could share a base do not, on a CPU. What the C library keeps of a variant that needs much serves
the next one, which waits for fewer new pages than by itself. Measured on a tiny model (page faults of a step, and its
time): r 16 alone 1,250 and 53.3 ms, with DoRA in its process 0 and 47.0 ms, while DoRA took 76 ms either way."""


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
    """The level and the reason for it.

    Args:
        variants: what will be compared.
        together_bytes: expected memory of all trials of a replicate when each has a live process of its own; None where
            it cannot be known.
        free_bytes: memory that is free on the device now; None where it cannot be known.
        requested: the level that the user names; None to choose.
        workloads: on how many different workloads they are measured.
        ranks: processes of a trial.
        adapters: those that a trial's requests have on its base, at most.
        sided: whether they are on the sides of an A/B.
        one_heap: whether variants in one process take their memory from one heap, as on a CPU, and are faster there
            than by themselves: each then has a process of its own where memory allows for that.

    Raises:
        UsageError: the requested level is unknown, or not possible for these variants.
    """
    obstacle = shared_base_obstacle(variants)
    if workloads > 1:  # what trials on one base find out once for all, such as its held-out loss, is of one workload
        obstacle = f"the variants are measured on {workloads} workloads"
    if ranks > 1:
        obstacle = f"a trial has {ranks} ranks, which are processes of its own"
    if adapters > 1:
        obstacle = f"requests have {adapters} adapters on a base, and those of other trials would take part in a switch"
    if sided:
        obstacle = "base and candidate are processes of their own"
    if requested is not None:
        if requested not in LEVELS:
            raise UsageError(f"interleave = {requested!r}: not known. Use one of {', '.join(LEVELS)}.")
        if requested == "shared-base" and obstacle is not None:
            raise UsageError(f"interleave = 'shared-base': {obstacle}. Use lockstep, or leave the choice to lorameter.")
        return requested, "asked for"
    on_one_base = "the variants differ in their adapters only"
    if obstacle is None and not one_heap:
        return "shared-base", on_one_base
    other: Interleaving = "replicates" if obstacle else "shared-base"
    why = obstacle or on_one_base
    if free_bytes is None:
        return other, f"{why}, and how much memory is free cannot be known"
    if together_bytes is None:
        return other, f"{why}, and how much memory they need together cannot be known"
    sizes = f"all live together need about {format_bytes(together_bytes)} of {format_bytes(free_bytes)} free"
    if not fits(together_bytes, free_bytes):
        return other, f"{why}, and {sizes}"
    return "lockstep", f"{obstacle or ONE_HEAP}; {sizes}"


def fits(needed_bytes: int, free_bytes: int) -> bool:
    """Whether processes that need so much may be live together."""
    return needed_bytes <= int(MEMORY_SHARE * free_bytes)


def shared_base_obstacle(variants: Sequence[AnyVariant]) -> str | None:
    """Why these variants cannot share one base model, naming the variant; None if they can."""
    first = variants[0]
    for variant in variants:
        label = variant.name or variant.id
        if not isinstance(variant, Variant):
            return f"{label} is a command, which has a model of its own"
        if variant.method_name != first.method_name:
            return f"{label} has another method than {first.name or first.id}, and PEFT has adapters of one on a base"
        if isinstance(variant, LoraVariant):
            if variant.rewrites_base:
                return f"{label}: init_lora_weights = {variant.init_lora_weights!r} rewrites the base"
            if variant.trains_base:
                return f"{label}: bias = {variant.bias!r} trains the base's own biases"
        else:
            facts = facts_of([variant])[variant.name]
            if variant.trains_base or not (facts.keeps_base and facts.several):
                return f"{label}: {variant.method_name} changes the base, or has one adapter on it"
        if variant.compile:
            return f"{label}: compile = True would recompile for every adapter, and fall back at its limit"
        if variant.merge_adapter:
            return f"{label}: merge_adapter = True changes the base for its requests"
        if variant.liger_kernel:
            return f"{label}: liger_kernel = True swaps functions of the architecture for the whole process"
        differing = sorted(
            key for key in variant.differences(first) if key not in ADAPTER_FIELDS and not key.startswith("peft.")
        )
        if differing:
            return f"{label} differs from {first.name or first.id} in {', '.join(differing)}"
    return None
