"""Checks what several ranks and several adapters need of a variant and of the machine, before anything is started."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lorameter.errors import UsageError
from lorameter.machine.gpus import say_entries, shared_boards, visible_cards
from lorameter.machine.nvml import VARIABLE, visible_devices
from lorameter.machine.provenance import Machine, library_version
from lorameter.records.record import Notice
from lorameter.studies.variant import PAGED, LoraVariant, Variant
from lorameter.studies.workload import Workload

SHARDS_INTEGERS = "2.12"
"""FSDP2 of an earlier torch gives every shard a gradient, which integers cannot have: pytorch/pytorch#177844."""


def shards_4bit(torch: str | None) -> bool:
    """Whether FSDP2 of this version of torch shards 4-bit weights, which are stored as integers."""
    from packaging.version import Version

    return torch is None or Version(torch).release >= Version(SHARDS_INTEGERS).release


def processes_on_device(workload: Workload, device: str) -> int:
    """How many processes of one trial share the memory of a device: on a GPU a rank has a GPU of its own, which the
    one that takes turns with all ranks shares with the first."""
    if workload.ranks == 1:
        return 1
    return (1 if device == "cuda" else workload.ranks) + workload.scaling


def check_ranks(where: str, variant: Variant, workload: Workload, machine: Machine, *, here: bool = True) -> None:
    """Refuse what several ranks cannot do. Raises `UsageError`, naming key, value and remedy.

    `here`: whether they take the first GPUs that this process sees; else whoever chooses their GPUs counts them.
    """
    if workload.ranks == 1:
        return
    if not isinstance(variant, LoraVariant):
        raise UsageError(
            f"{where}: ranks = {workload.ranks}: of several ranks LoRA in its short form is measured, and the method "
            f"is {variant.method_name}. Leave ranks out."
        )
    if machine.device == "cuda" and here:
        _check_cards(where, workload)
    sharded, torch = workload.strategy == "fsdp2", library_version("torch")
    refused = (
        (variant.compile, "compile = True", "ranks are measured without it", "Leave it out."),
        (
            sharded and variant.quantization == "int8",
            "quantization = 'int8'",
            "FSDP2 does not shard the weights of LLM.int8, whose scales are stored separately",
            'Use strategy = "ddp", or another quantization.',
        ),
        (
            sharded and variant.is_4bit and not shards_4bit(torch),
            f"quantization = {variant.quantization!r}",
            f"FSDP2 of torch {torch} shards no integers, as which 4-bit weights are stored",
            f'Use torch {SHARDS_INTEGERS} or later, or strategy = "ddp".',
        ),
        (
            sharded and variant.optimizer in PAGED,
            f"optimizer = {variant.optimizer!r}",
            "optimizers of bitsandbytes take no sharded parameters",
            'Use "adamw" or "adamw_fused", or strategy = "ddp".',
        ),
        (
            sharded and variant.rewrites_base,
            f"init_lora_weights = {variant.init_lora_weights!r}",
            "it rewrites the base, of which each rank would have to hold the whole",
            'Use strategy = "ddp".',
        ),
    )
    for applies, what, why, remedy in refused:
        if applies:
            raise UsageError(f"{where}: {what}: with ranks = {workload.ranks}, {why}. {remedy}")


def rank_notices(variant: Variant, workload: Workload) -> Iterator[Notice]:
    """What should be known of several ranks."""
    if workload.ranks > 1 and workload.strategy == "fsdp2" and variant.is_4bit:
        if workload.repair:
            yield Notice(
                code="bitsandbytes-fsdp2-patched",
                message=f"{variant.name}: bitsandbytes is mended for FSDP2 ({workload.repair}): the quantisation "
                f"state is set on the weight of the layer. Without this repair the released package may compute "
                f"another model.",
                remedy="Train with the same repair; otherwise these numbers do not describe your training.",
            )
        else:
            yield Notice(
                code="ranks-fsdp2-4bit",
                message=f"{variant.name}: 4-bit weights of bitsandbytes under FSDP2 can be silently wrong from the "
                "second step on; every trial checks it over three, and one that is wrong is invalid.",
                remedy='Write repair = "quant_state" in [workload] where it is, or use strategy = "ddp".',
            )


def _check_cards(where: str, workload: Workload) -> None:
    """The ranks take the first of the GPUs that are visible, one each (`lorameter.trial.ranks.trial`)."""
    known, listed = visible_cards().value, visible_devices(os.environ)
    ranks = workload.ranks
    if known is None and listed is None:
        return
    cards = len(listed or ()) if known is None else len(known)
    if cards < ranks:
        raise UsageError(
            f"{where}: ranks = {ranks}: {cards} GPU{'s are' if cards != 1 else ' is'} to be had here, and ranks that "
            "share one measure each other. Use fewer ranks, or make more GPUs visible."
        )
    for shared in shared_boards((known or ())[:ranks]):
        raise UsageError(
            f"{where}: ranks = {ranks}: {say_entries(shared)} are parts of one GPU, and ranks that share one measure "
            f"each other. Use fewer ranks, or let {VARIABLE} begin with parts of different GPUs."
        )


def check_adapters(where: str, variant: Variant, workload: Workload) -> None:
    """Refuse adapters that PEFT cannot have beside each other, or answer for in one batch (PEFT 0.21: any quantisation
    of bitsandbytes is taken). Raises `UsageError`, naming key, value and remedy."""
    if workload.adapters == 1:
        return
    if not isinstance(variant, LoraVariant):
        raise UsageError(
            f"{where}: adapters = {workload.adapters}: several adapters are measured of LoRA in its short form, and "
            f"the method is {variant.method_name}. Leave adapters out."
        )
    refused = (
        (
            variant.use_dora and workload.request_batch > 1,
            "use_dora = True",
            "PEFT does not mix adapters of DoRA in one batch",
            "Use request_batch = 1, which measures switching alone, or leave use_dora out.",
        ),
        (
            variant.merge_adapter,
            "merge_adapter = True",
            "one that is merged can neither be switched off nor stand beside others",
            "Leave merge_adapter out; requests with the adapter merged are measured beside the others by `merged`.",
        ),
        (
            variant.bias != "none",
            f"bias = {variant.bias!r}",
            "PEFT has one adapter on a base whose biases train",
            'Use bias = "none".',
        ),
        (
            variant.rewrites_base,
            f"init_lora_weights = {variant.init_lora_weights!r}",
            "it rewrites the base for one adapter, and the others would stand on it",
            'Use "default", "gaussian" or "orthogonal".',
        ),
    )
    for applies, what, why, remedy in refused:
        if applies:
            raise UsageError(f"{where}: {what}: with adapters = {workload.adapters}, {why}. {remedy}")
