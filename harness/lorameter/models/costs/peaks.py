"""Peak rates of devices, each with its source, and the share of the peak that a training step reaches.

A peak is dense: figures "with sparsity" are twice as high, and a LoRA step has no sparse product. Tensor cores
accumulate in float32, as torch's products of half-precision numbers do, which on GeForce GPUs is half the rate that is
advertised. All figures are for the boost clock of the datasheet, which a device under load may not sustain, and which a
GeForce GPU may exceed. A device that is not listed by its exact name has no peak here; measure one
(`lorameter.trial.profiling.trial`).

The memory of each GPU is the amount that its driver shows, not the amount in the product's name: if ECC uses a part of
GDDR6, as on an L4, a GPU with nominally 24 GB shows 22.5 GiB. The driver reserves a part of it, and CUDA's context and
libraries another part. This project did not measure the last two; they are called assumptions wherever they are used.

Different formulas give different figures for the utilisation by the same step: 6 N is 1.5 times the FLOPs of LoRA, and
a count with recomputation is more than the model needs. So every figure states its formula and its peak:

- MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): FLOPs that the model needs, divided by time and peak.
  Padding, recomputation and masked pairs do not count, so it shows how well a variant uses the device for training.
- Hardware utilisation (same source): all FLOPs that the operators execute. It shows how busy the matrix products keep
  the device, and bounds the gain of a faster schedule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorameter.errors import require, shorten
from lorameter.models.costs.flops import StepTokens
from lorameter.stats import Estimate
from lorameter.studies.variant import Variant

Rate = Literal["float32", "tf32", "float16", "bfloat16", "memory"]
"""Dtype of matrix products (in FLOP/s), or memory traffic (in bytes/s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The peak rate of a device for one kind of work."""

    device: str
    rate: Rate
    per_s: float
    """FLOP/s, or bytes/s for "memory"."""
    source: str
    """The vendor's document, or the method of measurement."""

    def __str__(self) -> str:
        figure = f"{self.per_s / 1e9:.3g} {self.rate} GFLOP/s"
        if self.rate == "memory":
            figure = f"{self.per_s / 1e9:.4g} GB/s"
        elif self.per_s >= 1e12:
            figure = f"{self.per_s / 1e12:.4g} {self.rate} TFLOP/s"
        return f"{figure} of {self.device} ({self.source})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePeaks:
    """A vendor's figures for one device; dtypes without tensor cores are missing."""

    names: tuple[str, ...]
    """Names from NVML, without the prefix "NVIDIA" or "Tesla"."""
    teraflops: Mapping[Rate, float]
    gigabytes_per_s: float
    source: str
    sold_gb: int
    """Memory in the product's name."""
    memory_mib: int
    """Total memory shown by NVML, including the driver's own part (`MEMORY_SOURCE`)."""

    @property
    def label(self) -> str:
        """The common name with the memory, without the form factor."""
        words = self.names[0].removeprefix("GeForce ").replace("-", " ").split()
        return f"{' '.join(words[: 2 if words[0] == 'RTX' else 1])} {self.sold_gb}GB"


def _dense(half: float, tf32: float | None, float32: float, *, bfloat16: bool = True) -> dict[Rate, float]:
    rates: dict[Rate, float] = {"float32": float32, "float16": half}
    return rates | ({"bfloat16": half} if bfloat16 else {}) | ({"tf32": tf32} if tf32 else {})


MEMORY_SOURCE = "the total that nvidia-smi shows of such GPUs"
"""For H100, A100, A10, L40S, L4 and T4, from a list that Modal published for its users (modal-labs/modal-client, pull
request 2797); for the others, from nvidia-smi listings in public issues. Drivers before 510 showed some hundred MiB
less, which they reserve; for the V100 with 16 GB only that smaller figure was found."""
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 3; bandwidth: NVIDIA H100 datasheet"
_V100 = "NVIDIA V100 Tensor Core GPU datasheet"
DEVICES: tuple[DevicePeaks, ...] = (
    DevicePeaks(
        names=("A100-SXM4-40GB", "A100-PCIE-40GB"), teraflops=_dense(312, 156, 19.5), gigabytes_per_s=1555,
        sold_gb=40, memory_mib=40960, source=_A100,
    ),
    DevicePeaks(
        names=("A100-SXM4-80GB",), teraflops=_dense(312, 156, 19.5), gigabytes_per_s=2039,
        sold_gb=80, memory_mib=81920, source=_A100,
    ),
    DevicePeaks(
        names=("A100 80GB PCIe",), teraflops=_dense(312, 156, 19.5), gigabytes_per_s=1935,
        sold_gb=80, memory_mib=81920, source=_A100,
    ),
    DevicePeaks(
        names=("H100 80GB HBM3",), teraflops=_dense(989.4, 494.7, 66.9), gigabytes_per_s=3350,
        sold_gb=80, memory_mib=81559, source=_H100,
    ),
    DevicePeaks(
        names=("H100 PCIe",), teraflops=_dense(756, 378, 51.2), gigabytes_per_s=2000,
        sold_gb=80, memory_mib=81559, source=_H100,
    ),
    DevicePeaks(
        names=("H200",), teraflops=_dense(989.4, 494.7, 66.9), gigabytes_per_s=4800,
        sold_gb=141, memory_mib=143771, source="NVIDIA H200 datasheet, whose products are those of the H100 SXM",
    ),
    DevicePeaks(
        names=("L4",), teraflops=_dense(121, 60, 30.3), gigabytes_per_s=300,
        sold_gb=24, memory_mib=23034, source="NVIDIA L4 datasheet, halved: dense",
    ),
    DevicePeaks(
        names=("L40S",), teraflops=_dense(362.05, 183, 91.6), gigabytes_per_s=864,
        sold_gb=48, memory_mib=46068, source="NVIDIA L40S datasheet",
    ),
    DevicePeaks(
        names=("A10",), teraflops=_dense(125, 62.5, 31.2), gigabytes_per_s=600,
        sold_gb=24, memory_mib=23028, source="NVIDIA A10 datasheet",
    ),
    DevicePeaks(
        names=("GeForce RTX 3090",), teraflops=_dense(71, 35.6, 35.6), gigabytes_per_s=936,
        sold_gb=24, memory_mib=24576,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A, float32 accumulate",
    ),
    DevicePeaks(
        names=("GeForce RTX 4090",), teraflops=_dense(165.2, 82.6, 82.6), gigabytes_per_s=1008,
        sold_gb=24, memory_mib=24564, source="NVIDIA Ada GPU Architecture whitepaper, appendix A, float32 accumulate",
    ),
    DevicePeaks(
        names=("GeForce RTX 5090",), teraflops=_dense(209.5, None, 104.8), gigabytes_per_s=1792,
        sold_gb=32, memory_mib=32607, source="NVIDIA RTX Blackwell GPU Architecture whitepaper, float32 accumulate",
    ),
    DevicePeaks(
        names=("T4",), teraflops=_dense(65, None, 8.1, bfloat16=False), gigabytes_per_s=320,
        sold_gb=16, memory_mib=15360, source="NVIDIA T4 Tensor Core GPU datasheet",
    ),
    DevicePeaks(
        names=("V100-SXM2-16GB",), teraflops=_dense(125, None, 15.7, bfloat16=False), gigabytes_per_s=900,
        sold_gb=16, memory_mib=16160, source=_V100,
    ),
    DevicePeaks(
        names=("V100-SXM2-32GB",), teraflops=_dense(125, None, 15.7, bfloat16=False), gigabytes_per_s=900,
        sold_gb=32, memory_mib=32768, source=_V100,
    ),
    DevicePeaks(
        names=("V100-PCIE-16GB",), teraflops=_dense(112, None, 14, bfloat16=False), gigabytes_per_s=900,
        sold_gb=16, memory_mib=16160, source=_V100,
    ),
    DevicePeaks(
        names=("V100-PCIE-32GB",), teraflops=_dense(112, None, 14, bfloat16=False), gigabytes_per_s=900,
        sold_gb=32, memory_mib=32768, source=_V100,
    ),
)  # fmt: skip
"""Checked against quotations of these documents; half of the figures with sparsity."""


def stated_peak(device_name: str, rate: Rate) -> Peak | None:
    """The vendor's figure for a device by its NVML name; None for a device or a dtype that is not listed.

    Names must match completely: an A10G is not an A10, and a MIG slice is not the whole GPU.
    """
    short = device_name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    for device in DEVICES:
        if short in device.names:
            tera_per_s = device.gigabytes_per_s / 1e3 if rate == "memory" else device.teraflops.get(rate)
            if tera_per_s is not None:
                return Peak(device=device_name, rate=rate, per_s=tera_per_s * 1e12, source=device.source)
    return None


# --- GPUs by name or memory -------------------------------------------------------------------------------------------


DRIVER_SHARE = 0.02
"""Share of the memory shown by nvidia-smi that no process can allocate. torch's out-of-memory messages state a total of
23.52 to 23.68 GiB for an RTX 4090 (23.99 shown), 31.36 for an RTX 5090 (31.84), 44.42 for an L40S (44.99): 1.3 to 2.0 %
less (issues of Soul-AILab/SoulX-FlashTalk, zai-org/CogVideo, TrajectoryCrafter/TrajectoryCrafter and
stepfun-ai/Step-Video-T2V)."""
DRIVER_SOURCE = "torch's messages of an out-of-memory show 1.3 to 2.0 % less than nvidia-smi"
UNITS = {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_REMEDY = "Give a size with its unit, as 24GiB or 24GB (of 10^9 bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """A GPU for a memory estimate."""

    name: str
    """The requested size, or the common name."""
    device_name: str
    """The name in NVML; "" if only a size is known."""
    total_bytes: int
    """Total memory that nvidia-smi shows."""
    source: str
    """The source of `total_bytes`."""

    @property
    def usable_bytes(self) -> int:
        """Bytes for processes: an assumption (`DRIVER_SHARE`)."""
        return int(self.total_bytes * (1 - DRIVER_SHARE))


def find_gpu(text: str) -> GpuSpec:
    """The GPU of `--gpu`: a size with its unit, or a name of `lorameter.models.costs.peaks.DEVICES`.

    A name matches by its words ("H100", "RTX 4090", "4090", "A100 80GB") or as the full name in nvidia-smi. A similarly
    named GPU (an A10G, a laptop's RTX 4090) does not match.

    Raises:
        UsageError: the text is neither a size nor a name, or GPUs of this name differ in memory.
    """
    size, where = _SIZE.fullmatch(text.strip()), f"--gpu {shorten(repr(text), 60)}"
    if size is not None and size[2].lower() in UNITS:
        total = int(float(size[1]) * UNITS[size[2].lower()])
        require(total, f"{where}: no memory. {_REMEDY}.")
        return GpuSpec(name=" ".join(text.split()), device_name="", total_bytes=total, source="as given")
    matches = [device for device in DEVICES if _has_name(device, text)]
    require(matches, f"{where}: no known GPU or unit. Known: {_list(DEVICES)}. {_REMEDY}, for any other.")
    require(
        len({device.memory_mib for device in matches}) == 1,
        f"{where}: several GPUs have this name, with different memory. Name one: {_list(matches)}.",
    )
    first = matches[0]
    total = first.memory_mib * 2**20
    return GpuSpec(name=first.label, device_name=first.names[0], total_bytes=total, source=MEMORY_SOURCE)


def _list(devices: Iterable[DevicePeaks]) -> str:
    return ", ".join(dict.fromkeys(device.label for device in devices))


def _has_name(device: DevicePeaks, text: str) -> bool:
    """Whether all words of the text are in one of the device's names, or its memory size, which alone names no GPU."""
    words = _words(text) - {f"{device.sold_gb}{unit}" for unit in ("", "gb", "gib")}
    return bool(words) and any(words <= _words(name) for name in device.names)


def _words(text: str) -> set[str]:
    spaced = re.sub(r"\b(rtx|geforce)(?=\d)", r"\1 ", text.lower())
    return set(re.findall(r"[\w.+]+", spaced)) - {"nvidia", "tesla"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation(Estimate):
    """A fraction of a peak, with its formula and the peak. The peak is exact: the interval is that of the time."""

    name: str
    formula: str
    """The formula as text, with its numbers."""
    peak: Peak

    def __str__(self) -> str:
        places = "[no interval]" if self.low is None or self.high is None else f"[{self.low:.1%}, {self.high:.1%}]"
        return f"{self.name} {self.value:.1%} {places} = {self.formula}, peak {self.peak}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The utilisations of a training step."""

    mfu: Utilisation
    hfu: Utilisation
    six_n: Utilisation
    """By the formula for training all weights, which LoRA does not do; for comparison with published figures."""


def utilisation(name: str, work: int, time_s: Estimate, peak: Peak, formula: str) -> Utilisation:
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


def find_ceiling(
    needs: int,
    does: int,
    full: int,
    step_time_s: Estimate,
    peak: Peak,
    *,
    useful: StepTokens,
    computed: StepTokens,
) -> Ceiling:
    """MFU and hardware utilisation of a training step, with the interval of its step time.

    Args:
        needs: FLOPs that the step needs, for the `useful` tokens.
        does: FLOPs that its operators execute, for the `computed` tokens.
        full: FLOPs of training all weights, for the `useful` tokens.
        step_time_s: time of one optimizer step, including all its micro-batches.
        peak: peak of matrix products in the step's dtype (`product_rate`), stated or measured.
        useful: tokens and pairs that a step needs.
        computed: tokens and pairs that its operators compute; all pairs of a row (`computed_tokens`) overestimate the
            utilisation of kernels that skip masked pairs.
    """
    return Ceiling(
        mfu=utilisation(
            "MFU", needs, step_time_s, peak,
            f"forward and backward of LoRA for {useful.positions} tokens and {useful.pairs} pairs a head",
        ),
        hfu=utilisation(
            "HFU", does, step_time_s, peak,
            f"all products for {computed.positions} tokens and {computed.pairs} pairs a head, recomputed ones "
            "included",
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
    dtype = variant.product_dtype
    return "tf32" if dtype == "float32" and variant.tf32 else dtype
