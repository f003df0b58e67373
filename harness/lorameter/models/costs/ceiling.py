"""Utilisation of a device by a training step: MFU and hardware utilisation.

Different formulas give different figures for the same step: 6 N is 1.5 times the FLOPs of LoRA, and a count with
recomputation is more than the model needs. So every figure states its formula and its peak:

- MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): FLOPs that the model needs, divided by time and peak.
  Padding, recomputation and masked pairs do not count, so it shows how well a variant uses the device for training.
- Hardware utilisation (same source): all FLOPs that the operators execute. It shows how busy the matrix products keep
  the device, and bounds the gain of a faster schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.models.costs.flops import StepTokens, six_n, training_flops
from lorameter.models.costs.modules import StepProducts
from lorameter.models.costs.peaks import Peak, Rate
from lorameter.models.shapes import ModelShape
from lorameter.studies.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSpan:
    """A time in seconds with its interval; the ends are None if it has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """A share of a peak, with its formula and the peak."""

    name: str
    value: float
    """A fraction of the peak."""
    low: float | None
    """From the upper end of the time's interval; None if it has none. The peak is treated as exact."""
    high: float | None
    formula: str
    """The formula as text, with its numbers."""
    peak: Peak

    def __str__(self) -> str:
        places = "[no interval]" if self.low is None or self.high is None else f"[{self.low:.1%}, {self.high:.1%}]"
        text = f"{self.name} {self.value:.1%} {places} = {self.formula}, peak {self.peak}"
        return f"{text}; above 100 %: {self._beyond}" if self.value > 1 else text

    @property
    def _beyond(self) -> str:
        if self.peak.rate == "memory":
            return "data in a cache is not read from memory"
        return "it ran faster than the product by which the peak was measured, which is no bound here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The utilisations of a training step."""

    mfu: Utilisation
    hfu: Utilisation
    six_n: Utilisation
    """By the formula for training all weights, which LoRA does not do; for comparison with published figures."""


def utilisation(name: str, work: int, time_s: TimeSpan, peak: Peak, formula: str) -> Utilisation:
    """`work` (FLOPs, or bytes for a memory peak) divided by the time, as a share of the peak.

    `formula` describes `work`; the time and the division are added.
    """

    def share(seconds: float | None) -> float | None:
        return work / (seconds * peak.per_s) if seconds else None

    unit = "B" if peak.rate == "memory" else "FLOP"
    return Utilisation(
        name=name,
        value=work / (time_s.value * peak.per_s),
        low=share(time_s.high),
        high=share(time_s.low),
        formula=f"{formula} ({work:.4g} {unit}) / ({time_s.value:.4g} s × peak)",
        peak=peak,
    )


def ceiling_of(
    shape: ModelShape,
    variant: Variant,
    step_time_s: TimeSpan,
    peak: Peak,
    *,
    useful: StepTokens,
    computed: StepTokens,
) -> Ceiling:
    """MFU and hardware utilisation of a variant's training step, with the interval of its step time.

    Args:
        shape: shape of the model.
        variant: the trained variant.
        step_time_s: time of one optimizer step, including all its micro-batches.
        peak: peak of matrix products in the step's dtype (`product_rate`), stated or measured.
        useful: tokens and pairs that a step needs.
        computed: tokens and pairs that its operators compute; all pairs of a row (`computed_tokens`) overestimate the
            utilisation of kernels that skip masked pairs.

    Raises:
        UsageError: the layers of the model type or of a target are unknown.
    """
    needs, does = training_flops(shape, variant, useful).model, training_flops(shape, variant, computed).hardware
    return _ceiling((needs, does, six_n(shape, useful)), step_time_s, peak, useful, computed)


def ceiling_of_products(
    products: StepProducts,
    variant: Variant,
    step_time_s: TimeSpan,
    peak: Peak,
    *,
    useful: StepTokens,
    computed: StepTokens,
) -> Ceiling:
    """The utilisation for a model of an unknown family, from the matrix products of its modules."""
    checkpointing, fused = variant.gradient_checkpointing, variant.attention != "eager"
    does = products.flops(computed, checkpointing=checkpointing, fused=fused).hardware
    work = products.flops(useful).model, does, products.six_n(useful)
    return _ceiling(work, step_time_s, peak, useful, computed, counted=", counted from the modules")


def _ceiling(
    work: tuple[int, int, int],
    step_time_s: TimeSpan,
    peak: Peak,
    useful: StepTokens,
    computed: StepTokens,
    *,
    counted: str = "",
) -> Ceiling:
    """`work` contains the FLOPs that the step needs, those that it computes, and those of training all weights."""
    needs, does, full = work
    return Ceiling(
        mfu=utilisation(
            "MFU", needs, step_time_s, peak,
            f"forward and backward of LoRA for {useful.positions} tokens and {useful.pairs} pairs a head{counted}",
        ),
        hfu=utilisation(
            "HFU", does, step_time_s, peak,
            f"all products for {computed.positions} tokens and {computed.pairs} pairs a head, recomputed ones "
            f"included{counted}",
        ),
        six_n=utilisation(
            "6N", full, step_time_s, peak,
            f"6 × weights × {useful.positions} tokens, which LoRA does not compute",
        ),
    )  # fmt: skip


def product_rate(variant: Variant) -> Rate:
    """The dtype of most of a step's matrix products: that of the frozen layers.

    An adapter that PEFT keeps in float32 computes in float32, which has a lower peak, unless autocast is on: a step
    with a large rank cannot reach the peak of this dtype. int8 has no single peak (8 bits forward, 16 backward); its
    16-bit dtype is used.
    """
    dtype = variant.compute_dtype if variant.is_4bit else variant.autocast or variant.dtype
    return "tf32" if dtype == "float32" and variant.tf32 else dtype
