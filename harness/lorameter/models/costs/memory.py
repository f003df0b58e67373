"""Estimates the memory of a variant, by the kinds of `lorameter.records.memory_account`, from the model's shape.

Most kinds are exact counts: weights at their stored size, constants of quantisation (Dettmers et al. 2023, arXiv
2305.14314, section 3: a scale for 64 weights, itself quantised in blocks of 256), adapter, optimizer state, saved
tensors of the forward pass (`lorameter.models.costs.activations`), logits. The peak of a step is at one of three
moments: the gradient of the loss (activations, and logits in float32 three times: log-probabilities and two gradients),
under checkpointing a recomputed block, or the update of the optimizer with all gradients.

The memory of a process on a CPU besides its tensors has no formula. Its constants were measured, as documented with
each, for one thread and glibc. The memory at the start of a process depends on the build of torch (`birth_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorameter.models.catalogue import ModelSource
from lorameter.models.costs.activations import Activations
from lorameter.models.costs.lora import (
    adapter_parameters,
    adapter_tensors,
    constant_bytes,
    optimizer_state_bytes,
    paged_state_bytes,
    weight_bytes,
    width,
)
from lorameter.models.shapes import ModelShape, family_of, linear_widths, read_config
from lorameter.records.memory_account import MEMORY_PHASES, MemoryPhase, in_order
from lorameter.studies.variant import LoraVariant, Variant, form_keys
from lorameter.studies.workload import Workload

MIB = 2**20
BIRTHS = {"cpu": 337 * MIB, "cuda": 520 * MIB}
"""Bytes of a forked trial before it loads its model, by the build of torch, with or without a GPU. Measured with the
build for CPUs, and with the one for CUDA 13 where transformers 5.17 imports scikit-learn, pandas and pyarrow."""
COPIED_SHARE = 0.25
"""Share of these bytes that a forked trial does not share: pages in which reference counts change. Trials of tiny-llama
had 102 to 122 MiB of private memory, 17 to 33 MiB of them new."""
AT_WORK = {"library_code": 48 * MIB, "library_heap": 13 * MIB, "interpreter": 15 * MIB}
"""Bytes that libraries add during a trial; measured over variants of smollm2-135m with the build for CPUs, where they
vary by some MiB. A memory breakdown does not count the last two: they are in its unexplained remainder."""
CUDA_CONTEXT_BYTES = 600 * MIB
"""Device memory of a process's CUDA context and libraries, which no allocator counts; 0.4 to 0.6 GiB is usual."""
HEAP_SLACK = 0.25
"""Share by which the heap of malloc exceeds the allocations of a step; measured 0.13 to 0.3 on smollm2-135m, and up to
0.7 in a trial whose check was the full profile."""
IDLE_HEAP_BYTES = 25 * MIB
"""Bytes that malloc keeps in a request after training, after malloc_trim(3); measured 10 to 44 MiB."""
MAPPED_FROM_BYTES = 32 * MIB
"""glibc maps larger blocks separately and returns them whole (M_MMAP_THRESHOLD's dynamic maximum, mallopt(3))."""
PEAK_RANGES = {"cpu": (0.90, 1.10), "cuda": (0.89, 1.34)}
"""The least and the greatest expected peak, divided by the estimate. On a CPU it is wider than the measured range
(`MEASURED_ERRORS`). On a GPU it is the range of published peaks, of torch's allocator or as nvidia-smi shows, which
tests/models/costs/test_published.py derives."""
PUBLISHED_WITHIN, PUBLISHED_PEAKS = 101, 105
"""Published peaks within that range, and all of them; each is a row of tests/models/costs/published_peaks.toml."""
MEASURED_ERRORS = (-0.069, 0.026)
"""Estimate over measured peak, less 1: the least and the greatest of `MEASURED_ON` that `make proof-memory_estimate`
prints."""
MEASURED_ON = "18 peaks of smollm2-135m on a CPU"
LOGIT_COPIES = 3 * 4
"""Bytes for each logit when the loss's gradient is taken: log-probabilities, their gradient, the logits' gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Expected bytes at the peak of one phase, on the device that measures."""

    phase: MemoryPhase
    kinds: dict[str, int]
    outside_allocator: dict[str, int] = field(default_factory=dict)
    """Bytes outside CUDA's allocator: `context`, and `paged_optimizer_state`, which may be on the host."""

    @property
    def total_bytes(self) -> int:
        """The peak: of the allocator on CUDA, else of the process's resident set."""
        return sum(self.kinds.values())

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free on the device: the peak, and the memory of the process outside the allocator."""
        return self.total_bytes + self.outside_allocator.get("context", 0)


def peak_range(needed_bytes: int, device: str) -> tuple[int, int]:
    """The least and the greatest bytes that a device may need, given the estimate."""
    low, high = PEAK_RANGES[device]
    return int(low * needed_bytes), int(high * needed_bytes)


def birth_bytes(cuda: str | None) -> int:
    """Host memory of a trial's process at its start, where it was not measured.

    Args:
        cuda: the version of CUDA that torch is built for; None for a build for CPUs.
    """
    return BIRTHS["cpu" if cuda is None else "cuda"]


def bare_process_bytes(cuda: str | None) -> int:
    """Resident bytes of a trial's process without tensors; `cuda` as for `birth_bytes`."""
    return birth_bytes(cuda) + sum(AT_WORK.values())


def estimate_memory(
    variant: Variant,
    workload: Workload,
    shape: ModelShape,
    *,
    phase: MemoryPhase = "train",
    device: str = "cpu",
    stored: str | None = None,
    repacks: bool = False,
    process_bytes: int | None = None,
) -> MemoryEstimate:
    """The peak of a phase by kind.

    Args:
        variant: of the training, or of the requests after it.
        workload: batches and lengths; a request has its prompts and their new tokens.
        shape: of the model.
        phase: "train" for a step, "generate" for a request.
        device: "cpu" or "cuda".
        stored: type of a checkpoint that the trial itself maps (`stored_dtype`). None where it maps a prepared base, as
            in a run, or initialises its weights in memory.
        repacks: whether the CPU has AVX512-BF16 and the base is a prepared one. bitsandbytes then replaces the 4-bit
            weights by a repacked copy at the first forward pass in eval mode (`Linear4bit.forward` of bitsandbytes
            0.50), while the file with the originals stays mapped for the embeddings and norms.
        process_bytes: memory of a trial's process at its start: as measured with the libraries of this machine, else
            `birth_bytes` of its torch; None for that of a build for CPUs.

    Raises:
        UnknownLayersError: of a model type whose layers are not known.
    """
    kinds = _resident(variant, shape)
    if phase == "train":
        kinds |= _trained(variant, shape)
        paged = kinds.pop("paged_optimizer_state") if device == "cuda" else 0
        kinds |= _step(variant, workload, shape, device)
    else:
        paged = 0
        kinds |= _request(variant, workload, shape, device)
    if device == "cuda":
        return MemoryEstimate(
            phase=phase,
            kinds=in_order(kinds),
            outside_allocator={"context": CUDA_CONTEXT_BYTES, "paged_optimizer_state": paged},
        )
    kinds |= {"process": birth_bytes(None) if process_bytes is None else process_bytes, **AT_WORK}
    if stored == variant.dtype and not variant.prepare_for_kbit and variant.quantization != "none":
        # Embeddings and norms are still pages of the file, and keep all of it in memory.
        kinds["checkpoint_pages"] = _linear(shape) * width(variant.dtype)
    if repacks and phase == "generate" and variant.is_4bit:
        kinds["checkpoint_pages"] = kinds["linear_weights"] + kinds["quantization_state"]
        kinds["quantization_state"] = _constants(variant, shape, repacked=True)
    return MemoryEstimate(phase=phase, kinds=in_order(kinds))


def estimate_phases(variant: Variant, workload: Workload, shape: ModelShape, **more: Any) -> list[MemoryEstimate]:
    """The estimates of all phases, in order; arguments as for `estimate_memory`."""
    return [estimate_memory(variant, workload, shape, phase=phase, **more) for phase in MEMORY_PHASES]


def estimate_peak(
    variant: Variant, workload: Workload, shape: ModelShape, *, answers: bool = True, **more: Any
) -> MemoryEstimate:
    """The phase with the largest peak; arguments as for `estimate_memory`, and whether the trial `answers` requests.

    It is usually training. Requests of many prompts, or of one that is much longer than a training sequence, need more.
    """
    estimates = estimate_phases(variant, workload, shape, **more)
    return max((one for one in estimates if answers or one.phase == "train"), key=lambda one: one.needed_bytes)


def bound_bytes(variant: Variant, workload: Workload, shape: ModelShape, device: str, process_bytes: int) -> int:
    """An approximate upper bound for a method without a formula: LoRA on all linear layers with the gradients and the
    two moments of full fine-tuning."""
    lora = lora_like(variant)
    expected = estimate_peak(lora, workload, shape, answers=False, device=device, process_bytes=process_bytes)
    weights = _linear(shape) + shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return expected.needed_bytes + 3 * weights * width(variant.dtype)


def lora_like(variant: Variant) -> LoraVariant:
    """LoRA on all linear layers, with AdamW and the fields that a variant of any method has."""
    common = {key: getattr(variant, key) for key in form_keys(LoraVariant) if hasattr(variant, key)}
    return LoraVariant(**(common | {"optimizer": "adamw_fused", "optimizer_args": {}}))


def passing_bytes(variant: Variant, workload: Workload, shape: ModelShape) -> int:
    """Bytes of a trial's peak on a CPU that a process returns between its commands: the logits of a step and their
    copies in the loss. 0 where malloc may keep their blocks, or where they are not part of the peak: of a step whose
    peak is at another moment, or where requests need as much."""
    step, request = estimate_phases(variant, workload, shape)
    logits = step.kinds.get("logits", 0)
    if logits < LOGIT_COPIES // 4 * MAPPED_FROM_BYTES:
        return 0
    return min(logits, max(0, step.total_bytes - request.total_bytes))


def stored_dtype(source: ModelSource) -> str | None:
    """Type of the checkpoint's weights in its configuration; None where they are not mapped from a file."""
    if source.random or source.kind not in ("directory", "hub"):
        return None
    config = read_config(source)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return str(dtype) if dtype else None


def _linear(shape: ModelShape) -> int:
    return shape.layers * sum(inputs * outputs for inputs, outputs in linear_widths(shape).values())


def _resident(variant: Variant, shape: ModelShape) -> dict[str, int]:
    """Bytes of the base and the adapter."""
    wide = width(variant.dtype)
    outside, dtype = (4, "float32") if variant.prepare_for_kbit else (wide, variant.dtype)
    widths = linear_widths(shape).values()
    return {
        "linear_weights": shape.layers * sum(weight_bytes(*sizes, variant) for sizes in widths),
        "quantization_state": _constants(variant, shape),
        f"embeddings_{dtype}": shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) * outside,
        f"norms_{dtype}": (family_of(shape).norms * shape.layers + 1) * shape.hidden_size * outside,
        "adapter": adapter_parameters(variant, shape) * _adapter_width(variant),
    }


def _constants(variant: Variant, shape: ModelShape, *, repacked: bool = False) -> int:
    """Bytes of the constants of quantisation, in all linear layers."""
    return shape.layers * sum(
        constant_bytes(*sizes, variant, repacked=repacked) for sizes in linear_widths(shape).values()
    )


def mapped_bytes(variant: Variant, shape: ModelShape) -> int:
    """Bytes that processes share on one prepared base: all of it except the parts that each casts to float32."""
    kinds = _resident(variant, shape)
    if variant.prepare_for_kbit:
        return kinds["linear_weights"] + kinds["quantization_state"]
    return sum(size for kind, size in kinds.items() if kind != "adapter")


def _adapter_width(variant: Variant) -> int:
    return width(variant.adapter_dtype or "float32")


def _trained(variant: Variant, shape: ModelShape) -> dict[str, int]:
    """Optimizer state, its paged part separately."""
    tensors, size = adapter_tensors(variant, shape), _adapter_width(variant)
    paged = paged_state_bytes(variant.optimizer, tensors)
    state = optimizer_state_bytes(variant.optimizer, [(elements, size) for elements in tensors])
    return {"optimizer_state": state - paged, "paged_optimizer_state": paged}


def _step(variant: Variant, workload: Workload, shape: ModelShape, device: str) -> dict[str, int]:
    """Bytes that a step adds at its peak."""
    activations = Activations(variant, workload, shape, device)
    saved, tokens = activations.sum_kept(), workload.batch_size * workload.sequence_length
    gradients = adapter_parameters(variant, shape) * _adapter_width(variant)
    accumulated = gradients if variant.gradient_accumulation > 1 else 0
    slack = device == "cpu" and tokens < mapped_from_tokens(variant, shape)
    again = activations.block() if variant.gradient_checkpointing else 0
    allocated = max(saved, gradients, saved + again + gradients if again else 0) if slack else 0
    loss = {"activations": saved, "logits": LOGIT_COPIES * tokens * shape.vocab_size, "gradients": accumulated}
    moments = [loss, {"gradients": gradients, "temporaries": gradients * _foreach(variant, device)}]
    if variant.gradient_checkpointing:
        wide = max(shape.intermediate_size, shape.hidden_size)
        block = {"activations": saved, "temporaries": again + 3 * 4 * tokens * wide, "gradients": gradients}
        moments.append(block | {"operator_scratch": _dequantised(variant, shape)})
    for moment in moments:
        if slack:
            live = moment.get("activations", 0) + moment.get("gradients", 0) + moment.get("temporaries", 0)
            moment["heap_slack"] = max(0, allocated - live) + int(HEAP_SLACK * allocated)
    return max(moments, key=lambda moment: sum(moment.values()))


def mapped_from_tokens(variant: Variant, shape: ModelShape) -> int:
    """The least tokens of a step whose activations are mapped separately on a CPU, so that malloc keeps none of them.

    Only at this number does an estimate fall with more tokens.
    """
    return -(-MAPPED_FROM_BYTES // (shape.intermediate_size * width(variant.dtype)))


def _foreach(variant: Variant, device: str) -> int:
    """Copies of the gradients by torch's unfused AdamW, which updates all tensors at once on a GPU ("foreach")."""
    return 1 if device == "cuda" and variant.optimizer == "adamw" else 0


def _dequantised(variant: Variant, shape: ModelShape) -> int:
    """Bytes of the largest layer in the type in which it multiplies."""
    largest = max(inputs * outputs for inputs, outputs in linear_widths(shape).values())
    return largest * width(variant.compute_dtype) if variant.is_4bit else 0


def _request(variant: Variant, workload: Workload, shape: ModelShape, device: str) -> dict[str, int]:
    """Bytes that a request adds for each of its prompts: keys and values of the context, temporaries of one block, the
    logits of the last token; and the adapters, all of which are in memory."""
    size, prompts = 4 if variant.prepare_for_kbit else width(variant.dtype), workload.request_batch
    context = workload.prompt_tokens + workload.new_tokens
    kinds = {
        "kv_cache": prompts * 2 * shape.layers * shape.kv_heads * shape.head_dim * context * size,
        "logits": prompts * shape.vocab_size * (size + 4),
        "adapter": workload.adapters * adapter_parameters(variant, shape) * _adapter_width(variant),
        "temporaries": prompts * workload.prompt_tokens * 3 * shape.intermediate_size * size,
        "operator_scratch": _dequantised(variant, shape),
    }
    if device == "cpu":
        # oneDNN packs a 16-bit weight in each product; the largest is the head.
        head = shape.vocab_size * shape.hidden_size * size if size == 2 else 0
        kinds |= {"operator_scratch": max(head, kinds["operator_scratch"]), "heap_slack": IDLE_HEAP_BYTES}
    return kinds


def memory_bytes(variant: Variant, workload: Workload, shape: ModelShape, device: str = "cpu") -> int:
    """Expected peak of training beyond the bare process (`lorameter.models.costs.memory`)."""
    expected = estimate_memory(variant, workload, shape, device=device)
    return expected.total_bytes - (bare_process_bytes(None) if device == "cpu" else 0)
