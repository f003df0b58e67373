"""How fast a device could be at best: the vendor's own figures, each with the document that states it.

A peak is dense: figures "with sparsity" are twice as high, and a LoRA step has no sparse product. Tensor cores
accumulate in float32, as torch's products of half-precision numbers do, which on GeForce GPUs is half the rate that is
advertised. All are at the boost clock of the datasheet, which a device under load may not hold, and a GeForce GPU may
exceed. A device that is not listed by its exact name has no peak here; measure one (`lorameter.trial.profiling.peak`).

The memory of each GPU is listed too. That is what its driver says and not what it is sold as: where ECC takes
its share of GDDR6, as on an L4, a GPU that is sold with 24 GB shows 22.5 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Rate = Literal["float32", "tf32", "float16", "bfloat16", "memory"]
"""What a peak is the rate of: products in a type, in FLOP/s, or memory traffic, in bytes/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that a device can do of one thing."""

    device: str
    rate: Rate
    per_s: float
    """FLOP/s, or bytes/s for "memory"."""
    source: str
    """The vendor's document, or how it was measured."""

    def __str__(self) -> str:
        figure = f"{self.per_s / 1e9:.4g} GB/s" if self.rate == "memory" else _flops_per_s(self.per_s, self.rate)
        return f"{figure} of {self.device} ({self.source})"


def _flops_per_s(per_s: float, rate: Rate) -> str:
    return f"{per_s / 1e12:.4g} {rate} TFLOP/s" if per_s >= 1e12 else f"{per_s / 1e9:.3g} {rate} GFLOP/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePeaks:
    """What a vendor states of one device; a type that is not there does not run on tensor cores."""

    names: tuple[str, ...]
    """As NVML gives them, without "NVIDIA" or "Tesla" in front."""
    teraflops: Mapping[Rate, float]
    gigabytes_per_s: float
    source: str
    sold_gb: int
    """Memory by its name in the shops."""
    memory_mib: int
    """All memory that NVML shows of it, what the driver keeps for itself included (`MEMORY_SOURCE`)."""

    @property
    def label(self) -> str:
        """What people call it, with its memory: one of a form factor is called as the others are."""
        words = self.names[0].removeprefix("GeForce ").replace("-", " ").split()
        return f"{' '.join(words[: 2 if words[0] == 'RTX' else 1])} {self.sold_gb}GB"

    @property
    def memory_bytes(self) -> int:
        """All memory that NVML shows of it."""
        return self.memory_mib * 2**20


def _dense(half: float, tf32: float | None, float32: float, *, bfloat16: bool = True) -> dict[Rate, float]:
    rates: dict[Rate, float] = {"float32": float32, "float16": half}
    return rates | ({"bfloat16": half} if bfloat16 else {}) | ({"tf32": tf32} if tf32 else {})


MEMORY_SOURCE = "the total that nvidia-smi shows of such GPUs"
"""Of an H100, A100, A10, L40S, L4 and T4 as Modal listed them for its users (modal-labs/modal-client, pull request
2797); of the others as listings of nvidia-smi in public issues show them. Drivers before 510 showed some hundred MiB
less, those that they keep; of the V100 with 16 GB that lesser figure is the one that was found."""
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
"""Checked against quotations of the documents named; where these print figures with sparsity, half of them."""


def stated_peak(device_name: str, rate: Rate) -> Peak | None:
    """The vendor's figure for a device by its NVML name; None for a device or a type that is not listed.

    Names must match whole: an A10G is no A10, a slice of a partitioned GPU is not the GPU.
    """
    short = device_name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    for device in DEVICES:
        if short in device.names:
            tera = device.gigabytes_per_s / 1e3 if rate == "memory" else device.teraflops.get(rate)
            if tera is not None:
                return Peak(device=device_name, rate=rate, per_s=tera * 1e12, source=device.source)
    return None
