"""Extracts from a profile the evidence that `lorameter.profile.rules` judges."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import msgspec

from lorameter.errors import UsageError
from lorameter.models.costs.flops import computed_tokens, from_values
from lorameter.models.costs.memory import estimate_memory
from lorameter.models.shapes import ModelShape
from lorameter.profile.accounting import (
    IDLE,
    RequestAccount,
    StepAccount,
    TokenShares,
    categories_s,
    find_observed,
    plain_s,
    step_flops,
    unprofiled_time,
)
from lorameter.profile.facts import Profile, RequestProfile, TrialProfile, find_shape
from lorameter.records.activity import (
    CACHE,
    DROPOUT,
    DROPOUT_OPERATOR,
    HEAD,
    PhaseActivity,
    RequestFacts,
    WeightCopy,
)
from lorameter.stats import Estimate
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

SPARE_SHARE = 0.9
"""Share of the memory that a remedy may use: its bytes are estimates, accurate to a tenth at best."""
DROPOUT_KERNELS = ("dropout", "bernoulli")
"""Parts of the names of kernels that draw a mask; the fused kernel also applies it."""
UNPACKING = ("MatMul4Bit", "MatMul4BitBackward", "bitsandbytes::gemm_4bit")
"""bitsandbytes' functions that unpack a weight, by operators of that category, and then multiply by it."""
_WITHOUT: Mapping[str, dict[str, Any]] = {
    "quantization": {"quantization": "none", "prepare_for_kbit": False},
    "gradient_checkpointing": {"gradient_checkpointing": False},
}
"""Fields of a variant without a memory saving."""


def changes_without(variant: Variant, saving: str) -> dict[str, Any]:
    """The changes that turn a memory saving off; empty if it is already off."""
    return {name: value for name, value in _WITHOUT[saving].items() if getattr(variant, name) != value}


def estimate_extra_bytes(profile: TrialProfile, shape: ModelShape | None) -> dict[str, int]:
    """Estimated bytes that turning off each memory saving would add; empty for a model with unknown layers, so that
    nothing is expected to fit."""
    if shape is None:
        return {}
    variant, workload, device = profile.variant, profile.workload, profile.device
    without = {saving: dataclasses.replace(variant, **changes_without(variant, saving)) for saving in _WITHOUT}
    with contextlib.suppress(UsageError):
        present = estimate_memory(variant, workload, shape, device=device).total_bytes
        return {
            saving: max(0, estimate_memory(one, workload, shape, device=device).total_bytes - present)
            for saving, one in without.items()
        }
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEvidence:
    """The evidence that the rules judge. Shares are of a step; a value is None if it was not observed or has no
    meaning.

    Attributes:
        variant: the profiled variant.
        workload: the profiled workload.
        device: device of the trial.
        step_s: time of a plain step.
        phases_s: seconds of its phases.
        categories: shares of the operators, by kernels_check's categories; the rest of the step is `idle`.
        idle: on a GPU the device waits, on a CPU the interpreter is between operators.
        calls: kernels launched, or operators called, in a step.
        casts: share of copies from one dtype to another, and of sums of two dtypes.
        wide_products: share of 32-bit matrix products.
        logits_bytes: logits, their gradients and the loss's copies of them, at the memory peak.
        liger: whether the package liger-kernel is installed.
        unpacking: share of operators that unpack weights to 16 bits.
        dropout: share of operators that draw masks and, if they can be distinguished from other products, apply them.
        padded: share of padded positions.
        recomputed: share of all FLOPs that are due to checkpointing.
        masked_pairs: share of the attention pairs that the mask hides.
        attention_backend: the observed backend.
        attention_mask: "explicit" if attention received a mask tensor.
        adapter_dtype: the observed dtype.
        flash_attn: whether the package flash-attn is installed.
        wide_registers: whether this CPU multiplies 16-bit numbers faster than 32-bit ones; a GPU does.
        peak_bytes: peak memory of training on the device.
        memory_bytes: free memory of the device before the trial.
        extra_bytes: bytes that turning off a saving would add, if known: "quantization", "gradient_checkpointing",
            "optimizer".
        reserved_bytes: memory reserved by CUDA's allocator at its peak, of which `peak_bytes` were in use.
        alloc_retries: how often the allocator released its cache.
    """

    variant: Variant
    workload: Workload
    device: Literal["cpu", "cuda"]
    step_s: float
    phases_s: Mapping[str, float]
    categories: Mapping[str, float] = field(default_factory=dict)
    idle: float = 0.0
    calls: float = 0.0
    casts: float = 0.0
    wide_products: float = 0.0
    logits_bytes: int = 0
    liger: bool = False
    unpacking: float = 0.0
    dropout: float = 0.0
    padded: float = 0.0
    recomputed: float = 0.0
    masked_pairs: float = 0.0
    attention_backend: str | None = None
    attention_mask: str | None = None
    adapter_dtype: str | None = None
    flash_attn: bool = False
    wide_registers: bool = True
    peak_bytes: int = 0
    memory_bytes: int = 0
    extra_bytes: Mapping[str, int] = field(default_factory=dict)
    reserved_bytes: int | None = None
    alloc_retries: int = 0

    def fits(self, key: str) -> bool:
        """Whether the bytes that turning off this saving would add fit into memory; False if unknown."""
        return key in self.extra_bytes and self.peak_bytes + self.extra_bytes[key] <= SPARE_SHARE * self.memory_bytes


def gather_evidence(profile: Profile, step: StepAccount, tokens: TokenShares) -> ProfileEvidence:
    """The evidence in a profile and its accounts."""
    memory, step_s = profile.record.memory, step.step.value
    shares = {category: sum(each.values()) / step_s for category, each in categories_s(profile, step).items()}
    allocated = memory.get("device_peak_allocated_train_bytes")
    pairs = computed_tokens(profile.variant, profile.workload).pairs
    resident = memory["optimizer_state_bytes"] - memory["paged_optimizer_state_bytes"]
    unpaged = max(0, 8 * round(profile.record.values["trainable_parameters"]) - resident)  # unpaged state of 32 bits
    return ProfileEvidence(
        variant=profile.variant,
        workload=profile.workload,
        device=profile.device,
        step_s=step_s,
        phases_s={phase: span.value for phase, span in step.phases.items()},
        idle=shares.pop(IDLE, 0.0),
        categories=shares,
        calls=profile.activity.calls,
        casts=unprofiled_time(profile, step, lambda phase: phase.casts_s, "casts_s") / step_s,
        wide_products=unprofiled_time(profile, step, lambda phase: phase.wide_products_s, "wide_products_s") / step_s,
        logits_bytes=profile.memory.kinds.get("logits", 0),
        liger=importlib.util.find_spec("liger_kernel") is not None,
        unpacking=unprofiled_time(profile, step, unpacking_s) / step_s,
        dropout=unprofiled_time(profile, step, dropout_s, DROPOUT, "dropout_backward_s") / step_s,
        padded=tokens.padded / (tokens.real + tokens.padded),
        recomputed=_recomputed_share(profile),
        masked_pairs=max(0.0, 1 - profile.record.values["useful_pairs"] / pairs),
        attention_backend=find_observed(profile, "attention.backend"),
        attention_mask=find_observed(profile, "attention.mask"),
        adapter_dtype=find_observed(profile, "peft.dtype"),
        flash_attn=importlib.util.find_spec("flash_attn") is not None,
        wide_registers=profile.device == "cuda" or profile.wide_registers,
        peak_bytes=allocated or memory["host_peak_train_bytes"],
        memory_bytes=profile.memory_bytes,
        extra_bytes={"optimizer": unpaged, **estimate_extra_bytes(profile, find_shape(profile.workload.model))},
        reserved_bytes=memory.get("device_peak_reserved_train_bytes"),
        alloc_retries=memory.get("device_alloc_retries_train", 0),
    )


def _recomputed_share(profile: Profile) -> float:
    """Share of a step's FLOPs that are due to checkpointing; 0 if the check observed no recomputation.

    This excludes the scores, which a fused backward pass recomputes also without checkpointing.
    """
    products = from_values(profile.record.values)
    if products is None or find_observed(profile, "checkpointing") is not True:
        return 0.0
    without = dataclasses.replace(profile.variant, gradient_checkpointing=False)
    tokens = computed_tokens(profile.variant, profile.workload)
    repeating, plain = (step_flops(products, variant, tokens).hardware for variant in (profile.variant, without))
    return max(0.0, 1 - plain / repeating)


def unpacking_s(phase: PhaseActivity) -> float:
    """Seconds of a phase spent on unpacking weights; on a CPU including the calling functions.

    If nothing is unpacked, those functions multiply by packed weights directly.
    """
    unpacked = phase.categories_s.get("dequantize", 0.0)
    return unpacked and unpacked + sum(operator.time_s for operator in phase.operators if operator.name in UNPACKING)


def dropout_s(phase: PhaseActivity) -> float:
    """Seconds of a phase spent on drawing masks and, if that can be distinguished from other products, on applying
    them."""
    drawn = (kernel.time_s for kernel in phase.operators if any(word in kernel.name for word in DROPOUT_KERNELS))
    forward = phase.totals_s.get(DROPOUT_OPERATOR, 0.0) if phase.totals_s else sum(drawn)
    return forward + phase.dropout_backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEvidence:
    """One kind of forward pass, in seconds of an unprofiled one.

    `idle_s`: the device waits, or the interpreter is between operators. `casts_s`: copies from one type to another.
    `cache_s`: adding to the cache. `copies`: copies of whole weights in it.
    """

    time_s: float
    calls: float = 0.0
    idle_s: float = 0.0
    dequantise_s: float = 0.0
    casts_s: float = 0.0
    cache_s: float = 0.0
    head_s: float = 0.0
    copies: tuple[WeightCopy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvidence:
    """The evidence that the rules for requests judge; a value is None if it was not observed or has no meaning.

    Attributes:
        variant: the profiled variant.
        device: device of the trial.
        request: time of a request.
        first_token: time to first token.
        token: time of each later one.
        passes: number of single-token passes.
        prefill: the pass over the prompts.
        decode: a pass over one token.
        facts: observations of one request.
        merged: time of a request with the adapter merged.
        merged_calls: calls in a single-token pass with the adapter merged.
        adapter_dtype: the observed dtype.
        bytes_per_s: peak memory bandwidth, unless a pass is faster.
        unquantised_bytes: additional bytes of the base without quantisation, if they fit into memory; else None.
    """

    variant: Variant
    device: Literal["cpu", "cuda"]
    request: Estimate
    first_token: Estimate
    token: Estimate
    passes: int
    prefill: PassEvidence
    decode: PassEvidence
    facts: RequestFacts
    merged: Estimate | None = None
    merged_calls: float | None = None
    adapter_dtype: str | None = None
    bytes_per_s: float | None = None
    unquantised_bytes: int | None = None


def gather_request_evidence(
    profile: RequestProfile, account: RequestAccount, merged: RequestAccount | None
) -> RequestEvidence:
    """The evidence in a profile and its accounts."""
    memory = account.decode.mbu if account.prefill.mbu else None
    return RequestEvidence(
        variant=profile.variant,
        device=profile.device,
        request=account.whole.step,
        first_token=account.first_token,
        token=account.token,
        passes=account.passes,
        prefill=_pass_evidence(profile, account, "prefill", 1),
        decode=_pass_evidence(profile, account, "decode", account.passes),
        facts=profile.facts,
        merged=None if merged is None else merged.whole.step,
        merged_calls=None if merged is None else merged.decode.calls,
        adapter_dtype=find_observed(profile, "peft.dtype"),
        bytes_per_s=None if memory is None else memory.peak.per_s,
        unquantised_bytes=_unquantised_bytes(profile),
    )


def _pass_evidence(profile: RequestProfile, account: RequestAccount, phase: str, count: int) -> PassEvidence:
    """A phase with `count` passes, as one mean pass."""
    whole = account.whole
    activity = next((one for one in profile.activity.phases if one.phase == phase), None)
    if activity is None or profile.activity.missing:  # the operators are unknown
        return PassEvidence(time_s=whole.phases[phase].value / count)

    time_s = partial(unprofiled_time, profile, whole, only=phase)
    copies = tuple(
        msgspec.structs.replace(
            one, calls=one.calls / count, time_s=plain_s(profile, whole, activity, one.time_s) / count
        )
        for one in activity.copies
    )
    return PassEvidence(
        time_s=whole.phases[phase].value / count,
        calls=activity.calls / count,
        idle_s=categories_s(profile, whole)[IDLE][phase] / count,
        dequantise_s=time_s(unpacking_s) / count,
        casts_s=time_s(lambda part: part.casts_s, "casts_s") / count,
        cache_s=time_s(lambda part: part.parts_s.get(CACHE, 0.0)) / count,
        head_s=time_s(lambda part: part.parts_s.get(HEAD, 0.0)) / count,
        copies=copies,
    )


def _unquantised_bytes(profile: RequestProfile) -> int | None:
    """The additional bytes of the base in 16 or 32 bits, if they are expected to fit."""
    extra = estimate_extra_bytes(profile, profile.shape).get("quantization")
    fits = extra is not None and profile.memory.peak_bytes + extra <= SPARE_SHARE * profile.memory_bytes
    return extra if fits and profile.variant.quantization != "none" else None
