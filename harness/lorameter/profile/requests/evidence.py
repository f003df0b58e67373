"""The evidence that the rules of `lorameter.profile.requests.rules` judge, and how it is read off a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from lorameter.errors import UsageError
from lorameter.profile.accounting import IDLE, TimeSpan, categories_s, plain_s, span_of
from lorameter.profile.evidence import (
    DROPPED,
    SPARE_SHARE,
    dropout_s,
    observed_word,
    recorded,
    saved_bytes,
    unpacking_s,
)
from lorameter.profile.requests.accounting import RequestAccount
from lorameter.profile.requests.facts import RequestProfile
from lorameter.records.activity import CACHE, HEAD, PhaseActivity, RequestFacts, WeightCopy
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEvidence:
    """One kind of forward pass, in seconds of a plain one."""

    time_s: float
    calls: float = 0.0
    idle_s: float = 0.0
    """The device waits, or the interpreter is between operators."""
    dequantise_s: float = 0.0
    casts_s: float = 0.0
    """Copies from one type to another."""
    dropout_s: float = 0.0
    cache_s: float = 0.0
    """Adding to the cache."""
    head_s: float = 0.0
    copies: tuple[WeightCopy, ...] = ()
    """Whole weights that are copied in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvidence:
    """What the rules judge; None where something was not seen or has no meaning."""

    variant: Variant
    workload: Workload
    device: Literal["cpu", "cuda"]
    request: TimeSpan
    first_token: TimeSpan
    token: TimeSpan
    passes: int
    """Over one token each."""
    prefill: PassEvidence
    decode: PassEvidence
    choose_s: float
    """Between two passes: choosing a token, handing it over, preparing the next."""
    facts: RequestFacts
    merged: TimeSpan | None = None
    """A request with the adapter merged."""
    merged_calls: float | None = None
    """Of a pass over one token then."""
    new_length: TimeSpan | None = None
    """By how much the first token comes later at a length of the prompt that nobody has asked at."""
    adapter_dtype: str | None = None
    bytes_per_s: float | None = None
    """The memory's at best."""
    decode_bytes: int = 0
    """That a pass over one token reads."""
    unquantised_bytes: int | None = None
    """What the base would take more without quantisation, where the memory has it; else None."""


def evidence_of_requests(
    profile: RequestProfile, account: RequestAccount, merged: RequestAccount | None
) -> RequestEvidence:
    """What the rules read off a profile and its accounts."""
    samples, memory = profile.record.samples, profile.peaks.get("memory")
    late = [
        new - again
        for new, again in zip(
            samples.get("new_length_first_token_s", ()), samples.get("known_length_first_token_s", ()), strict=True
        )
    ]
    return RequestEvidence(
        variant=profile.variant,
        workload=profile.workload,
        device=profile.device,
        request=account.whole.step,
        first_token=account.first_token,
        token=account.token,
        passes=account.passes,
        prefill=_pass_evidence(profile, account, "prefill", 1),
        decode=_pass_evidence(profile, account, "decode", account.passes),
        choose_s=account.whole.phases["choose"].value / (account.passes + 1),
        facts=profile.facts,
        merged=None if merged is None else merged.whole.step,
        merged_calls=None if merged is None else merged.decode.calls,
        new_length=_span_of(late),
        adapter_dtype=observed_word(profile, "lora.dtype"),
        bytes_per_s=None if memory is None else memory.per_s,
        decode_bytes=account.decode.bytes,
        unquantised_bytes=_unquantised_bytes(profile),
    )


def _span_of(late: Sequence[float]) -> TimeSpan | None:
    """A median with its interval; None of nothing: a prompt of one token has no shorter one."""
    return span_of(late) if late else None


def _pass_evidence(profile: RequestProfile, account: RequestAccount, phase: str, count: int) -> PassEvidence:
    """A phase of `count` passes, by one of them."""
    whole = account.whole
    ran = next((one for one in profile.activity.phases if one.phase == phase), None)
    if ran is None or profile.activity.missing:  # what ran is not known
        return PassEvidence(time_s=whole.phases[phase].value / count)

    def plain(seconds: Callable[[PhaseActivity], float], *names: str) -> float:
        records = recorded(*names)(ran) if names else None
        return plain_s(profile, whole, ran, seconds(ran), records=records) / count

    copies = tuple(
        msgspec.structs.replace(one, calls=one.calls / count, time_s=plain_s(profile, whole, ran, one.time_s) / count)
        for one in ran.copies
    )
    return PassEvidence(
        time_s=whole.phases[phase].value / count,
        calls=ran.calls / count,
        idle_s=categories_s(profile, whole)[IDLE][phase] / count,
        dequantise_s=plain(unpacking_s),
        casts_s=plain(lambda one: one.casts_s, "casts_s"),
        dropout_s=plain(dropout_s, *DROPPED),
        cache_s=plain(lambda one: one.parts_s.get(CACHE, 0.0)),
        head_s=plain(lambda one: one.parts_s.get(HEAD, 0.0)),
        copies=copies,
    )


def _unquantised_bytes(profile: RequestProfile) -> int | None:
    """What the base would take more in 16 or 32 bits, where the memory is expected to have it."""
    if profile.variant.quantization == "none" or profile.shape is None:
        return None
    try:
        extra = saved_bytes(profile, profile.shape, "quantization")
    except UsageError:  # a model type whose layers are not known: then nothing is said to fit
        return None
    return extra if profile.memory.peak_bytes + extra <= SPARE_SHARE * profile.memory_bytes else None
