"""Measures the conditions during a trial's timed stretches, as a flat dict of values, and what could not be measured.

Heat, power and the kernel's counters are read before and after a stretch (a turn, a request) and never during it: no
thread polls while work is timed. Cumulative counters give a difference. Fluctuating values are known only at the ends,
right after the work and before the GPU has cooled, once for each turn of a trial.

A GPU may lower its clocks as soon as it is idle, so the clocks of a step are read while its work is still queued: the
host has launched everything and would only wait (`look`, called by `lorameter.trial.process`). In a request, in which
the host waits for each token, the clocks at the end are used, unless the GPU is already idle.

Names follow `telemetry_key`: owner, quantity, phase and unit, as in `host_steal_train_s` and
`device_sm_clock_min_train_hz`.

Energy is a difference of two readings of the GPU's own counter. The counter is updated with a period that NVML does not
document, and on A100 and H100 the power sensor samples only a quarter of the time (Yang, Adamek & Armour, "Part-time
Power Measurements", 2023, arXiv 2312.02741). A difference over a short stretch therefore depends mostly on the phase of
these updates, and is not reported. On a Grace Hopper the counter covers the whole module, including its CPU.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorameter.machine.host import ROOT, host_counters
from lorameter.machine.nvml import (
    GENERATIONS,
    IDLE,
    POWER_CAPPED,
    PROTECTING,
    NvmlDevice,
    find_neighbours,
    open_device,
)
from lorameter.machine.reading import Reading, counter_increase, missing_reading
from lorameter.records.record import Notice

UNITS = ("s", "bytes", "hz", "j", "w", "c")
SUBSTITUTED = ("thermal_slowdown_s", "power_slowdown_s", "temperature_margin_c")
"""Values that many GPUs do not report and that are not essential: samples, the SM clock and the temperature give nearly
the same information."""


def telemetry_key(owner: str, name: str, phase: str) -> str:
    """The name of a value in the record: the phase precedes the unit, if there is one."""
    stem, _, unit = name.rpartition("_")
    return f"{owner}_{stem}_{phase}_{unit}" if unit in UNITS else f"{owner}_{name}_{phase}"


_COMBINED: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "power_w": ("power_w", statistics.fmean),
    "sm_clock_min_hz": ("sm_clock_hz", min),
    "sm_clock_max_hz": ("sm_clock_hz", max),
    "temperature_c": ("temperature_c", max),
    "temperature_margin_c": ("temperature_margin_c", min),
    "samples": ("samples", sum),
    "throttled_samples": ("throttled_samples", sum),
    "power_capped_samples": ("power_capped_samples", sum),
    "thermal_slowdown_s": ("thermal_slowdown_s", sum),
    "power_slowdown_s": ("power_slowdown_s", sum),
    "others": ("others", max),
    "others_bytes": ("others_bytes", max),
    "hidden_bytes": ("hidden_bytes", max),
}
"""Values of the record: the readings at the ends of the stretches from which each is computed, and the function."""


class Telemetry:
    """Telemetry of host and GPU around the timed stretches of one phase of a trial.

    `begin` and `end` take the time of about twelve NVML readings, and together 0.3 ms on the host; call both outside
    the timed stretch. Not thread-safe.

    Energy is the difference from the first start to the last end, so it includes the time between stretches: a
    millisecond between turns of 50 ms or more. Request it only if no other trial takes turns.
    """

    def __init__(
        self,
        phase: str,
        open_gpu: Callable[[], Reading[NvmlDevice]] | None = None,
        *,
        energy: bool = False,
        generations: int = GENERATIONS,
        root: Path = ROOT,
    ) -> None:
        """Opens nothing yet.

        Args:
            phase: part of the values' names: "train" or "generate".
            open_gpu: opens the GPU of the trial, at the first `begin`; None for a trial on a CPU.
            energy: whether only this trial uses the device's energy.
            generations: process generations up to the parent of the run, whose processes do not count as others.
            root: folder that contains the kernel's file systems.
        """
        self._phase = phase
        self._open_gpu = open_gpu
        self._energy = energy
        self._generations = generations
        self._root = root
        self._gpu: NvmlDevice | None = None
        self._first: tuple[float, Reading[float]] | None = None
        """Time and energy counter at the start of the first stretch."""
        self._begun_s = 0.0
        self._counters: dict[str, Reading[float]] = {}
        self._readings: dict[str, Reading[Any]] = {}
        """Time, counters of the host and readings of the GPU at the start of the current stretch."""
        self._clock_sampled = False
        """Whether the clock was read during the current stretch."""
        self._samples: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}
        """Names of values that host and GPU do not provide, with the reason; "all" if there is no GPU."""

    def begin(self) -> None:
        """Read before a timed stretch. The first call opens the device."""
        if self._open_gpu is not None:
            opened, self._open_gpu = self._open_gpu(), None
            self._gpu = opened.value
            if opened.value is None:
                self.missing["all"] = opened.reason
        if self._gpu is not None:
            now_s = time.monotonic()
            self._readings = self._gpu.sample()
            self._add_events(self._readings)
            self._clock_sampled = False
            self._first = self._first or (now_s, self._readings["energy_j"])
        self._begun_s, self._counters = time.monotonic(), host_counters(self._root)

    def look(self) -> None:
        """Read the clocks while the timed work runs on the GPU and the host would only wait. Clocks of a GPU that is
        already idle are left out."""
        if self._gpu is None:
            return
        clocks = self._gpu.clocks()
        if not IDLE & (clocks["events"].value or 0):
            self._add_events(clocks)
            self._add("sm_clock_hz", clocks["sm_clock_hz"])
            self._clock_sampled = self._clock_sampled or clocks["sm_clock_hz"].known

    def end(self) -> dict[str, float]:
        """Read after a timed stretch; returns all values so far, by their names in the record."""
        counters, now_s = host_counters(self._root), time.monotonic()
        self._add("watched_s", Reading(value=now_s - self._begun_s))
        for name, reading in counters.items():  # steal can decrease when a guest moves to another machine
            self._add(name, counter_increase(self._counters[name], reading))
        host = {name: sum(self._samples[name]) for name in ("watched_s", *counters) if name not in self.missing}
        gpu = {} if self._gpu is None else self._end_gpu(self._gpu, now_s)
        values = {telemetry_key("host", name, self._phase): value for name, value in host.items()}
        return values | {telemetry_key("device", name, self._phase): value for name, value in gpu.items()}

    def _end_gpu(self, gpu: NvmlDevice, now_s: float) -> dict[str, float]:
        last = gpu.sample()
        self._add_events(last)
        if not self._clock_sampled and not IDLE & (last["events"].value or 0):
            self._add("sm_clock_hz", last["sm_clock_hz"])
        for name in ("power_w", "temperature_c", "temperature_margin_c"):
            self._add(name, last[name])
        for name in ("thermal_slowdown_s", "power_slowdown_s"):
            self._add(name, counter_increase(self._readings[name], last[name]))
        for name, reading in find_neighbours(gpu, generations=self._generations).items():
            self._add(name, reading)
        totals = {
            name: combine(self._samples[source])
            for name, (source, combine) in _COMBINED.items()
            if source in self._samples and source not in self.missing
        }
        if self._energy and self._first is not None:
            seconds = now_s - self._first[0]
            energy = energy_between(self._first[1], last["energy_j"], seconds)
            self.missing.pop("energy_j", None)  # the stretches may be long enough by now
            if energy.value is None:
                self.missing["energy_j"] = energy.reason
            else:
                totals |= {"energy_j": energy.value, "energy_s": seconds}
        return totals

    def _add_events(self, readings: Mapping[str, Reading[Any]]) -> None:
        events = readings["events"]
        self._add("samples", events.then(lambda bits: 1.0))
        self._add("throttled_samples", events.then(lambda bits: float(bool(bits & PROTECTING))))
        self._add("power_capped_samples", events.then(lambda bits: float(bool(bits & POWER_CAPPED))))

    def _add(self, name: str, reading: Reading[float]) -> None:
        if reading.value is None:
            self.missing[name] = reading.reason
        else:
            self._samples.setdefault(name, []).append(float(reading.value))

    def notice(self) -> Notice | None:
        """A notice about the GPU's values that could not be measured; None if none is missing, and on a CPU."""
        left_out = {*SUBSTITUTED, *self._counters}
        reasons = {name: why for name, why in self.missing.items() if name not in left_out}
        if not reasons:
            return None
        return Notice(
            code="not-measured",
            message="; ".join(f"{telemetry_key('device', name, self._phase)}: {why}" for name, why in reasons.items()),
            remedy="`lorameter doctor` says what this machine can measure, and what would change that.",
        )


def gpu_opener(device: str) -> Callable[[], Reading[NvmlDevice]] | None:
    """A function that opens the GPU of a torch device; None for a CPU."""
    return functools.partial(open_torch_gpu, device) if device.startswith("cuda") else None


def open_torch_gpu(device: str) -> Reading[NvmlDevice]:
    """The GPU of a torch device. CUDA is already initialised, so torch knows the GPU's UUID, whatever the
    environment."""
    import torch

    uuid: Any = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    found = open_device() if uuid is None else open_device(f"GPU-{uuid}")
    return found if found.known else open_device()  # a MIG instance has its own UUID, which the environment names


COUNTER_PERIOD_S = 0.1
"""Assumed maximum time between two updates of the counter; users report 10 ms."""
MIN_S = 2.0
"""Shortest stretch whose energy is reported: each end is uncertain by up to half a period, so by at most 5 % in
total."""


def energy_between(first: Reading[float], last: Reading[float], seconds: float) -> Reading[float]:
    """Joules between two readings of the counter that are `seconds` apart.

    The result is missing if a reading is missing, if the stretch is shorter than `MIN_S`, and if the counter
    decreased: it has 64 bits and counts from the loading of the driver, so it was reset in between, and the count until
    then is lost.
    """
    energy = counter_increase(first, last)
    if energy.known and seconds < MIN_S:
        return missing_reading(
            f"{seconds:.2f} s were measured, and the energy counter may be updated every {COUNTER_PERIOD_S:g} s only: "
            f"below {MIN_S:g} s, a difference is too uncertain"
        )
    if energy.value == 0:
        return missing_reading(f"the energy counter stayed at {last.value:.3f} J for {seconds:.2f} s")
    return energy
