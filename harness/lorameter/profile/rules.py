"""Rules from the evidence of a step to findings, each with its number and its cost.

A rule says what was seen, how much of a step (or how many bytes) it costs, and which field to change. Of a cost only
what the remedy takes away counts (the casts next to an adapter in float32, not all copies), but what comes in place of
a thing may cost something too, and a thing may cost others time that is not attributed to it. Only a measurement of
both says what is won (`lorameter.profile.remedy`).

The rules see evidence only, never a process: a constructed case for each is a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorameter.errors import UsageError
from lorameter.profile.evidence import ProfileEvidence, changes_without
from lorameter.records.units import format_bytes, format_count, format_value
from lorameter.studies.variant import LoraVariant, Variant

WORTH = 0.02
"""Share of a step that is worth a word: twice the smallest slow-down that a comparison looks for."""
HALVED = 0.5
"""What 16 bits save of the time of an adapter's product: it has few columns, and waits for the bytes that it reads."""
LEAST_IDLE = 0.10
"""Share of a step in which nothing runs: a GPU that is kept busy waits less, and one synchronisation costs less."""
BETWEEN = 0.20
"""The same on a CPU, where the profiler stretches what lies between operators more than them."""
LARGE_LOGITS = 0.10
"""Share of the peak from which the logits are worth a word."""
LOSS_CHUNKS = 8
"""Parts in which a fused loss is taken to go through the rows; one of them is there at a time."""
FRAGMENTED = 0.10
"""Of what CUDA's allocator reserved. It rounds blocks up to 2 MiB and splits larger ones, which costs a few percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a step or request spends time or memory on, and what to try.

    Attributes:
        code: of the rule.
        message: what was seen, with its number.
        cost_s: seconds of `metric` that are attributed to it; None where it costs memory alone.
        cost_share: the same as a share of it.
        metric: what the cost is a part of, and what a remedy is judged by.
        cost_bytes: bytes at the peak.
        remedy: a sentence.
        changes: fields of the variant to change, with their values: what can be tried against the present one.
        workload_changes: fields of the workload to change, for a trial of the same variant on another workload.
        obstacle: why nothing can be tried here, where there are no changes.
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
        """What `--try` changes: fields of the variant or, where none help, of the workload; empty where neither do."""
        return self.changes or self.workload_changes


def diagnose(evidence: ProfileEvidence) -> tuple[Finding, ...]:
    """All findings, the most expensive first, those of memory last."""
    found = [finding for rule in RULES.values() for finding in rule(evidence)]
    return tuple(sorted(found, key=lambda finding: -(finding.cost_s or 0.0)))


def _launch_bound(seen: ProfileEvidence) -> Iterator[Finding]:
    if seen.idle <= (LEAST_IDLE if seen.device == "cuda" else BETWEEN):
        return
    each = format_value(seen.step_s * (1 - seen.idle) / seen.calls, "s") if seen.calls else "–"
    if seen.device == "cuda":
        message = (
            f"the device waits {seen.idle:.0%} of a step for {seen.calls:.0f} launches, each of {each} in the mean"
        )
    else:
        message = f"{seen.idle:.0%} of a step is spent between {seen.calls:.0f} operators, each of {each} in the mean"
    yield _make_finding(
        "launch-bound", seen, seen.idle, message,
        "More tokens in a step (batch_size) spread the launches over more work"
        + ("." if seen.variant.compile else "; compile = true makes fewer of them."),
        changes={} if seen.variant.compile else {"compile": True},
        workload={"batch_size": 2 * seen.workload.batch_size},
    )  # fmt: skip


def _dequantisation(seen: ProfileEvidence) -> Iterator[Finding]:
    share = seen.unpacking
    if share <= WORTH:
        return
    extra = seen.extra_bytes.get("quantization", 0)
    if seen.fits("quantization"):
        yield _make_finding(
            "dequantisation", seen, share, f"unpacking {seen.variant.quantization} weights takes {share:.1%} of a step",
            f'quantization = "none" needs about {format_bytes(extra)} more, which is there.',
            changes=changes_without(seen.variant, "quantization"),
        )  # fmt: skip
    else:
        yield _make_finding(
            "dequantisation", seen, share, f"unpacking {seen.variant.quantization} weights takes {share:.1%} of a step",
            "There may be no memory for them unpacked; each weight is unpacked once a pass, so more tokens in it cost "
            "no more of this.",
            workload={"batch_size": 2 * seen.workload.batch_size},
        )  # fmt: skip


def _wide_adapter(seen: ProfileEvidence) -> Iterator[Finding]:
    narrow, products = _compute_type(seen.variant), seen.wide_products
    if not seen.wide_registers or seen.variant.prepare_for_kbit:  # slower in 16 bits, or the head's own among them
        products = 0.0
    share = seen.casts + HALVED * products
    if seen.adapter_dtype != "float32" or narrow == "float32" or seen.variant.autocast or share <= WORTH:
        return
    yield _make_finding(
        "float32-adapter", seen, share,
        f"adapters in float32 next to products in {narrow}: casts take {seen.casts:.1%} of a step"
        + (f", products in float32 {products:.1%}" if products else ""),
        advise_adapter_dtype(narrow),
        changes={"adapter_dtype": narrow},
    )  # fmt: skip


def _wide_compute(seen: ProfileEvidence) -> Iterator[Finding]:
    share, variant = seen.categories.get("matmul", 0.0), seen.variant
    if _compute_type(variant) != "float32" or variant.tf32 or not seen.wide_registers or share <= WORTH:
        return
    key = "compute_dtype" if variant.is_4bit else "dtype"
    tf32 = "; tf32 = true keeps the weights" if seen.device == "cuda" and not variant.is_4bit else ""
    yield _make_finding(
        "float32-compute", seen, share, f"products in float32 take {share:.1%} of a step",
        f'{key} = "bfloat16" runs them in 16 bits{tf32}.', changes={key: "bfloat16"},
    )  # fmt: skip


def _masked_attention(seen: ProfileEvidence) -> Iterator[Finding]:
    share = seen.categories.get("attention", 0.0)
    written_out = seen.attention_backend in ("eager", "math")
    if not (written_out or seen.attention_mask == "explicit"):
        return
    cost = share if written_out else share * seen.masked_pairs
    if cost <= WORTH:
        return
    obstacle = ""
    if seen.variant.attention == "eager":
        remedy, changes = 'attention = "sdpa" fuses it.', {"attention": "sdpa"}
    elif (
        seen.device == "cuda"
        and seen.variant.attention != "flash_attention_2"
        and (seen.variant.autocast or seen.variant.dtype) != "float32"  # which flash-attn does not take
    ):
        remedy = 'attention = "flash_attention_2" takes packed rows without a mask.'
        changes = {"attention": "flash_attention_2"} if seen.flash_attn else {}
        remedy += "" if seen.flash_attn else ' It needs pip install "lorameter[flash-attn]".'
        obstacle = "" if seen.flash_attn else "flash-attn is not installed"
    elif written_out:
        remedy, changes = "The check of attention.backend says why no fused kernel took it.", {}
        obstacle = "what keeps the kernels out (type, head size, mask) is not a setting of the variant"
    else:
        remedy, changes = "Shorter rows hide fewer pairs.", {}
        obstacle = "no kernel here leaves them out"
    seconds = f"attention ({seen.attention_backend}) takes {share:.1%} of a step"
    message = (
        f"{seconds}, written out as products and softmax"
        if written_out
        else f"{seconds} and reads a mask that hides {seen.masked_pairs:.0%} of its pairs"
    )
    yield _make_finding("masked-attention", seen, cost, message, remedy, changes=changes, obstacle=obstacle)


def _padding(seen: ProfileEvidence) -> Iterator[Finding]:
    if seen.padded <= WORTH:
        return
    packs = {"layout": "packed"} if seen.workload.layout == "padded" else {}
    yield _make_finding(
        "padding", seen, seen.padded, f"{seen.padded:.0%} of the positions are padding",
        'layout = "packed" fills rows with records.' if packs else "Drop the last, partly filled rows.",
        workload=packs, obstacle="" if packs else "no field leaves rows out",
    )  # fmt: skip


def _checkpointing(seen: ProfileEvidence) -> Iterator[Finding]:
    if not seen.variant.gradient_checkpointing or not seen.fits("gradient_checkpointing"):
        return
    passes = (seen.phases_s.get("forward", 0.0) + seen.phases_s.get("backward", 0.0)) / seen.step_s
    extra = seen.extra_bytes.get("gradient_checkpointing", 0)
    yield _make_finding(
        "needless-checkpointing", seen, seen.recomputed * passes,
        f"checkpointing repeats {seen.recomputed:.0%} of all FLOPs, at a peak of {format_bytes(seen.peak_bytes)} of "
        f"{format_bytes(seen.memory_bytes)}",
        f"gradient_checkpointing = false needs about {format_bytes(extra)} more, which is there.",
        changes=changes_without(seen.variant, "gradient_checkpointing"),
    )  # fmt: skip


def _optimizer(seen: ProfileEvidence) -> Iterator[Finding]:
    share = seen.phases_s.get("update", 0.0) / seen.step_s
    if seen.variant.optimizer == "adamw_fused" or share <= WORTH:
        return
    if seen.variant.optimizer != "adamw" and not seen.fits("optimizer"):
        return
    yield _make_finding(
        "unfused-optimizer", seen, share, f"clipping and {seen.variant.optimizer} take {share:.1%} of a step",
        'optimizer = "adamw_fused" updates all tensors in one kernel.', changes={"optimizer": "adamw_fused"},
    )  # fmt: skip


def _dropout(seen: ProfileEvidence) -> Iterator[Finding]:
    if not isinstance(seen.variant, LoraVariant) or seen.variant.lora_dropout <= 0 or seen.dropout <= WORTH:
        return
    yield _make_finding(
        "dropout", seen, seen.dropout,
        f"masks for lora_dropout = {seen.variant.lora_dropout:g} take {seen.dropout:.1%} of a step",
        "lora_dropout = 0 draws none; it regularises, so look at the held-out loss.", changes={"lora_dropout": 0.0},
    )  # fmt: skip


def _data(seen: ProfileEvidence) -> Iterator[Finding]:
    share = seen.phases_s.get("data", 0.0) / seen.step_s
    if share > WORTH:
        yield _make_finding(
            "data-wait", seen, share, f"a step waits {share:.1%} of its time for its batch",
            "Check which disk holds the token file: it is mapped, and read at first use.",
            obstacle="it is the disk's",
        )  # fmt: skip


def _logits(seen: ProfileEvidence) -> Iterator[Finding]:
    if seen.logits_bytes <= LARGE_LOGITS * seen.peak_bytes:
        return
    loss = seen.categories.get("loss", 0.0)
    fuses = seen.device == "cuda" and not seen.variant.liger_kernel
    obstacle = "" if fuses and seen.liger else "liger-kernel is not installed"
    if not fuses:
        obstacle = "a chunked loss is the training code's own, and the fused one runs on a GPU"
    yield Finding(
        code="logits",
        message=f"logits and what the loss makes of them take {format_bytes(seen.logits_bytes)}, "
        f"{seen.logits_bytes / seen.peak_bytes:.0%} of the peak; the loss takes {loss:.1%} of a step",
        cost_s=loss * seen.step_s if loss > WORTH else None,
        cost_share=loss if loss > WORTH else None,
        cost_bytes=seen.logits_bytes - seen.logits_bytes // LOSS_CHUNKS,
        remedy="liger_kernel = true fuses head and loss, a part of the rows at a time, so that all logits are never "
        "there at once." if fuses else "A loss that takes a part of the rows at a time never holds all logits.",
        changes={"liger_kernel": True} if fuses and seen.liger else {},
        obstacle=obstacle,
    )  # fmt: skip


def _fragmentation(seen: ProfileEvidence) -> Iterator[Finding]:
    if not seen.reserved_bytes:
        return
    lost = seen.reserved_bytes - seen.peak_bytes
    if lost <= FRAGMENTED * seen.reserved_bytes and not seen.alloc_retries:
        return
    reserved, used = format_bytes(seen.reserved_bytes), format_bytes(seen.peak_bytes)
    retried = (
        f", and gave its cache back {format_count(seen.alloc_retries, 'time')} to go on" if seen.alloc_retries else ""
    )
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
    "data-wait": _data,
    "logits": _logits,
    "fragmentation": _fragmentation,
}
"""The rules by the code of what they find."""


def check_code(code: str, rules: Iterable[str]) -> None:
    """Raises `UsageError` for a code that none of the rules has, before anything is profiled for it."""
    if code not in rules:
        raise UsageError(f"--try {code}: no such finding. Known: {', '.join(rules)}.")


OF_WHAT_RAN = frozenset(
    ("launch-bound", "dequantisation", "float32-adapter", "float32-compute", "masked-attention", "dropout")
)
"""Rules that judge what ran in a step, and find nothing where that is not known."""


def _make_finding(
    code: str,
    seen: ProfileEvidence,
    share: float,
    message: str,
    remedy: str,
    *,
    changes: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
    obstacle: str = "",
) -> Finding:
    return Finding(
        code=code,
        message=message,
        cost_s=share * seen.step_s,
        cost_share=share,
        remedy=remedy,
        changes=changes or {},
        workload_changes=workload or {},
        obstacle=obstacle,
    )


def advise_adapter_dtype(narrow: str) -> str:
    """What is gained and given up with an adapter in the type of the products around it."""
    return f'adapter_dtype = "{narrow}" needs no cast; its updates are rounded to {narrow}, so look at the loss.'


def _compute_type(variant: Variant) -> str:
    return variant.compute_dtype if variant.is_4bit else variant.autocast or variant.dtype
