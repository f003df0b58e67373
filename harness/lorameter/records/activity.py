"""Results of a profiled trial: its file names, and the operators in the phases of its steps or requests."""

from __future__ import annotations

from typing import Literal

import msgspec

from lorameter.records.record import MemoryPhase

ACTIVITY, TRACE, PEAKS = "activity.json", "trace.json.gz", "peaks.json"
ACCOUNTS: dict[MemoryPhase, str] = {"train": "memory-train.json", "generate": "memory-generate.json"}
"""Files of a profiled trial: operators, their trace, peaks, and memory by phase."""
STEP_PHASES = ("data", "forward", "backward", "update")
"""Phases of a step: loading the batch, forward, backward, and update (clipping and optimizer)."""
REQUEST_PHASES = ("prepare", "prefill", "decode", "choose")
"""Phases of a request: before the first forward pass, the pass over the prompt, the single-token passes, and the time
between and after passes (choosing a token, returning it, preparing the next)."""
REQUEST_FACTS, REQUEST_ACTIVITY, MERGED_ACTIVITY = "requests.json", "requests-activity.json", "merged-activity.json"
REQUEST_TRACE, MERGED_TRACE = "requests-trace.json.gz", "merged-trace.json.gz"
"""Further files of a trial with profiled requests: facts of one request, operators in some requests, and the same with
the adapter merged."""
DROPOUT_OPERATOR = "aten::dropout"
"""Draws a mask and multiplies by it, with separate operators or kernels."""
WHOLE, DROPOUT = "phase", "dropout_s"
"""Keys of `PhaseActivity.records`, in addition to field names: the whole phase, and the part in `DROPOUT_OPERATOR`."""
CACHE, HEAD = "cache", "head"
"""Parts of forward passes that are timed separately: adding to the key/value cache, and the output head."""


class WeightCopy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies of one whole weight: inside a product that needs another layout, or separate ones."""

    weight: str
    """Name of the weight; if several weights have its shape, the first and their number; "" if none has."""
    shape: tuple[int, ...]
    """Shape of the copy, as received by the operator."""
    operator: str
    calls: float
    time_s: float
    in_product: bool = True


class OperatorUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU kernel, or one CPU operator without the operators that it calls, in a mean step."""

    name: str
    category: str
    """Category of kernels_check: "matmul", "dequantize", ..., "other"."""
    calls: float
    time_s: float


class PhaseActivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operators in one phase of a mean step or request, under the profiler."""

    phase: str
    window_s: float
    """Time from border to border."""
    busy_s: float
    """Time in which any of the `operators` ran; GPU streams may overlap, so it can be less than the sum of the
    operators."""
    operators: tuple[OperatorUse, ...]
    """Operators, the longest first."""
    totals_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds of each operator by name, including the operators that it calls; empty on a GPU, whose kernels call
    nothing."""
    casts_s: float = 0.0
    """Time of copies from one dtype to another, and of sums and products of two dtypes."""
    wide_products_s: float = 0.0
    """Time of 32-bit matrix products."""
    dropout_backward_s: float = 0.0
    """Time of the backward pass of `DROPOUT_OPERATOR`."""
    records: dict[str, float] = msgspec.field(default_factory=dict)
    """Number of the profiler's operator records in the phase (`WHOLE`) and in its separate parts, by field name. Each
    record slows the phase down by about the same time; empty on a GPU, whose kernels are not slowed down."""
    copies: tuple[WeightCopy, ...] = ()
    """Copies of whole weights, the most expensive first."""
    parts_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds of parts of the phase (`CACHE`, `HEAD`)."""

    @property
    def categories_s(self) -> dict[str, float]:
        """Seconds of each category, the largest first."""
        sums: dict[str, float] = {}
        for one in self.operators:
            sums[one.category] = sums.get(one.category, 0.0) + one.time_s
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))

    @property
    def calls(self) -> float:
        """Number of kernel launches or operator calls."""
        return sum(one.calls for one in self.operators)


class Activity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean operators of some steps or requests under the profiler."""

    device: Literal["cpu", "cuda"]
    """Whether `operators` are CPU operators or GPU kernels."""
    step_times_s: tuple[float, ...]
    """Time of each profiled step or request."""
    phases: tuple[PhaseActivity, ...]
    missing: str = ""
    """Why the operators are unknown; empty if they are known."""

    @property
    def window_s(self) -> float:
        """Time of a step from border to border, over all phases."""
        return sum(phase.window_s for phase in self.phases)

    @property
    def calls(self) -> float:
        """Number of kernel launches or operator calls in a step."""
        return sum(phase.calls for phase in self.phases)


MIN_STEP_PAIRS = 8
"""Minimum undisturbed pairs of a plain and a profiled step; if fewer would remain, all pairs count."""


class ModelSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights that a forward pass multiplies by and reads, counted from the modules of a model of any family.

    Elements are weights that need two FLOPs per row; bytes are the stored size, including quantisation constants.
    """

    linear_elements: int
    """Weights of the base's linear layers without the output head."""
    linear_bytes: int
    head_elements: int
    head_bytes: int
    adapter_elements: int
    adapter_bytes: int
    norm_bytes: int
    """Bytes that each block reads in addition to its linear layers."""


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Observations of one request."""

    prompt_rows: int
    """Tokens of each prompt in the first forward pass."""
    logit_rows: int
    """Rows of logits that the first pass computed for each prompt."""
    cache: str
    """Class of the key/value cache; "" if there was none."""
    cache_bytes: int
    """Size of the cache at the end, over all prompts."""
    cache_moved: float
    """Share of the tokens at which the cache's tensors were reallocated and copied."""
    head: str
    """Name of the output head's weight; "" if the model has none."""
    size: ModelSize
