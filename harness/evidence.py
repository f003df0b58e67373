"""From a profile to the evidence that the rules of `harness.diagnosis` judge."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from harness import catalogue, shapes
from harness.accounting import IDLE, Ceilings, StepAccount, TokenShares, categories_s, observed, time_of
from harness.diagnosis import Evidence
from harness.errors import UsageError
from harness.flops import computed_tokens, training_flops
from harness.forecast import memory_bytes
from harness.meters.validity import waiting_share
from harness.profile import PhaseActivity, Profile

DROPOUT_KERNELS = ("dropout", "bernoulli")
"""In the names of kernels that draw a mask; the fused one applies it as well."""
DROPOUT_OPERATOR = "aten::dropout"
"""On a CPU: it draws the mask and multiplies with it. The backward pass multiplies by a `mul` like any other."""
_LEFT_OUT: Mapping[str, dict[str, Any]] = {
    "quantization": {"quantization": "none", "prepare_for_kbit": False},
    "gradient_checkpointing": {"gradient_checkpointing": False},
}


def evidence_of(profile: Profile, step: StepAccount, tokens: TokenShares, found: Ceilings | str) -> Evidence:
    """What the rules read off a profile and its accounts."""
    memory, step_s = profile.record.memory, step.step.value
    shares = {category: sum(each.values()) / step_s for category, each in categories_s(profile, step).items()}
    allocated = memory.get("device_peak_allocated_train_bytes")
    pairs = computed_tokens(profile.variant, profile.workload).pairs
    return Evidence(
        variant=profile.variant,
        workload=profile.workload,
        device=profile.device,
        step_s=step_s,
        phases_s={phase: span.value for phase, span in step.phases.items()},
        idle=shares.pop(IDLE, 0.0),
        categories=shares,
        calls=profile.activity.calls,
        dropout=time_of(profile, step, _dropout_s) / step_s,
        padded=tokens.padded / (tokens.real + tokens.padded),
        recomputed=_recomputed(profile, found),
        masked_pairs=max(0.0, 1 - profile.record.values["useful_pairs"] / pairs),
        attention_backend=_word(observed(profile, "attention.backend")),
        attention_mask=_word(observed(profile, "attention.mask")),
        adapter_dtype=_word(observed(profile, "lora.dtype")),
        flash_attn=importlib.util.find_spec("flash_attn") is not None,
        wide_registers=profile.device == "cuda" or profile.wide_registers,
        occupancy=step.occupancy,
        stalled=waiting_share(profile.record.values, "train"),
        threads=profile.threads,
        cpus=profile.cpus,
        peak_bytes=allocated or memory["host_peak_train_bytes"],
        memory_bytes=profile.memory_bytes,
        extra_bytes=_extra_bytes(profile),
        reserved_bytes=memory.get("device_peak_reserved_train_bytes"),
        alloc_retries=memory.get("device_alloc_retries_train", 0),
    )


def _recomputed(profile: Profile, found: Ceilings | str) -> float:
    """Share of a step's FLOPs that go with its checkpointing; none where the check saw nothing being computed again.

    Not all that is computed twice: a fused backward repeats the scores with checkpointing and without.
    """
    if isinstance(found, str) or observed(profile, "checkpointing") is not True:
        return 0.0
    without = dataclasses.replace(profile.variant, gradient_checkpointing=False)
    shape = shapes.shape(catalogue.resolve(profile.workload.model))
    least = training_flops(shape, without, computed_tokens(without, profile.workload)).hardware
    return max(0.0, 1 - least / found.flops.hardware)


def _dropout_s(phase: PhaseActivity) -> float:
    drawn = (one.time_s for one in phase.operators if any(word in one.name for word in DROPOUT_KERNELS))
    return phase.totals_s.get(DROPOUT_OPERATOR, 0.0) if phase.totals_s else sum(drawn)


def _word(seen: object) -> str | None:
    return seen if isinstance(seen, str) else None


def _extra_bytes(profile: Profile) -> dict[str, int]:
    """What leaving a saving out would add, as estimated; a paged optimizer's state by count."""
    memory = profile.record.memory
    moments = 8 * round(profile.record.values["trainable_parameters"])
    resident = memory["optimizer_state_bytes"] - memory["paged_optimizer_state_bytes"]
    extra = {"optimizer": max(0, moments - resident)}
    try:
        shape = shapes.shape(catalogue.resolve(profile.workload.model))
        present = memory_bytes(profile.variant, profile.workload, shape, profile.device)
        for key, changes in _LEFT_OUT.items():
            without = dataclasses.replace(profile.variant, **changes)
            extra[key] = max(0, memory_bytes(without, profile.workload, shape, profile.device) - present)
    except UsageError:  # a model type whose layers are not known: then nothing is said to fit
        pass
    return extra
