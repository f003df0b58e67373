"""Rules that derive findings from the evidence of requests.

The cost of a finding is a part of the time to first token or of the time per token. It is the best available forecast
of the gain of the remedy: the gain measured in the same process if possible (merging), else the observed time of the
cause less the time of its replacement, if that can be estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorameter.profile.evidence import RequestEvidence, changes_without
from lorameter.profile.rules import BETWEEN, MIN_IDLE, WORTH, Finding, advise_adapter_dtype, describe_idle
from lorameter.records.units import format_bytes, format_value

FIRST, LATER, WHOLE = "first_token_time_s", "time_per_output_token_s", "request_time_s"
MOVED = 0.5
"""Share of the tokens at which the cache was reallocated; a cache that grows by concatenation moves at every token."""


def diagnose_requests(evidence: RequestEvidence) -> tuple[Finding, ...]:
    """All findings, the most expensive for a request first."""
    found = [finding for rule in REQUEST_RULES.values() for finding in rule(evidence)]
    times = {FIRST: 1, LATER: evidence.passes, WHOLE: 1}
    return tuple(sorted(found, key=lambda finding: -(finding.cost_s or 0.0) * times[finding.metric]))


def _weight_copied(evidence: RequestEvidence) -> Iterator[Finding]:
    """Findings by the shape of the copied weight: usually the output head, in its product before the first token."""
    for metric, one, name in ((FIRST, evidence.prefill, "prefill"), (LATER, evidence.decode, "decode")):
        cost = sum(copy.time_s for copy in one.copies)
        if not one.copies or cost <= WORTH * _whole(evidence, metric):
            continue
        costliest = one.copies[0]
        shape = " × ".join(map(str, costliest.shape))
        copies = (
            f"{name} copies the whole of {costliest.weight or 'a weight'} ({costliest.operator} of {shape}, "
            f"{costliest.calls:.3g} times a pass)"
        )
        if not costliest.in_product:
            yield _make_finding(
                "weight-copied", evidence, metric, cost,
                f"{copies}, outside of any product: it is cast, or made anew, for each pass",
                "Make that copy once, where the model is loaded: cast the weight there, or merge what changes it.",
                obstacle="no field changes who copies that weight",
            )  # fmt: skip
            continue
        is_head = costliest.weight == evidence.facts.head != ""
        if is_head and evidence.bytes_per_s:  # the product disappears too; its replacement reads the weight once
            cost += max(0.0, one.head_s - cost - evidence.facts.size.head_bytes / evidence.bytes_per_s)
        foldable = (
            "a copy laid out anew, hidden.clone(memory_format=torch.contiguous_format), which torch's linear folds; a "
            "clone that keeps the strides does not help, nor does contiguous() of a single row, and leaving "
            "requires_grad on for the weight does."
        )
        yield _make_finding(
            "weight-copied", evidence, metric, cost,
            f"{copies}: torch's linear does not fold its input and calls a batched product, which needs the "
            "weight laid out anew",
            f"copy_head_input = true hands the head {foldable}" if is_head else f"That layer must be handed {foldable}",
            changes={"copy_head_input": True} if is_head and not evidence.variant.copy_head_input else {},
            obstacle="" if is_head and not evidence.variant.copy_head_input else "no field changes that layer's input",
        )  # fmt: skip


def _adapter_unmerged(evidence: RequestEvidence) -> Iterator[Finding]:
    merged, request = evidence.merged, evidence.request
    if merged is None or request.low is None or merged.high is None or request.low <= merged.high:
        return
    cost = request.value - merged.value
    if cost <= WORTH * request.value:
        return
    calls = ""
    if evidence.merged_calls is not None and evidence.decode.calls:
        unit = "launches" if evidence.device == "cuda" else "operators"
        saved = evidence.decode.calls - evidence.merged_calls
        calls = f", {saved:.0f} of the {evidence.decode.calls:.0f} {unit} of a token"
    rounding = " Merging rounds the weights anew, to 4 bits where they are stored so: compare the answers."
    yield _make_finding(
        "adapter-unmerged", evidence, WHOLE, cost,
        f"the unmerged adapter takes {cost / request.value:.1%} of a request, as measured in the same process "
        f"with it merged{calls}",
        f"merge_adapter = true merges it before requests.{rounding if evidence.variant.quantization != 'none' else ''}",
        changes={"merge_adapter": True},
    )  # fmt: skip


def _dequantisation(evidence: RequestEvidence) -> Iterator[Finding]:
    unpacking = evidence.decode.dequantise_s
    if unpacking <= WORTH * evidence.token.value:
        return
    extra = evidence.unquantised_bytes
    more = 0.0 if extra is None or not evidence.bytes_per_s else extra / evidence.bytes_per_s
    fits = extra is not None and more < unpacking
    yield _make_finding(
        "dequantisation", evidence, LATER, unpacking - more if fits else unpacking,
        f"unpacking {evidence.variant.quantization} weights takes {format_value(unpacking, 's')} of each later token",
        f'quantization = "none" reads about {format_bytes(extra or 0)} more a token, in {format_value(more, "s")}.'
        if fits
        else "A kernel that multiplies packed weights as they are would not unpack them.",
        changes=changes_without(evidence.variant, "quantization") if fits else {},
        obstacle="" if fits else "there is no memory for the weights unpacked, or reading them would take longer",
    )  # fmt: skip


def _launch_bound(evidence: RequestEvidence) -> Iterator[Finding]:
    idle, decode = evidence.decode.idle_s, evidence.decode
    if idle <= (MIN_IDLE if evidence.device == "cuda" else BETWEEN) * decode.time_s:
        return
    yield _make_finding(
        "launch-bound", evidence, LATER, idle,
        describe_idle(
            evidence.device, idle / decode.time_s, "a pass over one token", decode.calls, decode.time_s - idle
        ),
        "Several prompts in a request share the launches (request_batch of [workload]), and a captured graph makes one "
        "of them.",
        obstacle="how many prompts a request has is the workload's, and no graph is captured",
    )  # fmt: skip


def _cache_reallocated(evidence: RequestEvidence) -> Iterator[Finding]:
    if evidence.facts.cache_moved <= MOVED or evidence.decode.cache_s <= WORTH * evidence.token.value:
        return
    yield _make_finding(
        "cache-reallocated", evidence, LATER, evidence.decode.cache_s,
        f"the cache ({evidence.facts.cache}) is made anew at {evidence.facts.cache_moved:.0%} of the tokens, "
        f"{format_bytes(evidence.facts.cache_bytes)} at the end",
        'kv_cache = "static" makes it once, of the whole length; attention then reads all of that.',
        changes={"kv_cache": "static"},
    )  # fmt: skip


def _mixed_types(evidence: RequestEvidence) -> Iterator[Finding]:
    variant, cost = evidence.variant, evidence.prefill.casts_s + evidence.passes * evidence.decode.casts_s
    narrow = variant.compute_dtype if variant.is_4bit else variant.dtype
    wide = evidence.adapter_dtype == "float32" and not variant.merge_adapter
    if narrow == "float32" or not (wide or variant.prepare_for_kbit) or cost <= WORTH * evidence.request.value:
        return
    what = "adapters" if wide else "norms, embeddings and head"
    yield _make_finding(
        "mixed-types", evidence, WHOLE, cost,
        f"{what} in float32 next to weights in {narrow}: casts take {cost / evidence.request.value:.1%} of a request",
        advise_adapter_dtype(narrow)
        if wide
        else "prepare_for_kbit = false leaves them in the type of the base; look at the loss.",
        changes={"adapter_dtype": narrow} if wide else {"prepare_for_kbit": False},
    )  # fmt: skip


REQUEST_RULES: Mapping[str, Callable[[RequestEvidence], Iterator[Finding]]] = {
    "weight-copied": _weight_copied,
    "adapter-unmerged": _adapter_unmerged,
    "dequantisation": _dequantisation,
    "launch-bound": _launch_bound,
    "cache-reallocated": _cache_reallocated,
    "mixed-types": _mixed_types,
}
"""The rules by the code of their findings."""
OF_WHAT_RAN = frozenset(
    ("weight-copied", "dequantisation", "launch-bound", "cache-reallocated", "mixed-types")
)
"""Rules that judge the recorded operators; they find nothing if no operators are known."""


def _whole(evidence: RequestEvidence, metric: str) -> float:
    return {FIRST: evidence.first_token, LATER: evidence.token, WHOLE: evidence.request}[metric].value


def _make_finding(
    code: str,
    evidence: RequestEvidence,
    metric: str,
    cost_s: float,
    message: str,
    remedy: str,
    *,
    changes: Mapping[str, Any] | None = None,
    obstacle: str = "",
) -> Finding:
    return Finding(
        code=code,
        message=message,
        cost_s=cost_s,
        cost_share=cost_s / _whole(evidence, metric),
        metric=metric,
        remedy=remedy,
        changes=changes or {},
        obstacle=obstacle,
    )
