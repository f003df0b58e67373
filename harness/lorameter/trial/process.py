"""Sets up a measuring process, times its steps, and releases its memory.

Readings of the machine and the GPU are taken before and after each timed command, outside its stopwatch; `look` reads
the GPU's clocks while a step still runs on it. Energy is measured in isolated trials only: if trials take turns, the
GPU's counter includes the energy of the others. An isolated trial that times no steps runs some for its energy after
its peaks have been read, for as long as the resolution of the counter requires; all ranks end these steps together.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from lorameter.machine.nvml import GENERATIONS
from lorameter.machine.telemetry import MIN_S, Telemetry, gpu_opener
from lorameter.measurements.declaration import Command
from lorameter.records.record import PartialRecord
from lorameter.studies.request import COMMANDS, TrialRequest


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def release_unused(device: str) -> None:
    """Release unreferenced memory, so that it is neither in the next phase's peak nor freed in its timed steps.

    The profiler's events form reference cycles, which only garbage collection frees; afterwards the C library keeps the
    freed heap, and torch's allocator keeps its blocks.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    give_back_free()


def prepare_process(request: TrialRequest) -> None:
    """Apply the request's limits to this process, and silence a logger: bitsandbytes would log a cast in every forward
    pass of every int8 layer, inside the timed window."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if request.device != "cpu":
        return
    torch.set_num_threads(request.threads)
    if limit := request.protocol.memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def give_back_free() -> None:
    """Return free pages of the heap to the system, if the C library has glibc's malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- clock ------------------------------------------------------------------------------------------------------------


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lap:
    """Time of one call in seconds: on the device (or wall time on a CPU), and CPU time of the process."""

    time_s: float
    cpu_time_s: float


class Stopwatch:
    """Times calls on one device with one method, with one synchronisation a call. Not thread-safe.

    On CUDA a call is timed with a pair of device events. The time excludes the host's work after its last launch, and
    includes the device's waiting if launches are slower than the device. On a CPU it is timed with `perf_counter` and
    the process's CPU time: their ratio, the occupancy, distinguishes an undisturbed step from a contended one
    independently of its time (measured in docs/method.md).
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def __call__(self, call: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> tuple[T, Lap]:
        """The result of `call()` and its lap; on CUDA the lap ends when the device has finished.

        `meanwhile` is called on CUDA after all launches, while the host would wait for the device; neither time
        includes it. On a CPU it is not called.
        """
        if not self._cuda:
            cpu, wall = time.process_time(), time.perf_counter()
            result = call()
            wall = time.perf_counter() - wall
            return result, Lap(wall, time.process_time() - cpu)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        cpu = time.process_time()
        begin.record()
        result = call()
        end.record()
        if meanwhile is not None:
            launched = time.process_time()
            meanwhile()
            cpu += time.process_time() - launched
        torch.cuda.synchronize()
        return result, Lap(begin.elapsed_time(end) / 1e3, time.process_time() - cpu)


ENERGY_STRETCH_S = 1.5 * MIN_S
"""Seconds for which an isolated trial runs steps for its energy: above the minimum of `Telemetry`, even if the last
step ends early."""


class TrialTelemetry:
    """The telemetry of one trial, by phase.

    Args:
        request: request of the trial.
        step: runs a training step.
        real_tokens: returns the number of tokens that this process has trained.
        agree: returns the joint decision of all ranks, given that of this one.
        generations: process generations from this one up to the parent of the run.
    """

    def __init__(
        self,
        request: TrialRequest,
        step: Callable[[], object],
        real_tokens: Callable[[], int],
        *,
        agree: Callable[[bool], bool] = bool,
        generations: int = GENERATIONS,
    ) -> None:
        self._step = step
        self._real_tokens = real_tokens
        self._agree = agree
        workload = request.workload
        # A process that trains as the single rank takes turns with all ranks, on the device of the first rank.
        alone = "peaks" in request.measures and not (
            workload.ranks > 1 and workload.scaling and "steps" in request.measures
        )
        self._needs_steps = alone and "steps" not in request.measures and request.device.startswith("cuda")
        self._energy = alone and request.device.startswith("cuda")
        open_gpu = gpu_opener(request.device)
        self._watches = {
            phase: Telemetry(phase, open_gpu, energy=alone and phase == "train", generations=generations)
            for phase in {one.telemetry_phase for one in COMMANDS.values() if one.telemetry_phase}
        }
        self._steps = 0
        self._tokens = 0.0

    def around(self, command: Command, call: Callable[[], PartialRecord]) -> PartialRecord:
        """The fragment of `call`, with the readings before and after it."""
        if command.telemetry_phase is None:
            fragment = call()
        else:
            tokens, watch = self._real_tokens(), self._watches[command.telemetry_phase]
            watch.begin()
            fragment = call()
            values = watch.end()
            if command.name == "turn" and self._energy:
                self._steps += len(fragment.samples["step_time_s"])
                self._tokens += self._real_tokens() - tokens
                values |= {"energy_steps": float(self._steps), "energy_tokens": self._tokens}
            fragment = msgspec.structs.replace(fragment, values=fragment.values | values)
        if command.ends is None:
            return fragment
        if command.ends == "train" and self._needs_steps and fragment.status == "ok":
            fragment = self._measure_energy(fragment)
        notice = self._watches[command.ends].notice()
        return fragment if notice is None else fragment.with_notice(notice)

    def look(self) -> None:
        """Read the GPU's clocks while a timed step runs on it."""
        self._watches["train"].look()

    def _measure_energy(self, fragment: PartialRecord) -> PartialRecord:
        """Run steps for the energy of a training that has ended."""
        watch, tokens, steps = self._watches["train"], self._real_tokens(), 0
        watch.begin()
        begin = time.monotonic()
        while self._agree(time.monotonic() < begin + ENERGY_STRETCH_S):
            self._step()
            steps += 1
        counts = {"energy_steps": float(steps), "energy_tokens": float(self._real_tokens() - tokens)}
        return msgspec.structs.replace(fragment, values=fragment.values | watch.end() | counts)
