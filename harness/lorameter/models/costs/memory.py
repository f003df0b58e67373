"""Estimates the memory of a variant from the model's shape, by the kinds of `lorameter.records.record`.

Most kinds are exact counts: weights at their stored size, constants of quantisation (Dettmers et al. 2023, arXiv
2305.14314, section 3: a scale for 64 weights, itself quantised in blocks of 256), adapter, optimizer state, saved
tensors of the forward pass (`lorameter.models.costs.memory`), logits. The peak of a step is at one of three moments:
the gradient of the loss (activations, and logits in float32 three times: log-probabilities and two gradients), under
checkpointing a recomputed block, or the update of the optimizer with all gradients.

The CPU memory of a process other than its tensors has no formula. Its constants were measured, as documented for each,
with one thread and glibc. The memory at the start of a process depends on the build of torch (`baseline_bytes`).

Saved tensors: Korthikanti et al. (2022, arXiv 2205.05198, section 4.1) count 34 bytes per token, layer and hidden unit
for a dense 16-bit transformer. LoRA training differs: frozen weights have no gradient, so the input of a frozen layer
is not saved; but each adapter saves its own input, which PEFT casts to the adapter's dtype, and its r columns. The rest
is as in transformers' Llama: a norm saves its input in float32 and one number per token; attention saves its operands,
its output and a logarithm per row; the gated activation saves its three factors. A tensor that two operators save
counts once.

With checkpointing, a block saves only its input; the last norm is unaffected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from lorameter.models.catalogue import ModelSource
from lorameter.models.costs.lora import (
    adapted_widths,
    adapter_parameters,
    adapter_tensors,
    as_lora,
    element_bytes,
    optimizer_state_bytes,
    paged_state_bytes,
    weight_bytes,
)
from lorameter.models.shapes import (
    ModelShape,
    Stage,
    find_family,
    linear_elements,
    linear_layers,
    linear_widths,
    read_config,
)
from lorameter.records.record import MEMORY_PHASES, MemoryPhase, order_memory_kinds
from lorameter.studies.form import form_keys
from lorameter.studies.variant import LoraVariant, Variant
from lorameter.studies.workload import Workload

MIB = 2**20
BASELINES = {"cpu": 337 * MIB, "cuda": 520 * MIB}
"""Bytes of a forked trial before it loads its model, by the build of torch, with or without a GPU. Measured with the
CPU build, and with the CUDA 13 build and a transformers 5.17 that imports scikit-learn, pandas and pyarrow."""
COPIED_SHARE = 0.25
"""Share of these bytes that a forked trial does not share with its parent: pages in which reference counts change.
Trials of tiny-llama had 102 to 122 MiB of private memory, of which 17 to 33 MiB were new."""
LIBRARY_BYTES = {"library_code": 48 * MIB, "library_heap": 13 * MIB, "interpreter": 15 * MIB}
"""Bytes that libraries add during a trial; measured over variants of smollm2-135m with the CPU build, where they vary
by some MiB. In a memory breakdown the last two are part of the unexplained remainder."""
CUDA_CONTEXT_BYTES = 600 * MIB
"""Device memory of a process's CUDA context and libraries, which is outside every allocator; 0.4 to 0.6 GiB is
usual."""
HEAP_SLACK = 0.25
"""Share by which malloc's heap exceeds the allocations of a step; measured 0.13 to 0.3 on smollm2-135m, and up to 0.7
in a trial whose check recorded the full profile."""
IDLE_HEAP_BYTES = 25 * MIB
"""Bytes that malloc keeps in a request after training, after malloc_trim(3); measured 10 to 44 MiB."""
MAPPED_FROM_BYTES = 32 * MIB
"""glibc maps larger blocks separately and returns them completely (M_MMAP_THRESHOLD's dynamic maximum, mallopt(3))."""
PEAK_RANGES = {"cpu": (0.90, 1.10), "cuda": (0.89, 1.34)}
"""The least and the greatest expected peak, divided by the estimate. On a CPU the range is wider than the measured one
(`MEASURED_ERRORS`). On a GPU it is the range of published peaks (of torch's allocator or from nvidia-smi), derived by
tests/models/costs/test_flops.py."""
PUBLISHED_WITHIN, PUBLISHED_PEAKS = 101, 105
"""Number of published peaks within that range, and of all published peaks; each is a row of
tests/models/costs/published_peaks.toml."""
MEASURED_ERRORS = (-0.069, 0.026)
"""Estimate over measured peak, minus 1: the minimum and the maximum over `MEASURED_ON`, as printed by `make
proof-memory_estimate`."""
MEASURED_ON = "18 peaks of smollm2-135m on a CPU"
LOGIT_COPIES = 3 * 4
"""Bytes for each logit when the loss gradient is computed: log-probabilities, their gradient, the logits' gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Expected bytes at the peak of one phase, on the measuring device."""

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
    """The minimum and maximum bytes that a device may need, given the estimate."""
    low, high = PEAK_RANGES[device]
    return int(low * needed_bytes), int(high * needed_bytes)


def baseline_bytes(cuda: str | None) -> int:
    """Host memory of a trial's process at its start, if it was not measured.

    Args:
        cuda: the CUDA version of the torch build; None for a CPU build.
    """
    return BASELINES["cpu" if cuda is None else "cuda"]


def bare_process_bytes(cuda: str | None) -> int:
    """Resident bytes of a trial's process without tensors; `cuda` as for `baseline_bytes`."""
    return baseline_bytes(cuda) + sum(LIBRARY_BYTES.values())


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
    """Estimate the peak of a phase by kind.

    Args:
        variant: variant of the training, or of the requests after it.
        workload: batches and lengths; a request has its prompts and their new tokens.
        shape: shape of the model.
        phase: "train" for a step, "generate" for a request.
        device: "cpu" or "cuda".
        stored: dtype of a checkpoint that the trial itself maps (`stored_dtype`). None if it maps a prepared base, as
            in a run, or initialises its weights in memory.
        repacks: whether the CPU has AVX512-BF16 and the base is a prepared one. bitsandbytes then replaces the 4-bit
            weights by a repacked copy at the first forward pass in eval mode (`Linear4bit.forward` of bitsandbytes
            0.50), while the file with the originals stays mapped for the embeddings and norms.
        process_bytes: memory of a trial's process at its start, measured with the libraries of this machine or else
            `baseline_bytes` of its torch; None for the value of a CPU build.

    Raises:
        UnknownLayersError: the layers of the model type are unknown.
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
            kinds=order_memory_kinds(kinds),
            outside_allocator={"context": CUDA_CONTEXT_BYTES, "paged_optimizer_state": paged},
        )
    kinds |= {"process": baseline_bytes(None) if process_bytes is None else process_bytes, **LIBRARY_BYTES}
    if stored == variant.dtype and not variant.prepare_for_kbit and variant.format.is_quantised:
        # Embeddings and norms are still pages of the file, which keeps all of it in memory.
        kinds["checkpoint_pages"] = linear_elements(shape) * element_bytes(variant.dtype)
    if repacks and phase == "generate" and variant.format.repacked_block:
        kinds["checkpoint_pages"] = kinds["linear_weights"] + kinds["quantization_state"]
        kinds["quantization_state"] = _constants(variant, shape, repacked=True)
    return MemoryEstimate(phase=phase, kinds=order_memory_kinds(kinds))


def estimate_phases(variant: Variant, workload: Workload, shape: ModelShape, **more: Any) -> list[MemoryEstimate]:
    """The estimates of all phases, in order; arguments as for `estimate_memory`."""
    return [estimate_memory(variant, workload, shape, phase=phase, **more) for phase in MEMORY_PHASES]


def estimate_peak(
    variant: Variant, workload: Workload, shape: ModelShape, *, answers: bool = True, **more: Any
) -> MemoryEstimate:
    """The estimate of the phase with the largest peak; arguments as for `estimate_memory`, and whether the trial
    `answers` requests.

    It is usually training. Requests of many prompts, or of one that is much longer than a training sequence, need more.
    """
    estimates = estimate_phases(variant, workload, shape, **more)
    return max((one for one in estimates if answers or one.phase == "train"), key=lambda one: one.needed_bytes)


def bound_bytes(variant: Variant, workload: Workload, shape: ModelShape, device: str, process_bytes: int) -> int:
    """An approximate upper bound for a method without a formula: LoRA on all linear layers with the gradients and the
    two moments of full fine-tuning."""
    lora = lora_like(variant)
    expected = estimate_peak(lora, workload, shape, answers=False, device=device, process_bytes=process_bytes)
    weights = linear_elements(shape) + shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return expected.needed_bytes + 3 * weights * element_bytes(variant.dtype)


def lora_like(variant: Variant) -> LoraVariant:
    """LoRA on all linear layers, with AdamW and the fields common to all methods."""
    common = {key: getattr(variant, key) for key in form_keys(LoraVariant) if hasattr(variant, key)}
    return LoraVariant(**(common | {"optimizer": "adamw_fused", "optimizer_args": {}}))


def transient_bytes(variant: Variant, workload: Workload, shape: ModelShape) -> int:
    """Bytes of a trial's peak on a CPU that a process returns between its commands: the logits of a step and their
    copies in the loss. 0 if malloc may keep their blocks, or if they are not part of the peak, because the peak is at
    another moment of the step or requests need as much."""
    step, request = estimate_phases(variant, workload, shape)
    logits = step.kinds.get("logits", 0)
    if logits < LOGIT_COPIES // 4 * MAPPED_FROM_BYTES:
        return 0
    return min(logits, max(0, step.total_bytes - request.total_bytes))


def stored_dtype(source: ModelSource) -> str | None:
    """Dtype of the checkpoint's weights in its configuration; None if they are not mapped from a file."""
    if source.random or source.kind not in ("directory", "hub"):
        return None
    config = read_config(source)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return str(dtype) if dtype else None


def _resident(variant: Variant, shape: ModelShape) -> dict[str, int]:
    """Bytes of the base and the adapter."""
    wide = element_bytes(variant.dtype)
    outside, dtype = (4, "float32") if variant.prepare_for_kbit else (wide, variant.dtype)
    widths = linear_widths(shape).values()
    return {
        "linear_weights": shape.layers * sum(weight_bytes(*sizes, variant) for sizes in widths),
        "quantization_state": _constants(variant, shape),
        f"embeddings_{dtype}": shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) * outside,
        f"norms_{dtype}": (find_family(shape).norms * shape.layers + 1) * shape.hidden_size * outside,
        "adapter": adapter_parameters(variant, shape) * _adapter_width(variant),
    }


def _constants(variant: Variant, shape: ModelShape, *, repacked: bool = False) -> int:
    """Bytes of the quantisation constants in all linear layers."""
    nested, widths = bool(variant.effective("double_quant")), linear_widths(shape).values()
    return shape.layers * sum(
        variant.format.constant_bytes(*sizes, nested=nested, repacked=repacked) for sizes in widths
    )


def mapped_bytes(variant: Variant, shape: ModelShape) -> int:
    """Bytes of one prepared base that processes share: all except the parts that each process casts to float32."""
    kinds = _resident(variant, shape)
    if variant.prepare_for_kbit:
        return kinds["linear_weights"] + kinds["quantization_state"]
    return sum(size for kind, size in kinds.items() if kind != "adapter")


def _adapter_width(variant: Variant) -> int:
    return element_bytes(variant.adapter_dtype or "float32")


def _trained(variant: Variant, shape: ModelShape) -> dict[str, int]:
    """Bytes of the optimizer state, with its paged part separately."""
    tensors, size = adapter_tensors(variant, shape), _adapter_width(variant)
    paged = paged_state_bytes(variant.optimizer, tensors)
    state = optimizer_state_bytes(variant.optimizer, [(elements, size) for elements in tensors])
    return {"optimizer_state": state - paged, "paged_optimizer_state": paged}


def _step(variant: Variant, workload: Workload, shape: ModelShape, device: str) -> dict[str, int]:
    """Bytes that a step adds at its peak."""
    activations = Activations(variant, workload, shape, device)
    saved, tokens = activations.total(), workload.batch_size * workload.sequence_length
    gradients = adapter_parameters(variant, shape) * _adapter_width(variant)
    accumulated = gradients if variant.gradient_accumulation > 1 else 0
    slack = device == "cpu" and tokens < mapped_from_tokens(variant, shape)
    again = activations.block() if variant.gradient_checkpointing else 0
    allocated = max(saved, gradients, saved + again + gradients if again else 0) if slack else 0
    loss = {"activations": saved, "logits": LOGIT_COPIES * tokens * shape.vocab_size, "gradients": accumulated}
    # torch's unfused AdamW updates all tensors at once on a GPU ("foreach"), with a copy of the gradients.
    copies = gradients if device == "cuda" and variant.optimizer == "adamw" else 0
    moments = [loss, {"gradients": gradients, "temporaries": copies}]
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
    """The minimum tokens of a step for which activations are mapped separately on a CPU, so that malloc does not keep
    them.

    Only at this number can an estimate decrease with more tokens.
    """
    return -(-MAPPED_FROM_BYTES // (shape.intermediate_size * element_bytes(variant.dtype)))


def _dequantised(variant: Variant, shape: ModelShape) -> int:
    """Bytes of the largest layer in its compute dtype."""
    largest = max(inputs * outputs for inputs, outputs in linear_widths(shape).values())
    return largest * element_bytes(variant.base_dtype) if variant.format.unpacks else 0


def _request(variant: Variant, workload: Workload, shape: ModelShape, device: str) -> dict[str, int]:
    """Bytes that a request adds for each of its prompts: keys and values of the context, temporaries of one block, the
    logits of the last token; and the adapters, which are all in memory."""
    size, prompts = 4 if variant.prepare_for_kbit else element_bytes(variant.dtype), workload.request_batch
    context = workload.prompt_tokens + workload.new_tokens
    kinds = {
        "kv_cache": prompts * 2 * shape.layers * shape.kv_heads * shape.head_dim * context * size,
        "logits": prompts * shape.vocab_size * (size + 4),
        "adapter": workload.adapters * adapter_parameters(variant, shape) * _adapter_width(variant),
        "temporaries": prompts * workload.prompt_tokens * 3 * shape.intermediate_size * size,
        "operator_scratch": _dequantised(variant, shape),
    }
    if device == "cpu":
        # oneDNN packs a 16-bit weight for each product; the largest is the output head.
        head = shape.vocab_size * shape.hidden_size * size if size == 2 else 0
        kinds |= {"operator_scratch": max(head, kinds["operator_scratch"]), "heap_slack": IDLE_HEAP_BYTES}
    return kinds


class Activations:
    """Bytes that are saved for one micro-batch. `device` is "cpu" or "cuda", which differ in the dropout mask.

    Raises `UnknownLayersError` if the model's layers are unknown.
    """

    def __init__(self, variant: Variant, workload: Workload, shape: ModelShape, device: str) -> None:
        self._variant = as_lora(variant, shape)
        self._shape = shape
        self._rows, self._length = workload.batch_size, workload.sequence_length
        self._tokens = self._rows * self._length
        self._adapted = adapted_widths(variant, shape)
        self._family = find_family(shape)
        adapted = [layer for name, layer in linear_layers(shape).items() if name in self._adapted]
        self._inputs = {stage: [layer.inputs for layer in adapted if layer.stage == stage] for stage in get_args(Stage)}
        """Input widths of the layers with an adapter, by stage."""
        self._stream = 4 if variant.prepare_for_kbit else element_bytes(variant.dtype)
        self._adapter = element_bytes(variant.adapter_dtype or "float32")
        cast = variant.autocast
        self._product = self._adapter if cast is None else element_bytes(cast)
        self._attention = self._stream if cast is None else element_bytes(cast)
        self._mask = self._adapter if device == "cpu" else 1
        """Bytes of an element of the dropout mask, which on a CPU is a factor in the dtype of the input."""
        self._cast_adapter = 0 if self._product == self._adapter else self._product
        """Bytes of an element of an adapter's weight in the autocast dtype, 0 if it is not cast."""
        self._shared = self._product == self._adapter == self._stream
        """Whether adapters share their input; otherwise each has a copy in its own dtype."""

    def total(self) -> int:
        """Bytes for the whole model, without the logits."""
        shape = self._shape
        casts = self._attention != self._stream
        outside = self._norm() + (shape.vocab_size * shape.hidden_size * self._attention if casts else 0)
        if self._variant.gradient_checkpointing:  # checkpointing needs the gradient of the embeddings
            return shape.layers * self._tokens * shape.hidden_size * self._stream + outside
        return shape.layers * self.block() + self._rotary() - self._not_first() + outside

    def block(self) -> int:
        """Bytes for one block at the beginning of its backward pass."""
        # The output of a quantised layer has the dtype of its input, also under autocast.
        size = self._stream if self._variant.format.is_quantised else self._attention
        gated = 3 * self._tokens * self._shape.intermediate_size * size
        total = self._family.norms * self._norm() + self._adapters() + self._attended() + gated
        if size != self._stream:
            # Autocast casts frozen weights in each product, and the backward pass needs the copies.
            total += sum(inputs * outputs for inputs, outputs in linear_widths(self._shape).values()) * self._attention
        return total

    def _norm(self) -> int:
        return self._normed(self._tokens, self._shape.hidden_size)

    def _normed(self, rows: int, wide: int) -> int:
        """Bytes for one norm over rows of this width."""
        return rows * (4 * wide + 4) + (4 * wide if self._family.shifted_norms else 0)

    def _rotary(self) -> int:
        """Bytes for cosine and sine, once for all blocks with the same rotary embedding."""
        kinds = 2 if 0 < self._family.global_every <= self._shape.layers else 1
        return kinds * 2 * self._tokens * self._shape.head_dim * self._stream

    def _not_first(self) -> int:
        """Bytes that blocks after the first save for the gradient of their input."""
        entering = sum(self._inputs["entering"])
        unwanted = self._norm() + self._variant.r * entering * self._cast_adapter
        if self._variant.lora_dropout:
            unwanted += self._tokens * self._mask * entering
        if not entering:  # nothing before the attention needs a gradient
            unwanted += self._attended() + (0 if self._inputs["attended"] else self._norm())
        return unwanted

    def _adapters(self) -> int:
        size, r = self._product, self._variant.r
        total = self._tokens * r * size * len(self._adapted)
        for stage, inputs in self._inputs.items():
            if self._variant.lora_dropout:  # the masks, and the adapters' inputs, which cannot be shared
                total += self._tokens * (self._mask + size) * sum(inputs)
            elif not self._shared:
                total += self._tokens * size * sum(inputs)
            elif stage != "attended" or self._variant.attention == "eager":
                # The adapter of the output projection shares the saved attention output, unless that is copied.
                total += self._tokens * size * max(inputs, default=0)
        if self._variant.use_dora:
            total += self._dora()
        return total + sum(r * (inputs + outputs) for inputs, outputs in self._adapted.values()) * self._cast_adapter

    def _dora(self) -> int:
        """PEFT computes the norm through the product with an identity matrix, which A saves. With dropout it multiplies
        by the frozen weight a second time, in the adapter's dtype."""
        total, dropped = 0, self._variant.lora_dropout > 0
        for inputs, outputs in self._adapted.values():
            total += self._adapter * (inputs * inputs + inputs * self._variant.r) + 12 * outputs
            total += self._tokens * outputs * (self._adapter + (self._adapter if dropped else self._stream))
            total += inputs * outputs * self._adapter if dropped and not self._shared else 0
        return total

    def _attended(self) -> int:
        """Bytes for the attention, with the query and key norms of each head in families that have them."""
        shape, size = self._shape, self._attention
        heads = (shape.heads, shape.kv_heads) if self._family.normed_heads else ()
        total = sum(self._normed(self._tokens * count, shape.head_dim) for count in heads)
        query = self._tokens * shape.heads * shape.head_dim * size
        key = self._tokens * shape.kv_heads * shape.head_dim * size
        pairs = self._rows * self._length**2
        if self._variant.attention == "eager":  # scores in float32, and again in the dtype of the values
            return total + 3 * query + pairs * shape.heads * (4 + (size if size < 4 else 0))
        total += 2 * query + self._tokens * shape.heads * 4  # the last is a logarithm per row
        if self._variant.attention == "sdpa":  # packed or padded: a mask, and keys repeated for each query head
            repeats = shape.kv_heads > 1 or size != self._stream  # with a single key/value head they are views
            return total + 2 * (query if repeats else key) + pairs * size
        return total + 2 * key
