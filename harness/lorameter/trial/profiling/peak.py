"""What a device does at best when nothing else is asked of it: a large product, a large copy, the best of several.

A vendor's figure is at a clock that a device may not hold, and a CPU has none. A measured peak is what this device does
with these threads and this library on the friendliest shape. The best try counts, because whatever disturbs can only
slow it down. So it is a lower bound of the true peak, and a share of it an upper bound of the true share.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from lorameter.errors import LorameterError
from lorameter.models.costs.peaks import Peak, Rate
from lorameter.records.units import format_count
from lorameter.trial.clock import Stopwatch

CPU_SIZES = (512, 1024)
"""Widths of square products: one that the second-level cache holds, and one that it does not."""
CUDA_SIZES = (4096, 8192)
CPU_COPY_BYTES = 256 * 2**20
"""Several times the last-level cache that a CPU's cores share."""
CUDA_COPY_BYTES = 2**30
CALLS = 8
"""Products or copies in one timed lap on CUDA, so that launching them takes no share of it."""


def measured_product(device: str, rate: Rate, *, threads: int = 1, tries: int = 5) -> Peak:
    """FLOP/s of the best of `tries` square products, over several sizes.

    Args:
        device: as torch names it ("cpu", "cuda").
        rate: type of the factors; "tf32" is float32 on tensor cores and CUDA only.
        threads: of the process while it measures; read on a CPU only.
        tries: laps of each size, after one that is not timed.

    Raises:
        LorameterError: a rate that is no product, or tf32 on a CPU.
    """
    cuda = device.startswith("cuda")
    if rate == "memory" or (rate == "tf32" and not cuda):
        raise LorameterError(f"peak: there is no product in {rate} on {device}. Name the type of the factors.")
    dtype: torch.dtype = torch.float32 if rate == "tf32" else getattr(torch, rate)
    sizes, calls = (CUDA_SIZES, CALLS) if cuda else (CPU_SIZES, 1)
    best = 0.0
    with _threads(threads), _precision(rate), torch.no_grad():
        for size in sizes:
            left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
            product = functools.partial(torch.matmul, left, right, out=out)
            best = max(best, 2 * size**3 / _best_lap(device, product, calls, tries))
    how = f"measured: best of {tries} square products each of {', '.join(map(str, sizes))}"
    return Peak(device=_name(device, threads), rate=rate, per_s=best, source=how)


def measured_bandwidth(device: str, *, threads: int = 1, tries: int = 5) -> Peak:
    """Bytes/s of the best of `tries` large copies and sums.

    A copy counts the bytes read and those written, as STREAM does (McCalpin 1995, "Memory Bandwidth and Machine Balance
    in Current High Performance Computers"); a CPU reads the target's lines too before it writes them, so that a sum,
    which only reads, as decoding mostly does, can be the faster of the two. `device` and `threads` are as above.
    """
    cuda = device.startswith("cuda")
    size, calls = (CUDA_COPY_BYTES, CALLS) if cuda else (CPU_COPY_BYTES, 1)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    with _threads(threads):
        copied = 2 * size / _best_lap(device, functools.partial(target.copy_, source), calls, tries)
        read = size / _best_lap(device, source.sum, calls, tries)
    how = f"measured: best of {tries} copies and {tries} sums of {size // 2**20} MiB"
    return Peak(device=_name(device, threads), rate="memory", per_s=max(copied, read), source=how)


def _best_lap(device: str, call: Callable[[], object], calls: int, tries: int) -> float:
    """Seconds of one call in the fastest of `tries` laps of `calls` each; the first lap warms up and is dropped."""
    watch = Stopwatch(device)

    def lap() -> None:
        for _ in range(calls):
            call()

    times = [watch(lap)[1].time_s for _ in range(1 + tries)]
    return min(times[1:]) / calls


def _name(device: str, threads: int) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"this CPU with {format_count(threads, 'thread')}"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _precision(rate: Rate) -> Iterator[None]:
    """float32 products in full precision, or on tensor cores where tf32 is asked for."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if rate == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
