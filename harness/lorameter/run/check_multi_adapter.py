"""What several adapters on one base need of a variant, before anything is started."""

from __future__ import annotations

from lorameter.errors import UsageError
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


def check_adapters(where: str, variant: Variant, workload: Workload) -> None:
    """Refuse adapters that PEFT cannot have beside each other, or answer for in one batch (PEFT 0.21: any quantisation
    of bitsandbytes is taken). Raises `UsageError`, naming key, value and remedy."""
    if workload.adapters == 1:
        return
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
