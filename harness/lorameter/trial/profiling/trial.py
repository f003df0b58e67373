"""A profiled trial: the commands of `lorameter profile`, in addition to those of any trial.

Their results are written to files in the trial's folder: they describe one process, and no comparison uses them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lorameter.machine.host import PeakMemoryTracker
from lorameter.models.costs.flops import UncountedError, count_products, to_values
from lorameter.models.costs.peaks import Peak, Rate
from lorameter.records import codec
from lorameter.records.activity import (
    ACCOUNTS,
    ACTIVITY,
    MERGED_ACTIVITY,
    MERGED_TRACE,
    PEAKS,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_PHASES,
    REQUEST_TRACE,
)
from lorameter.records.record import MemoryPhase, PartialRecord
from lorameter.records.units import format_count
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.build import SharedBase
from lorameter.trial.building.quantizers import unpack_4bit
from lorameter.trial.memory import measure_breakdown, read_pages
from lorameter.trial.process import Stopwatch, give_back_free, release_unused
from lorameter.trial.profiling.phases import (
    BorderedRequest,
    BorderedStep,
    observe_request,
    pair_times,
    record_profile,
    request_samples,
    watch_gradients,
    weights_by_shape,
)
from lorameter.trial.trial import Trial


class ProfiledTrial(Trial):
    """An isolated trial that profiles its training and its requests."""

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        super().__init__(request, shared)
        self._initial_pages = read_pages()

    def memory_breakdown(self, phase: MemoryPhase) -> PartialRecord:
        """Break down the memory of a step or of a request, which is observed and not timed."""
        request, trainee = self.request, self.trainee
        call = self.step if phase == "train" else self.server.request
        release_unused(request.device)  # the check's records have reference cycles, and would count as unexplained
        account = measure_breakdown(
            trainee.model, trainee.optimizer, call, initial_pages=self._initial_pages, device=request.device,
            phase=phase, compiled=request.variant.compile,
        )  # fmt: skip
        return self._write(ACCOUNTS[phase], account)

    def profile(self, *, budget_s: float) -> PartialRecord:
        """Time the phases of a step, in pairs for `budget_s` seconds, and count its real tokens."""
        request, stream = self.request, self.stream
        samples = pair_times(
            self.step, self._bordered_step(), request.device, what="step",
            samples_of=lambda loss, _: {"timed_loss": float(loss)}, budget_s=budget_s,
        )  # fmt: skip
        lengths = stream.record_lengths()
        part = request.workload.batch_size * request.variant.gradient_accumulation / stream.sequences
        values = {  # of the mean step: real tokens, and the query-key pairs that its attention needs
            "useful_positions": part * sum(lengths),
            "useful_pairs": part * sum(length * (length + 1) // 2 for length in lengths),
        }
        return self.judged(PartialRecord(samples=samples, values=values | self._count()), list(samples["timed_loss"]))

    def _bordered_step(self) -> BorderedStep:
        return BorderedStep(self.trainee, self.stream, self.request)

    def _count(self) -> dict[str, float]:
        """The matrix products of a step, counted from the modules; empty if they do not show the products. An
        additional step is observed for that, unless steps are compiled: hooks would trigger recompilation."""
        model = self.trainee.model
        watched = None if self.request.variant.compile else watch_gradients(model, self.take_step)
        with contextlib.suppress(UncountedError):
            return to_values(count_products(model, watched))
        return {}

    def peak(self, rates: Sequence[Rate]) -> PartialRecord:
        """Measure the peak rates of the device; they fill caches and memory, so nothing is timed afterwards.

        A rate is left out if the memory is too small for its large product or copy.
        """
        peaks: dict[Rate, Peak] = {}
        for rate in rates:
            release_unused(self.request.device)
            with contextlib.suppress(torch.OutOfMemoryError):
                peaks[rate] = measure_peak(self.request.device, rate)
        return self._write(PEAKS, peaks)

    def activity(self) -> PartialRecord:
        """Profile the operators of a step, after all other commands; training continues."""
        model = self.trainee.model
        unpack_4bit(model)
        model.train()
        activity = record_profile(self._bordered_step(), self.request.device, Path(self.request.scratch))
        return self._write(ACTIVITY, activity)

    def profile_requests(self, *, merged: bool, budget_s: float) -> PartialRecord:
        """Time the phases of a request, with the adapter unmerged or, after `merge`, merged."""
        series = pair_times(
            self.server.ask, self._bordered_request(), self.request.device, what="request",
            samples_of=request_samples, budget_s=budget_s,
        )  # fmt: skip
        return PartialRecord(samples={f"{'merged_' if merged else ''}{name}": times for name, times in series.items()})

    def _bordered_request(self) -> BorderedRequest:
        return BorderedRequest(self.trainee.model, self.server.ask, self.request.device)

    def request_facts(self) -> PartialRecord:
        """Facts about a request: its cache, its logits, the mode of the model, and the memory up to its first token."""
        tracker = PeakMemoryTracker(self.request.device)
        give_back_free()
        tracker.begin()
        self.server.ask_short(1)
        memory = tracker.peaks("first_token")
        self._write(REQUEST_FACTS, observe_request(self.trainee.model, self.server.ask))
        return PartialRecord(memory=memory)

    def request_activity(self, *, merged: bool) -> PartialRecord:
        """Profile the operators of a request."""
        name, trace = (MERGED_ACTIVITY, MERGED_TRACE) if merged else (REQUEST_ACTIVITY, REQUEST_TRACE)
        activity = record_profile(
            self._bordered_request(), self.request.device, Path(self.request.scratch), trace=trace,
            phase_names=REQUEST_PHASES, weights=weights_by_shape(self.trainee.model),
        )  # fmt: skip
        return self._write(name, activity)

    def _write(self, name: str, found: object) -> PartialRecord:
        """Write a result to a file in the trial's folder instead of the record."""
        (Path(self.request.scratch) / name).write_text(codec.dumps(found), encoding="utf-8")
        return PartialRecord()


# --- peaks of the device ----------------------------------------------------------------------------------------------


CPU_SIZES = (512, 1024)
"""Widths of square products: one that fits into the second-level cache, and one that does not."""
CUDA_SIZES = (4096, 8192)
CPU_COPY_BYTES = 256 * 2**20
"""Several times the last-level cache that a CPU's cores share."""
CUDA_COPY_BYTES = 2**30
CALLS = 8
"""Products or copies in one timed lap on CUDA, so that the time of launches is negligible."""


def measure_peak(device: str, rate: Rate, *, tries: int = 5) -> Peak:
    """The peak rate of a device, as torch names it: the best of `tries` laps, with the threads of the process.

    A vendor's figure assumes a clock that a device may not sustain, and for CPUs there is none. A measured peak is the
    rate of this device with these threads and this library on the most favourable shape. Interference only slows a lap
    down, so the best is a lower bound of the true peak, and a share of it an upper bound of the true share.

    For matrix products the rate is the FLOP/s of square products of several sizes; "tf32" is float32 on tensor cores,
    on CUDA only. For memory it is the bytes/s of large copies and sums: a copy counts the bytes read and written, as
    STREAM does (McCalpin 1995, "Memory Bandwidth and Machine Balance in Current High Performance Computers"). A CPU
    also reads the target's cache lines before it writes them, so a sum, which only reads (as decoding mostly does), can
    be faster.
    """
    cuda = device.startswith("cuda")
    name = (
        torch.cuda.get_device_name(device)
        if cuda
        else f"this CPU with {format_count(torch.get_num_threads(), 'thread')}"
    )
    if rate == "memory":
        size = CUDA_COPY_BYTES if cuda else CPU_COPY_BYTES
        source = torch.ones(size // 4, device=device)
        copied = 2 * size / _best_lap(device, functools.partial(torch.zeros_like(source).copy_, source), tries)
        best = max(copied, size / _best_lap(device, source.sum, tries))
        how = f"measured: best of {tries} copies and {tries} sums of {size // 2**20} MiB"
        return Peak(device=name, rate=rate, per_s=best, source=how)
    sizes = CUDA_SIZES if cuda else CPU_SIZES
    dtype = torch.float32 if rate == "tf32" else getattr(torch, rate)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if rate == "tf32" else "ieee"
    try:
        best = max(_product_rate(device, size, dtype, tries) for size in sizes)
    finally:
        matmul.fp32_precision = before
    how = f"measured: best of {tries} square products each of {', '.join(map(str, sizes))}"
    return Peak(device=name, rate=rate, per_s=best, source=how)


def _product_rate(device: str, size: int, dtype: torch.dtype, tries: int) -> float:
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _best_lap(device, functools.partial(torch.matmul, left, right, out=out), tries)


def _best_lap(device: str, call: Callable[[], object], tries: int) -> float:
    """Seconds of one call in the fastest of `tries` laps; the first lap warms up and is dropped."""
    watch, calls = Stopwatch(device), CALLS if device.startswith("cuda") else 1

    def lap() -> None:
        for _ in range(calls):
            call()

    times = [watch(lap)[1].time_s for _ in range(1 + tries)]
    return min(times[1:]) / calls
