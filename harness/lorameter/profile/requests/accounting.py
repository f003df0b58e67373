"""What a profile of requests comes to: a request in lines that add up, and how near its passes came to the peak.

A pass over the prompt multiplies each weight with many rows and is bound by products; a pass over one token reads each
weight for one row, or one for each prompt of a request, and is bound by memory. Both have both figures here, so that
it shows which of them binds. What is multiplied and read is counted from the modules of the model, so that no family is
unknown; only the products of attention need its dimensions, and are left out where its files do not give them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.models.costs.ceiling import Utilisation, utilisation
from lorameter.models.costs.flops import mean_context
from lorameter.profile.accounting import Names, StepAccount, TimeSpan, counted_samples, span_of, step_account
from lorameter.profile.requests.facts import MERGED, SERVED, RequestProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAccount:
    """One forward pass: over the prompts, or over one token of each after them."""

    time: TimeSpan
    """Of the pass; over one token the mean of a request's passes."""
    calls: float | None
    """Kernels launched, or operators called, in it; None where it is not known what ran."""
    flops: int
    bytes: int
    """That must come from memory for it."""
    mfu: Utilisation | None
    """None where the peak is not known."""
    mbu: Utilisation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccount:
    """A request's time by its phases, and its two kinds of passes."""

    whole: StepAccount
    first_token: TimeSpan
    token: TimeSpan
    """Per token after the first."""
    passes: int
    """Over one token each, in a request."""
    prefill: PassAccount
    decode: PassAccount


def request_accounts(profile: RequestProfile) -> tuple[RequestAccount, RequestAccount | None]:
    """The account of a profile's requests as the variant serves them, and with the adapter merged; None where it serves
    them so."""
    merged = profile.merged
    return _account(profile, SERVED), None if merged is None else _account(merged, MERGED)


def _account(profile: RequestProfile, names: Names) -> RequestAccount:
    merged = names is MERGED or profile.variant.merge_adapter
    whole = step_account(profile, names)
    passes = profile.workload.new_tokens - 1
    decode, ran = whole.phases["decode"], {phase.phase: phase for phase in profile.activity.phases}

    def calls(phase: str, count: int) -> float | None:
        return None if profile.activity.missing else ran[phase].calls / count

    return RequestAccount(
        whole=whole,
        first_token=span_of(counted_samples(profile, "first_token_time_s", names)),
        token=span_of(counted_samples(profile, "time_per_output_token_s", names)),
        passes=passes,
        prefill=_pass_account(
            profile, whole.phases["prefill"], calls("prefill", 1), rows=profile.facts.prompt_rows,
            logit_rows=profile.facts.logit_rows, context=0, merged=merged,
        ),
        decode=_pass_account(
            profile, _divided(decode, passes), calls("decode", passes), rows=1, logit_rows=1,
            context=mean_context(profile.workload), merged=merged,
        ),
    )  # fmt: skip


def _divided(span: TimeSpan, by: int) -> TimeSpan:
    low, high = (None if end is None else end / by for end in (span.low, span.high))
    return TimeSpan(value=span.value / by, low=low, high=high)


def _pass_account(
    profile: RequestProfile,
    time: TimeSpan,
    calls: float | None,
    *,
    rows: int,
    logit_rows: int,
    context: int,
    merged: bool,
) -> PassAccount:
    """`rows` and `logit_rows` are of each prompt; `context` is what the one row of a later pass attends to, 0 for the
    pass over the prompts themselves."""
    size, shape, facts = profile.facts.size, profile.shape, profile.facts
    beside, prompts = not merged, profile.workload.request_batch
    pairs = prompts * (context or rows * (rows + 1) // 2)
    rows, logit_rows = prompts * rows, prompts * logit_rows
    attention = 0 if shape is None else 4 * shape.layers * shape.heads * shape.head_dim * pairs
    weights = size.linear_elements + (size.adapter_elements if beside else 0)
    flops = 2 * rows * weights + 2 * logit_rows * size.head_elements + attention
    whole = profile.workload.prompt_tokens + profile.workload.new_tokens - 1
    cache = facts.cache_bytes * min(context, whole) // whole
    read = size.linear_bytes + size.head_bytes + size.norm_bytes + (size.adapter_bytes if beside else 0) + cache
    product, memory = profile.peaks.get("product"), profile.peaks.get("memory")
    without_attention = "" if shape is not None else ", without attention"
    said = f"{rows} rows through the weights, {logit_rows} of logits, {pairs} pairs a head{without_attention}"
    return PassAccount(
        time=time,
        calls=calls,
        flops=flops,
        bytes=read,
        mfu=None if product is None else utilisation("MFU", flops, time, product, said),
        mbu=None if memory is None else utilisation("MBU", read, time, memory, "weights as stored, keys and values"),
    )
