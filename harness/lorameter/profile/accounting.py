"""The account of a profile: the time of a step or a request divided into lines, its tokens, and its share of the peak.

The lines of a step or request are medians of separately timed phases, and the step is the median of plain steps that
alternated with them, so the lines need not add up to the step. The difference is a line of its own (the remainder),
which includes the cost of the borders: if it is large, the phases are not reliable. Its interval is a bootstrap over
pairs of all these medians together.

A pass over the prompt multiplies each weight by many rows and is compute-bound; a single-token pass reads each weight
for one row per prompt and is memory-bound. The account has both figures for both. Products and reads are counted from
the modules of the model, so that every family is supported; only the products of attention need the model's dimensions,
and are omitted if its files do not contain them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.models.costs.flops import (
    StepProducts,
    StepTokens,
    TrainingFlops,
    computed_tokens,
    from_values,
    mean_context,
    row_tokens,
)
from lorameter.models.costs.peaks import Ceiling, Peak, Utilisation, find_ceiling, utilisation
from lorameter.profile.facts import Profile, RequestProfile, TrialProfile
from lorameter.records.activity import MIN_STEP_PAIRS, WHOLE, PhaseActivity
from lorameter.stats import Estimate, bootstrap_interval, median_interval
from lorameter.studies.variant import Variant
from lorameter.verdicts.series import OCCUPANCY_FLOOR

REMAINDER_LIMIT = 0.02
"""Share of the step above which its phases do not explain it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleNames:
    """Names of the samples of a step or request (`lorameter.trial.profiling.phases.pair_times`), and their titles."""

    unit: str
    phases: Mapping[str, str]
    between: str
    """Work between two steps or requests."""
    prefix: str = ""


STEPS = SampleNames(
    unit="step",
    phases={
        "data": "data: taking the batch",
        "forward": "forward",
        "backward": "backward",
        "update": "clipping and optimizer",
    },
    between="reading the loss and storing the times",
)
SERVED = SampleNames(
    unit="request",
    phases={
        "prepare": "before the first forward pass",
        "prefill": "prefill: the pass over the prompt",
        "decode": "decode: passes over one token",
        "choose": "between passes and after the last",
    },
    between="storing its times",
)
MERGED = dataclasses.replace(SERVED, prefix="merged_")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAccount:
    """The time of a step or a request by its phases, in seconds.

    Attributes:
        step: time of a plain step.
        phases: time of each phase, by name.
        between: time from the end of a step to the beginning of the next; not a part of the step.
        borders: additional time of a step with borders, over pairs of neighbours.
        remainder: the step minus its phases; negative if the phases add up to more.
        covered: share of a bordered step that its own phases cover; a disturbance affects both alike.
        profiler_slowdown: time of a step under the profiler over that of a plain step, whose median is treated as
            exact.
        occupancy: CPU time over wall time of all steps, per thread; None on a GPU, because the host waits for it.
        pairs: number of pairs of a plain and a bordered step.
        counted: number of undisturbed pairs, or all pairs if these are too few.
    """

    step: Estimate
    phases: dict[str, Estimate]
    between: Estimate
    borders: Estimate
    remainder: Estimate
    covered: Estimate
    profiler_slowdown: Estimate
    occupancy: float | None
    pairs: int
    counted: int

    @property
    def explained(self) -> bool | None:
        """Whether the phases explain the step: the remainder's interval is inside the limit, or outside it; None if
        inconclusive."""
        limit, found = REMAINDER_LIMIT * self.step.value, self.remainder
        low, high = (found.value if end is None else end for end in (found.low, found.high))
        if -limit <= low and high <= limit:
            return True
        return False if high < -limit or low > limit else None


def step_account(profile: TrialProfile, names: SampleNames = STEPS) -> StepAccount:
    """The account of a profile's step, or of the kind of call in `names`."""
    samples, prefix, what = profile.record.samples, names.prefix, names.unit
    plain, bordered = (counted_samples(profile, f"{kind}_{what}_time_s", names) for kind in ("plain", "bordered"))
    step = median_interval(plain)
    phases = [counted_samples(profile, f"phase_{phase}_s", names) for phase in names.phases]
    sums = [sum(times) for times in zip(*phases, strict=True)]
    low, high = bootstrap_interval((plain, *phases), _remainder)
    everything = range(_pairs(profile, names))
    return StepAccount(
        step=step,
        phases=dict(zip(names.phases, map(median_interval, phases), strict=True)),
        remainder=Estimate(value=float(_remainder(plain, *phases)), low=low, high=high),
        between=median_interval(samples[f"{prefix}between_{what}s_s"]),
        borders=median_interval([slow - fast for fast, slow in zip(plain, bordered, strict=True)]),
        covered=median_interval([part / whole for part, whole in zip(sums, bordered, strict=True)]),
        profiler_slowdown=median_interval([slow / step.value for slow in profile.activity.step_times_s]),
        occupancy=_occupancy(profile, everything, names) if profile.device == "cpu" else None,
        pairs=len(everything),
        counted=len(plain),
    )


def _remainder(step: Any, *phases: Any, axis: int = -1) -> Any:
    """The median of the steps minus those of the phases."""
    import numpy as np

    return np.median(step, axis=axis) - sum(np.median(phase, axis=axis) for phase in phases)


def counted_samples(profile: TrialProfile, name: str, names: SampleNames = STEPS) -> list[float]:
    """Samples with one value per pair of a plain and a bordered step, by name without prefix; only those of the pairs
    that count: on a CPU, those without contention.

    The criterion is the occupancy, which is independent of the times. All pairs count if too few would remain, on a GPU
    (the host waits for it), and with several threads (they wait for each other).
    """
    samples = profile.record.samples[f"{names.prefix}{name}"]
    if profile.device == "cpu" and profile.threads <= 1:
        pairs = range(_pairs(profile, names))
        quiet = [pair for pair in pairs if _occupancy(profile, (pair,), names) >= OCCUPANCY_FLOOR]
        if len(quiet) >= MIN_STEP_PAIRS:
            return [samples[pair] for pair in quiet]
    return list(samples)


def _pairs(profile: TrialProfile, names: SampleNames) -> int:
    return len(profile.record.samples[f"{names.prefix}plain_{names.unit}_time_s"])


def _occupancy(profile: TrialProfile, pairs: Sequence[int], names: SampleNames) -> float:
    """CPU time over wall time of pairs, per thread; the lower value of plain and bordered steps."""
    samples = profile.record.samples
    stems = (f"{names.prefix}{kind}_{names.unit}" for kind in ("plain", "bordered"))
    shares = (
        sum(samples[f"{stem}_cpu_time_s"][index] for index in pairs)
        / sum(samples[f"{stem}_time_s"][index] for index in pairs)
        for stem in stems
    )
    return min(shares) / max(1, profile.threads)


IDLE = "idle"
"""A separate category: the device waits, or the interpreter is between operators."""


def categories_s(profile: TrialProfile, step: StepAccount) -> dict[str, dict[str, float]]:
    """Seconds of each category in each phase of a plain step, the largest category first and `IDLE` last; empty if the
    operators are unknown."""
    if profile.activity.missing:
        return {}
    found: dict[str, dict[str, float]] = {}
    for phase in profile.activity.phases:
        idle = max(0.0, step.phases[phase.phase].value - plain_s(profile, step, phase, phase.busy_s))
        times = {category: plain_s(profile, step, phase, seconds) for category, seconds in phase.categories_s.items()}
        for category, seconds in {**times, IDLE: idle}.items():
            found.setdefault(category, dict.fromkeys(step.phases, 0.0))[phase.phase] = seconds
    return dict(sorted(found.items(), key=lambda pair: (pair[0] == IDLE, -sum(pair[1].values()))))


def plain_s(
    profile: TrialProfile, step: StepAccount, phase: PhaseActivity, seconds: float, *, records: float | None = None
) -> float:
    """Convert seconds of a phase under the profiler into seconds of a plain step.

    On a GPU, recording does not change the time of a kernel. On a CPU the profiler slows down what it records: if the
    number of `records` in those seconds is known, each is assumed to cost the phase's mean cost of a record, else the
    share of the phase is kept.
    """
    if profile.activity.device == "cuda":
        return seconds
    plain, whole = step.phases[phase.phase].value, phase.records.get(WHOLE)
    if records is None or not whole:
        return seconds * plain / phase.window_s if phase.window_s else 0.0
    return max(0.0, seconds - records * max(0.0, phase.window_s - plain) / whole)


def unprofiled_time(
    profile: TrialProfile,
    step: StepAccount,
    seconds: Callable[[PhaseActivity], float],
    *counters: str,
    only: str = "",
) -> float:
    """Seconds of a plain step that correspond to `seconds` of each of its phases under the profiler, or of the `only`
    phase; `counters` are the names of the profiler's records in them, if these are counted."""
    return sum(
        plain_s(
            profile,
            step,
            phase,
            seconds(phase),
            records=sum(phase.records.get(name, 0.0) for name in counters) if counters else None,
        )
        for phase in profile.activity.phases
        if phase.phase == (only or phase.phase)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShares:
    """Positions of a step, in tokens; shares are of all positions in the forward pass, including recomputed ones."""

    real: float
    padded: float
    recomputed: float
    """Positions that checkpointing recomputes."""

    @property
    def total(self) -> float:
        """All positions."""
        return self.real + self.padded + self.recomputed


def token_shares(profile: Profile) -> TokenShares:
    """Positions of a mean step: real ones as counted in the data, recomputed ones as observed by the check."""
    positions = computed_tokens(profile.variant, profile.workload).positions
    real = profile.record.values["useful_positions"]
    again = float(positions) if find_observed(profile, "checkpointing") is True else 0.0
    return TokenShares(real=real, padded=positions - real, recomputed=again)


SKIPPING_KERNELS = frozenset({"flash", "flash_attention_2", "flash_attention_3", "flash_attention_4", "cudnn"})
"""Attention kernels that skip blocks hidden by the causal order, if they receive no mask tensor."""


def count_executed_tokens(profile: Profile, useful: StepTokens) -> StepTokens:
    """The tokens and pairs that the operators of a step compute, given the observed attention.

    The pairs are all pairs of a row, unless the kernel skips: then they are those of the causal order and, for packed
    rows with flash-attn, only those within each record. A kernel skips whole blocks, so it computes somewhat more.
    """
    every = computed_tokens(profile.variant, profile.workload)
    backend, mask = find_observed(profile, "attention.backend"), find_observed(profile, "attention.mask")
    if backend not in SKIPPING_KERNELS or mask != "causal":
        return every
    if profile.workload.layout == "packed" and str(backend).startswith("flash_attention"):
        return dataclasses.replace(every, pairs=useful.pairs)
    return dataclasses.replace(every, pairs=row_tokens(profile.variant, profile.workload).pairs)


def find_observed(profile: TrialProfile, path: str) -> Any:
    """The observed value of a path of kernels_check; None if there is none."""
    return next((check["observed"] for check in profile.record.checks if check["path"] == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Training throughput relative to the peak of the device."""

    train: Ceiling
    flops: TrainingFlops
    """FLOPs that the operators execute."""


def step_flops(products: StepProducts, variant: Variant, tokens: StepTokens) -> TrainingFlops:
    """FLOPs of a variant's step over these tokens, given the products that the trial has counted."""
    return products.flops(tokens, checkpointing=variant.gradient_checkpointing, fused=variant.attention != "eager")


def compute_ceilings(profile: Profile, step: Estimate) -> Ceilings | str:
    """MFU and HFU of the step; or the reason if the products of a step or the peak are unknown."""
    if "product" not in profile.peaks:
        return (
            f"the peak of {profile.device_name} is not known, and the trial left too little memory to measure it: "
            "product"
        )
    variant, values = profile.variant, profile.record.values
    products = from_values(values)
    if products is None:
        return "the trial could not count the products of a step from the modules of the model"
    useful = StepTokens(
        positions=round(values["useful_positions"]),
        pairs=round(values["useful_pairs"]),
        passes=variant.gradient_accumulation,
    )
    executed = count_executed_tokens(profile, useful)
    train = find_ceiling(
        step_flops(products, variant, useful).model,
        step_flops(products, variant, executed).hardware,
        products.six_n(useful),
        step,
        profile.peaks["product"],
        useful=useful,
        computed=executed,
    )
    reached = max(train.mfu.value, train.hfu.value)
    if reached > 1:
        return (
            f"the step itself reaches {reached:.2f} times the peak {train.mfu.peak}: that is no peak, so there is no "
            "MFU"
        )
    return Ceilings(train=train, flops=step_flops(products, variant, computed_tokens(variant, profile.workload)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAccount:
    """One forward pass: over the prompts, or over one later token of each prompt."""

    time: Estimate
    """Time of the pass; for single-token passes the mean over a request."""
    calls: float | None
    """Kernels launched, or operators called, in the pass; None if the operators are unknown."""
    flops: int
    bytes: int
    """Bytes that the pass must read from memory."""
    mfu: Utilisation | None
    """None if the peak is unknown, or below what the pass reaches."""
    mbu: Utilisation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccount:
    """A request's time by its phases, and its two kinds of passes."""

    whole: StepAccount
    first_token: Estimate
    token: Estimate
    """Time per token after the first."""
    passes: int
    """Number of single-token passes in a request."""
    prefill: PassAccount
    decode: PassAccount


def request_accounts(profile: RequestProfile) -> tuple[RequestAccount, RequestAccount | None]:
    """The account of a profile's requests as the variant serves them, and with the adapter merged; None if the variant
    itself serves it merged."""
    merged = profile.merged
    return _account(profile, SERVED), None if merged is None else _account(merged, MERGED)


def _account(profile: RequestProfile, names: SampleNames) -> RequestAccount:
    merged = names is MERGED or profile.variant.merge_adapter
    whole, facts = step_account(profile, names), profile.facts
    passes = profile.workload.new_tokens - 1
    return RequestAccount(
        whole=whole,
        first_token=median_interval(counted_samples(profile, "first_token_time_s", names)),
        token=median_interval(counted_samples(profile, "time_per_output_token_s", names)),
        passes=passes,
        prefill=_pass_account(
            profile, whole, "prefill", 1, rows=facts.prompt_rows, logit_rows=facts.logit_rows, context=0, merged=merged
        ),
        decode=_pass_account(
            profile, whole, "decode", passes, rows=1, logit_rows=1, context=mean_context(profile.workload),
            merged=merged,
        ),
    )  # fmt: skip


def _pass_account(
    profile: RequestProfile,
    whole: StepAccount,
    phase: str,
    count: int,
    *,
    rows: int,
    logit_rows: int,
    context: int,
    merged: bool,
) -> PassAccount:
    """The mean of the `count` passes in a phase.

    `rows` and `logit_rows` are per prompt; `context` is the number of positions to which the row of a later pass
    attends, 0 for the pass over the prompts.
    """
    span, activity = whole.phases[phase], profile.activity
    low, high = (None if end is None else end / count for end in (span.low, span.high))
    time = Estimate(value=span.value / count, low=low, high=high)
    calls = next((one.calls / count for one in activity.phases if one.phase == phase), None)
    size, shape, facts = profile.facts.size, profile.shape, profile.facts
    prompts = profile.workload.request_batch
    pairs = prompts * (context or rows * (rows + 1) // 2)
    rows, logit_rows = prompts * rows, prompts * logit_rows
    attention = 0 if shape is None else 4 * shape.layers * shape.heads * shape.head_dim * pairs
    weights = size.linear_elements + (0 if merged else size.adapter_elements)
    flops = 2 * rows * weights + 2 * logit_rows * size.head_elements + attention
    positions = profile.workload.prompt_tokens + profile.workload.new_tokens - 1
    cache = facts.cache_bytes * min(context, positions) // positions
    read = size.linear_bytes + size.head_bytes + size.norm_bytes + (0 if merged else size.adapter_bytes) + cache
    product, memory = profile.peaks.get("product"), profile.peaks.get("memory")
    without_attention = "" if shape is not None else ", without attention"
    formula = f"{rows} rows through the weights, {logit_rows} of logits, {pairs} pairs a head{without_attention}"
    return PassAccount(
        time=time,
        calls=None if activity.missing else calls,
        flops=flops,
        bytes=read,
        mfu=_utilisation("MFU", flops, time, product, formula),
        mbu=_utilisation("MBU", read, time, memory, "weights as stored, keys and values"),
    )


def _utilisation(name: str, work: int, time: Estimate, peak: Peak | None, formula: str) -> Utilisation | None:
    """The share of a peak; None without a peak, and if the pass is faster, which shows that it is no peak."""
    found = None if peak is None else utilisation(name, work, time, peak, formula)
    return None if found is None or found.value > 1 else found
