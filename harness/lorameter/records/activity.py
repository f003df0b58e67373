"""Results of a profiled trial: the names of its files, and the operators in the phases of its steps or requests."""

from __future__ import annotations

from typing import Literal

import msgspec

from lorameter.records.memory_account import MemoryPhase

ACTIVITY, TRACE, PEAKS = "activity.json", "trace.json.gz", "peaks.json"
ACCOUNTS: dict[MemoryPhase, str] = {"train": "memory-train.json", "generate": "memory-generate.json"}
"""Files of a profiled trial: what ran, the trace that it was read from, peaks, and memory by phase."""
STEP_PHASES = ("data", "forward", "backward", "update")
"""Phases of a step: taking the batch, forward, backward, clipping and the optimizer."""
REQUEST_PHASES = ("prepare", "prefill", "decode", "choose")
"""Phases of a request: what comes before its first forward pass, that pass over the prompt, the passes over one token
each, and what lies between passes and after the last: choosing a token, handing it over, getting the next one ready."""
REQUEST_FACTS, REQUEST_ACTIVITY, MERGED_ACTIVITY = "requests.json", "requests-activity.json", "merged-activity.json"
REQUEST_TRACE, MERGED_TRACE = "requests-trace.json.gz", "merged-trace.json.gz"
"""Further files of a trial with profiled requests: facts of one request, what ran in some, and the same with the
adapter merged."""
DROPOUT_OPERATOR = "aten::dropout"
"""Draws a mask and multiplies with it, by operators or kernels of its own."""
WHOLE, DROPOUT = "phase", "dropout_s"
"""Keys of `PhaseActivity.records`, in addition to field names: all of a phase, and those in `DROPOUT_OPERATOR`."""
CACHE, HEAD = "cache", "head"
"""Parts of forward passes that are timed separately: adding to the cache of keys and values, and the output head."""


class WeightCopy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies of one whole weight: inside a product that could not take the weight as it lies, or by themselves."""

    weight: str
    """Name of the weight; of several that have its shape the first and how many there are; "" where none has."""
    shape: tuple[int, ...]
    """Shape of the copy, as the operator received it."""
    operator: str
    calls: float
    time_s: float
    in_product: bool = True


class OperatorUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kernel of a GPU, or one operator of a CPU without those that it calls, in a mean step."""

    name: str
    category: str
    """As in kernels_check: "matmul", "dequantize", ..., "other"."""
    calls: float
    time_s: float


class PhaseActivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operators in one phase of a mean step, or request, under the profiler."""

    phase: str
    window_s: float
    """From border to border."""
    busy_s: float
    """Time in which anything of `operators` ran; on a GPU streams may overlap, so it can be less than their sum."""
    operators: tuple[OperatorUse, ...]
    """The longest first."""
    totals_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds of each operator by name with all that it calls; empty on a GPU, whose kernels call nothing."""
    casts_s: float = 0.0
    """Time of the copies from one type to another, and of sums and products of two types."""
    wide_products_s: float = 0.0
    """Time of the products of numbers of 32 bits."""
    dropout_backward_s: float = 0.0
    """Time of the backward pass of what `DROPOUT_OPERATOR` has made."""
    records: dict[str, float] = msgspec.field(default_factory=dict)
    """How many of the profiler's records of operators are in the phase (`WHOLE`), and in its separate parts, by
    their field names. Each slows the phase down by about as much; empty on a GPU, whose kernels are not slowed down."""
    copies: tuple[WeightCopy, ...] = ()
    """Whole weights that were copied, the most expensive first."""
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
        """Launches, or calls of operators."""
        return sum(one.calls for one in self.operators)


class Activity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operators in some steps, or requests, under the profiler, as their mean."""

    device: Literal["cpu", "cuda"]
    """Whether `operators` are operators of the host or kernels."""
    step_times_s: tuple[float, ...]
    """Each profiled step, or request."""
    phases: tuple[PhaseActivity, ...]
    missing: str = ""
    """Why it is not known what ran; empty where it is."""

    @property
    def window_s(self) -> float:
        """Time of a step from border to border, over all phases."""
        return sum(phase.window_s for phase in self.phases)

    @property
    def calls(self) -> float:
        """Launches, or calls of operators, of a step."""
        return sum(phase.calls for phase in self.phases)


LEAST_STEP_PAIRS = 8
"""Where fewer undisturbed pairs would remain, all count."""


class ModelSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights that a forward pass multiplies with and reads, counted from the modules of a model of any family.

    Elements are weights that take two FLOPs for each row; bytes are as they are stored, constants of quantisation
    included.
    """

    linear_elements: int
    """Linear layers of the base without the output head."""
    linear_bytes: int
    head_elements: int
    head_bytes: int
    adapter_elements: int
    adapter_bytes: int
    norm_bytes: int
    """Bytes read of each block in addition to its linear layers."""


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Observations of one request."""

    prompt_rows: int
    """Tokens of each prompt that the first forward pass took."""
    logit_rows: int
    """Rows of logits that the first pass made of each."""
    cache: str
    """Class of the cache of keys and values; "" where there was none."""
    cache_bytes: int
    """Its size at the end, over all prompts."""
    cache_moved: float
    """Share of the tokens at which its tensors lay elsewhere than before: they were made anew, and copied."""
    head: str
    """Name of the output head's weight; "" where the model has none."""
    size: ModelSize
