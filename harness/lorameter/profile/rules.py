"""Rules that derive findings from the evidence of a step or of requests, each with its number and its cost.

A rule gives the observation, its cost as a part of a step, of the time to first token, of the time per token, or in
bytes, and the field to change. The cost includes only what the remedy removes (the casts around a float32 adapter, not
all copies). It is the gain measured in the same process if possible (merging), else the observed time of the cause less
the time of its replacement, if that can be estimated; so only a measurement of both variants gives the gain
(`lorameter.profile.remedy`).

The rules use only the evidence and never a process, so a test case for a rule is a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorameter.profile.evidence import ProfileEvidence, RequestEvidence, changes_without
from lorameter.records.units import format_bytes, format_count, format_value
from lorameter.studies.variant import LoraVariant

MIN_SHARE = 0.02
"""Minimum share of a step or of a time of requests for a finding: twice the smallest slow-down that a comparison
detects."""
SAVED_BY_16_BITS = 0.5
"""Time share that 16 bits save in an adapter's product: it has few columns and is memory-bound."""
MIN_IDLE = 0.10
"""Share of a step in which nothing runs: a busy GPU idles less, and a single synchronisation costs less."""
MIN_IDLE_CPU = 0.20
"""The same on a CPU, where the profiler lengthens the gaps between operators more than the operators."""
LARGE_LOGITS = 0.10
"""Minimum share of the peak for a finding about logits."""
LOSS_CHUNKS = 8
"""Number of chunks into which a fused loss is assumed to split the rows; one chunk is in memory at a time."""
LARGE_FRAGMENTATION = 0.10
"""Share of the memory reserved by CUDA's allocator. It rounds blocks up to 2 MiB and splits larger ones, which costs a
few percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A cost of a step or request in time or memory, and a suggestion.

    Attributes:
        code: code of the rule.
        message: the observation, with its number.
        cost_s: seconds of `metric` that are attributed to it; None if it costs only memory.
        cost_share: the same as a share of `metric`.
        metric: the metric that includes the cost, and by which a remedy is judged.
        cost_bytes: bytes at the peak.
        remedy: a sentence.
        changes: fields of the variant to change, with their values, for a comparison with the current variant.
        workload_changes: fields of the workload to change, for a trial of the same variant on another workload.
        obstacle: why nothing can be tried, if there are no changes.
    """

    code: str
    message: str
    cost_s: float | None
    cost_share: float | None
    metric: str = "step_time_s"
    cost_bytes: int | None = None
    remedy: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    workload_changes: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def suggestion(self) -> Mapping[str, Any]:
        """The changes for `--try`: fields of the variant or else of the workload; empty if there are none."""
        return self.changes or self.workload_changes


def diagnose(evidence: ProfileEvidence) -> tuple[Finding, ...]:
    """The findings about a step, as `_rank` sorts them."""
    return _rank(finding for rule in RULES.values() for finding in rule(evidence))


def diagnose_requests(evidence: RequestEvidence) -> tuple[Finding, ...]:
    """The findings about requests, as `_rank` sorts them."""
    return _rank((finding for rule in REQUEST_RULES.values() for finding in rule(evidence)), evidence.passes)


def _rank(findings: Iterable[Finding], passes: int = 1) -> tuple[Finding, ...]:
    """The findings that cost more than `MIN_SHARE`, the most expensive for a step or request first, findings about
    memory last. A cost per token counts once for each of the `passes`."""
    costly = [one for one in findings if one.cost_share is None or one.cost_share > MIN_SHARE]
    return tuple(sorted(costly, key=lambda one: -(one.cost_s or 0.0) * (passes if one.metric == LATER else 1)))


def _launch_bound(evidence: ProfileEvidence) -> Iterator[Finding]:
    if evidence.idle <= (MIN_IDLE if evidence.device == "cuda" else MIN_IDLE_CPU):
        return
    busy_s = evidence.step_s * (1 - evidence.idle)
    yield _make_finding(
        "launch-bound", evidence.step_s, evidence.idle,
        describe_idle(evidence.device, evidence.idle, "a step", evidence.calls, busy_s),
        "More tokens in a step (batch_size) spread the launches over more work"
        + ("." if evidence.variant.compile else "; compile = true makes fewer of them."),
        changes={} if evidence.variant.compile else {"compile": True},
        workload={"batch_size": 2 * evidence.workload.batch_size},
    )  # fmt: skip


def _dequantisation(evidence: ProfileEvidence) -> Iterator[Finding]:
    share = evidence.unpacking
    fits, extra = evidence.fits("quantization"), format_bytes(evidence.extra_bytes.get("quantization", 0))
    yield _make_finding(
        "dequantisation", evidence.step_s, share,
        f"unpacking {evidence.variant.quantization} weights takes {share:.1%} of a step",
        f'quantization = "none" needs about {extra} more memory, and that much is unused.'
        if fits
        else "Unpacked weights may not fit into memory. Each weight is unpacked once in each pass, so a larger batch "
        "needs no more unpacking.",
        changes=changes_without(evidence.variant, "quantization") if fits else {},
        workload={} if fits else {"batch_size": 2 * evidence.workload.batch_size},
    )  # fmt: skip


def _wide_adapter(evidence: ProfileEvidence) -> Iterator[Finding]:
    # Without wide registers, 16 bits are slower; with prepare_for_kbit, the products of the head are 32-bit as well.
    counts = evidence.wide_registers and not evidence.variant.prepare_for_kbit
    narrow, products = evidence.variant.product_dtype, evidence.wide_products if counts else 0.0
    share = evidence.casts + SAVED_BY_16_BITS * products
    if evidence.adapter_dtype != "float32" or narrow == "float32" or evidence.variant.autocast:
        return
    yield _make_finding(
        "float32-adapter", evidence.step_s, share,
        f"adapters in float32 next to products in {narrow}: casts take {evidence.casts:.1%} of a step"
        + (f", products in float32 {products:.1%}" if products else ""),
        advise_adapter_dtype(narrow),
        changes={"adapter_dtype": narrow},
    )  # fmt: skip


def _wide_compute(evidence: ProfileEvidence) -> Iterator[Finding]:
    share, variant = evidence.categories.get("matmul", 0.0), evidence.variant
    if variant.product_dtype != "float32" or variant.tf32 or not evidence.wide_registers:
        return
    key = "compute_dtype" if variant.is_4bit else "dtype"
    tf32 = "; tf32 = true keeps the weights" if evidence.device == "cuda" and not variant.is_4bit else ""
    yield _make_finding(
        "float32-compute", evidence.step_s, share, f"products in float32 take {share:.1%} of a step",
        f'{key} = "bfloat16" runs them in 16 bits{tf32}.', changes={key: "bfloat16"},
    )  # fmt: skip


def _masked_attention(evidence: ProfileEvidence) -> Iterator[Finding]:
    share, variant = evidence.categories.get("attention", 0.0), evidence.variant
    written_out = evidence.attention_backend in ("eager", "math")
    cost = share if written_out else share * evidence.masked_pairs
    if not (written_out or evidence.attention_mask == "explicit"):
        return
    supports_flash = (variant.autocast or variant.dtype) != "float32" and evidence.device == "cuda"
    if variant.attention == "eager":
        remedy, changes, obstacle = 'attention = "sdpa" fuses it.', {"attention": "sdpa"}, ""
    elif supports_flash and variant.attention != "flash_attention_2":
        remedy = 'attention = "flash_attention_2" takes packed rows without a mask.'
        changes = {"attention": "flash_attention_2"} if evidence.flash_attn else {}
        obstacle = "" if changes else 'flash-attn is not installed (pip install "lorameter[flash-attn]")'
    else:
        remedy = "The check of attention.backend says why no other kernel took it; shorter rows hide fewer pairs."
        changes, obstacle = {}, "no setting of the variant lets other kernels run (device, type, head size, mask)"
    message = f"attention ({evidence.attention_backend}) takes {share:.1%} of a step" + (
        ", written out as products and softmax"
        if written_out
        else f" and reads a mask that hides {evidence.masked_pairs:.0%} of its pairs"
    )
    yield _make_finding("masked-attention", evidence.step_s, cost, message, remedy, changes=changes, obstacle=obstacle)


def _padding(evidence: ProfileEvidence) -> Iterator[Finding]:
    packs = {"layout": "packed"} if evidence.workload.layout == "padded" else {}
    yield _make_finding(
        "padding", evidence.step_s, evidence.padded, f"{evidence.padded:.0%} of the positions are padding",
        'layout = "packed" fills rows with records.' if packs else "Drop the last, partly filled rows.",
        workload=packs, obstacle="" if packs else "no setting drops rows",
    )  # fmt: skip


def _checkpointing(evidence: ProfileEvidence) -> Iterator[Finding]:
    if not evidence.variant.gradient_checkpointing or not evidence.fits("gradient_checkpointing"):
        return
    passes = (evidence.phases_s.get("forward", 0.0) + evidence.phases_s.get("backward", 0.0)) / evidence.step_s
    extra = evidence.extra_bytes.get("gradient_checkpointing", 0)
    yield _make_finding(
        "needless-checkpointing", evidence.step_s, evidence.recomputed * passes,
        f"checkpointing repeats {evidence.recomputed:.0%} of all FLOPs, at a peak of "
        f"{format_bytes(evidence.peak_bytes)} of {format_bytes(evidence.memory_bytes)}",
        f"gradient_checkpointing = false needs about {format_bytes(extra)} more memory, and that much is unused.",
        changes=changes_without(evidence.variant, "gradient_checkpointing"),
    )  # fmt: skip


def _optimizer(evidence: ProfileEvidence) -> Iterator[Finding]:
    share = evidence.phases_s.get("update", 0.0) / evidence.step_s
    optimizer = evidence.variant.optimizer
    if optimizer == "adamw_fused" or (optimizer != "adamw" and not evidence.fits("optimizer")):
        return
    yield _make_finding(
        "unfused-optimizer", evidence.step_s, share,
        f"clipping and {optimizer} take {share:.1%} of a step",
        'optimizer = "adamw_fused" updates all tensors in one kernel.', changes={"optimizer": "adamw_fused"},
    )  # fmt: skip


def _dropout(evidence: ProfileEvidence) -> Iterator[Finding]:
    if not isinstance(evidence.variant, LoraVariant) or evidence.variant.lora_dropout <= 0:
        return
    yield _make_finding(
        "dropout", evidence.step_s, evidence.dropout,
        f"masks for lora_dropout = {evidence.variant.lora_dropout:g} take {evidence.dropout:.1%} of a step",
        "lora_dropout = 0 draws none; it regularises, so look at the held-out loss.", changes={"lora_dropout": 0.0},
    )  # fmt: skip


def _logits(evidence: ProfileEvidence) -> Iterator[Finding]:
    if evidence.logits_bytes <= LARGE_LOGITS * evidence.peak_bytes:
        return
    loss = evidence.categories.get("loss", 0.0)
    fuses = evidence.device == "cuda" and not evidence.variant.liger_kernel
    obstacle = "" if fuses and evidence.liger else "liger-kernel is not installed"
    if not fuses:
        obstacle = "a chunked loss must be written in the training code, and the fused one needs a GPU"
    yield Finding(
        code="logits",
        message=f"logits and the intermediate values of the loss take {format_bytes(evidence.logits_bytes)}, "
        f"{evidence.logits_bytes / evidence.peak_bytes:.0%} of the peak; the loss takes {loss:.1%} of a step",
        cost_s=loss * evidence.step_s if loss > MIN_SHARE else None,
        cost_share=loss if loss > MIN_SHARE else None,
        cost_bytes=evidence.logits_bytes - evidence.logits_bytes // LOSS_CHUNKS,
        remedy="liger_kernel = true fuses head and loss and takes a part of the rows at a time, so that not all logits "
        "are in memory at once." if fuses else "A loss over part of the rows at a time never has all logits in memory.",
        changes={"liger_kernel": True} if fuses and evidence.liger else {},
        obstacle=obstacle,
    )  # fmt: skip


def _fragmentation(evidence: ProfileEvidence) -> Iterator[Finding]:
    reserved_bytes = evidence.reserved_bytes or evidence.peak_bytes  # a CPU reserves nothing
    lost = reserved_bytes - evidence.peak_bytes
    if lost <= LARGE_FRAGMENTATION * reserved_bytes and not evidence.alloc_retries:
        return
    reserved, used = format_bytes(reserved_bytes), format_bytes(evidence.peak_bytes)
    retries = format_count(evidence.alloc_retries, "time")
    retried = f", and had to free its cache {retries}" if evidence.alloc_retries else ""
    yield Finding(
        code="fragmentation",
        message=f"the allocator reserved {reserved} for {used}{retried}",
        cost_s=None,
        cost_share=None,
        cost_bytes=lost,
        remedy="Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment.",
        obstacle="variants share the environment",
    )


RULES: Mapping[str, Callable[[ProfileEvidence], Iterator[Finding]]] = {
    "launch-bound": _launch_bound,
    "dequantisation": _dequantisation,
    "float32-adapter": _wide_adapter,
    "float32-compute": _wide_compute,
    "masked-attention": _masked_attention,
    "padding": _padding,
    "needless-checkpointing": _checkpointing,
    "unfused-optimizer": _optimizer,
    "dropout": _dropout,
    "logits": _logits,
    "fragmentation": _fragmentation,
}
"""The rules by the code of their findings."""


def _make_finding(
    code: str,
    whole_s: float,
    share: float,
    message: str,
    remedy: str,
    *,
    metric: str = "step_time_s",
    changes: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
    obstacle: str = "",
) -> Finding:
    return Finding(
        code=code,
        message=message,
        cost_s=share * whole_s,
        cost_share=share,
        metric=metric,
        remedy=remedy,
        changes=changes or {},
        workload_changes=workload or {},
        obstacle=obstacle,
    )


def describe_idle(device: str, share: float, of: str, calls: float, busy_s: float) -> str:
    """The share of a step or a pass in which nothing runs, and the mean time of what is called."""
    each = format_value(busy_s / calls, "s") if calls else "–"
    waits = (
        f"the device waits {share:.0%} of {of} for {calls:.0f} launches"
        if device == "cuda"
        else f"{share:.0%} of {of} is spent between {calls:.0f} operators"
    )
    return f"{waits}, each of {each} in the mean"


def advise_adapter_dtype(narrow: str) -> str:
    """The gain and the drawback of an adapter in the dtype of the surrounding products."""
    return f'adapter_dtype = "{narrow}" needs no cast; its updates are rounded to {narrow}, so compare the loss.'


# --- requests ---------------------------------------------------------------------------------------------------------

FIRST, LATER, WHOLE = "first_token_time_s", "time_per_output_token_s", "request_time_s"
MIN_REALLOCATED = 0.5
"""Share of the tokens at which the cache was reallocated; a cache that grows by concatenation moves at every token."""


def _weight_copied(evidence: RequestEvidence) -> Iterator[Finding]:
    """Findings by the shape of the copied weight: usually the output head, in its product before the first token."""
    for metric, account, name in ((FIRST, evidence.prefill, "prefill"), (LATER, evidence.decode, "decode")):
        cost = sum(copy.time_s for copy in account.copies)
        if not account.copies:
            continue
        costliest = account.copies[0]
        shape = " × ".join(map(str, costliest.shape))
        copies = (
            f"{name} copies the whole of {costliest.weight or 'a weight'} ({costliest.operator} of {shape}, "
            f"{costliest.calls:.3g} times a pass)"
        )
        if not costliest.in_product:
            yield _request_finding(
                "weight-copied", evidence, metric, cost,
                f"{copies}, outside of any product: it is cast or recreated in each pass",
                "Make that copy once, when the model is loaded: cast the weight there, or merge the adapter that "
                "changes it.",
                obstacle="no field controls that copy",
            )  # fmt: skip
            continue
        is_head = costliest.weight == evidence.facts.head != ""
        if is_head and evidence.bytes_per_s:  # the product disappears too; its replacement reads the weight once
            cost += max(0.0, account.head_s - cost - evidence.facts.size.head_bytes / evidence.bytes_per_s)
        foldable = (
            "a compact copy, hidden.clone(memory_format=torch.contiguous_format), which torch's linear folds; a "
            "clone that keeps the strides does not help, nor does contiguous() of a single row, and leaving "
            "requires_grad on for the weight does."
        )
        yield _request_finding(
            "weight-copied", evidence, metric, cost,
            f"{copies}: torch's linear does not fold its input and calls a batched product, which needs the "
            "weight in another layout",
            f"copy_head_input = true hands the head {foldable}" if is_head else f"That layer must be handed {foldable}",
            changes={"copy_head_input": True} if is_head and not evidence.variant.copy_head_input else {},
            obstacle="" if is_head and not evidence.variant.copy_head_input else "no field changes that layer's input",
        )  # fmt: skip


def _adapter_unmerged(evidence: RequestEvidence) -> Iterator[Finding]:
    merged, request = evidence.merged, evidence.request
    if merged is None or request.low is None or merged.high is None or request.low <= merged.high:
        return
    cost = request.value - merged.value
    calls = ""
    if evidence.merged_calls is not None and evidence.decode.calls:
        unit = "launches" if evidence.device == "cuda" else "operators"
        saved = evidence.decode.calls - evidence.merged_calls
        calls = f", {saved:.0f} of the {evidence.decode.calls:.0f} {unit} of a token"
    rounding = " Merging rounds the weights again, 4-bit weights to 4 bits: compare the answers."
    yield _request_finding(
        "adapter-unmerged", evidence, WHOLE, cost,
        f"the unmerged adapter takes {cost / request.value:.1%} of a request, as measured in the same process "
        f"with it merged{calls}",
        f"merge_adapter = true merges it before requests.{rounding if evidence.variant.quantization != 'none' else ''}",
        changes={"merge_adapter": True},
    )  # fmt: skip


def _request_dequantisation(evidence: RequestEvidence) -> Iterator[Finding]:
    unpacking, extra = evidence.decode.dequantise_s, evidence.unquantised_bytes
    more = extra / evidence.bytes_per_s if extra is not None and evidence.bytes_per_s else unpacking
    fits = more < unpacking
    yield _request_finding(
        "dequantisation", evidence, LATER, unpacking - more if fits else unpacking,
        f"unpacking {evidence.variant.quantization} weights takes {format_value(unpacking, 's')} of each later token",
        f'quantization = "none" reads about {format_bytes(extra or 0)} more a token, in {format_value(more, "s")}.'
        if fits
        else "A kernel that multiplies packed weights directly would not unpack them.",
        changes=changes_without(evidence.variant, "quantization") if fits else {},
        obstacle=""
        if fits
        else "the unpacked weights do not fit into memory, or reading them takes longer, or no peak is known",
    )  # fmt: skip


def _request_launch_bound(evidence: RequestEvidence) -> Iterator[Finding]:
    idle, decode = evidence.decode.idle_s, evidence.decode
    if idle <= (MIN_IDLE if evidence.device == "cuda" else MIN_IDLE_CPU) * decode.time_s:
        return
    yield _request_finding(
        "launch-bound", evidence, LATER, idle,
        describe_idle(
            evidence.device, idle / decode.time_s, "a pass over one token", decode.calls, decode.time_s - idle
        ),
        "Several prompts in a request share the launches (request_batch of [workload]), and a captured graph makes one "
        "of them.",
        obstacle="the workload sets the number of prompts, and graphs are not captured",
    )  # fmt: skip


def _cache_reallocated(evidence: RequestEvidence) -> Iterator[Finding]:
    if evidence.facts.cache_moved <= MIN_REALLOCATED:
        return
    yield _request_finding(
        "cache-reallocated", evidence, LATER, evidence.decode.cache_s,
        f"the cache ({evidence.facts.cache}) is reallocated at {evidence.facts.cache_moved:.0%} of the tokens, "
        f"{format_bytes(evidence.facts.cache_bytes)} at the end",
        'kv_cache = "static" allocates it once, for the whole length; attention then reads all of it.',
        changes={"kv_cache": "static"},
    )  # fmt: skip


def _mixed_types(evidence: RequestEvidence) -> Iterator[Finding]:
    variant, cost = evidence.variant, evidence.prefill.casts_s + evidence.passes * evidence.decode.casts_s
    narrow = variant.compute_dtype if variant.is_4bit else variant.dtype
    wide = evidence.adapter_dtype == "float32" and not variant.merge_adapter
    if narrow == "float32" or not (wide or variant.prepare_for_kbit):
        return
    what = "adapters" if wide else "norms, embeddings and head"
    yield _request_finding(
        "mixed-types", evidence, WHOLE, cost,
        f"{what} in float32 next to weights in {narrow}: casts take {cost / evidence.request.value:.1%} of a request",
        advise_adapter_dtype(narrow)
        if wide
        else "prepare_for_kbit = false leaves them in the dtype of the base; compare the loss.",
        changes={"adapter_dtype": narrow} if wide else {"prepare_for_kbit": False},
    )  # fmt: skip


REQUEST_RULES: Mapping[str, Callable[[RequestEvidence], Iterator[Finding]]] = {
    "weight-copied": _weight_copied,
    "adapter-unmerged": _adapter_unmerged,
    "dequantisation": _request_dequantisation,
    "launch-bound": _request_launch_bound,
    "cache-reallocated": _cache_reallocated,
    "mixed-types": _mixed_types,
}
"""The rules of requests by the code of their findings."""
OPERATOR_RULES = frozenset(
    "launch-bound dequantisation float32-adapter float32-compute masked-attention dropout weight-copied "
    "cache-reallocated mixed-types".split()
)
"""The rules that judge the recorded operators; they find nothing if no operators are known."""


def _request_finding(
    code: str, evidence: RequestEvidence, metric: str, cost_s: float, message: str, remedy: str, **more: Any
) -> Finding:
    whole_s = {FIRST: evidence.first_token, LATER: evidence.token, WHOLE: evidence.request}[metric].value
    return _make_finding(code, whole_s, cost_s / whole_s, message, remedy, metric=metric, **more)
