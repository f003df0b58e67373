"""The surroundings of a trial's timed stretches: one flat dict of values for its record, and what could not be
measured.

Heat, power and the kernel's counters are read before and after a stretch (a turn, a request) and never during it: no
thread polls while something is timed. What accumulates is a difference; what fluctuates is known at the ends only,
right after the work and before the GPU has cooled, over as many ends as a trial has turns.

A GPU may lower its clocks as soon as it has nothing to do, so those of a step are read while its work is still
queued: the host has launched all and would only wait (`look`; `lorameter.trial.process` calls it). In a
request, whose tokens the host waits for one by one, the clocks at the end are used, and those of a GPU that idles by
then are dropped.

Names are those of `telemetry_key`: who, what, phase and unit, as in `host_steal_train_s` and
`device_sm_clock_min_train_hz`.

Energy is a difference of two readings of the GPU's own counter. It moves in steps whose period NVML does not document,
and on A100 and H100 the power sensor looks at a quarter of the time only (Yang, Adamek & Armour, "Part-time Power
Measurements", 2023, arXiv 2312.02741). A difference over a short stretch is therefore mostly the phase of those clocks,
and none is given. On a Grace Hopper the counter is that of the whole module, its CPU included.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from lorameter.machine.gpus import GENERATIONS, neighbours_of
from lorameter.machine.host import HostTelemetry
from lorameter.machine.nvml import IDLE, POWER_CAPPED, PROTECTING, NvmlDevice, open_device
from lorameter.machine.reading import Reading, missing
from lorameter.records.record import Notice

UNITS = ("s", "bytes", "hz", "j", "w", "c")
SUBSTITUTED = ("thermal_slowdown_s", "power_slowdown_s", "temperature_margin_c")
"""Values that many GPUs do not report and that a reader does not need: samples, the SM clock and the temperature say
nearly the same."""


@functools.cache  # a few dozen names, used for every trial
def telemetry_key(owner: str, what: str, phase: str) -> str:
    """The name of a value in the record: the phase goes before the unit, where there is one."""
    stem, _, unit = what.rpartition("_")
    return f"{owner}_{stem}_{phase}_{unit}" if unit in UNITS else f"{owner}_{what}_{phase}"


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
"""Values of the record: the readings at the ends of the stretches that each is computed from, and how."""


class GpuTelemetry:
    """What a GPU did in the stretches between `begin` and `end`, over all of them.

    Energy is the difference from the first begin to the last end, so it holds what the GPU takes between stretches
    too: a hand-over of a millisecond between turns of 50 ms or more. Request it only where no other trial takes turns.
    """

    def __init__(self, device: NvmlDevice, *, energy: bool, generations: int = GENERATIONS) -> None:
        self._device = device
        self._energy = energy
        self._generations = generations
        self._first: tuple[float, Reading[float]] | None = None
        self._before: dict[str, Reading[Any]] | None = None
        self._looked = False
        self._found: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}
        """Names of values that this GPU does not give, with the reason."""

    def begin(self, now_s: float) -> None:
        """Something timed is about to start; `now_s` is on the clock of `end`."""
        self._before = self._device.sample()
        self._keep_events(self._before)
        self._looked = False
        self._first = self._first or (now_s, self._before["energy_j"])

    def look(self) -> None:
        """Read the clocks while the timed work runs. Those of a GPU that has finished it are left out."""
        seen = self._device.clocks()
        if IDLE not in (seen["events"].value or ()):
            self._keep_events(seen)
            self._keep("sm_clock_hz", seen["sm_clock_hz"])
            self._looked = self._looked or seen["sm_clock_hz"].known

    def end(self, now_s: float) -> dict[str, float]:
        """The stretch has ended: the values so far. Raises RuntimeError without `begin`."""
        if self._before is None or self._first is None:
            raise RuntimeError("end() without begin(): nothing is being watched")
        (before, self._before), last = (self._before, None), self._device.sample()
        self._keep_events(last)
        if not self._looked and IDLE not in (last["events"].value or ()):
            self._keep("sm_clock_hz", last["sm_clock_hz"])
        for name in ("power_w", "temperature_c", "temperature_margin_c"):
            self._keep(name, last[name])
        for name in ("thermal_slowdown_s", "power_slowdown_s"):
            self._keep(name, _increase(before[name], last[name]))
        others = neighbours_of(self._device, generations=self._generations)
        self._keep("others", others.others.then(lambda pids: float(len(pids))))
        for name in ("others_bytes", "hidden_bytes"):
            self._keep(name, getattr(others, name).then(float))
        totals = {
            name: combine(self._found[source])
            for name, (source, combine) in _COMBINED.items()
            if source in self._found and source not in self.missing
        }
        if self._energy:
            seconds = now_s - self._first[0]
            energy = energy_between(self._first[1], last["energy_j"], seconds)
            self.missing.pop("energy_j", None)  # what was too short at first may be long enough now
            if energy.value is None:
                self.missing["energy_j"] = energy.reason
            else:
                totals |= {"energy_j": energy.value, "energy_s": seconds}
        return totals

    def _keep_events(self, seen: Mapping[str, Reading[Any]]) -> None:
        events = seen["events"]
        self._keep("samples", events.then(lambda words: 1.0))
        self._keep("throttled_samples", events.then(lambda words: float(bool(PROTECTING & set(words)))))
        self._keep("power_capped_samples", events.then(lambda words: float(bool(POWER_CAPPED & set(words)))))

    def _keep(self, name: str, reading: Reading[float]) -> None:
        if reading.value is None:
            self.missing[name] = reading.reason
        else:
            self._found.setdefault(name, []).append(reading.value)


def _increase(before: Reading[float], after: Reading[float]) -> Reading[float]:
    if before.value is None or after.value is None:
        return missing(before.reason or after.reason)
    if after.value < before.value:
        return missing("the counter went back: the driver was reloaded")
    return Reading(value=after.value - before.value)


class Telemetry:
    """Host and device around the timed stretches of one phase of a trial.

    `begin` and `end` take what NVML takes for about twelve readings, and 0.3 ms on the host together; both belong
    outside the timed stretch. Not shared between threads.
    """

    def __init__(
        self,
        phase: str,
        device: str,
        *,
        energy: bool = False,
        generations: int = GENERATIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is opened yet.

        Args:
            phase: part of the values' names: "train" or "generate".
            device: where the trial runs, as torch names it; NVML is read on CUDA only.
            energy: whether the device's energy is this trial's alone.
            generations: from this process up to the parent of the run, whose processes are no neighbours.
            clock: seconds, monotonic.
        """
        self._phase = phase
        self._device = device
        self._energy = energy
        self._generations = generations
        self._clock = clock
        self._host = HostTelemetry()
        self._gpu: GpuTelemetry | None = None
        self._no_gpu = ""

    def begin(self) -> None:
        """A timed stretch is about to start. The first one opens the device."""
        if self._gpu is None and self._device.startswith("cuda") and not self._no_gpu:
            opened = open_torch_gpu(self._device)
            self._no_gpu = opened.reason
            if opened.value is not None:
                self._gpu = GpuTelemetry(opened.value, energy=self._energy, generations=self._generations)
        if self._gpu is not None:
            self._gpu.begin(self._clock())
        self._host.begin()

    def look(self) -> None:
        """Read the clocks while the timed work runs on the GPU and the host would only wait."""
        if self._gpu is not None:
            self._gpu.look()

    def end(self) -> dict[str, float]:
        """The stretch has ended: all values so far, by their names in the record."""
        host = self._host.end()
        gpu = {} if self._gpu is None else self._gpu.end(self._clock())
        values = {telemetry_key("host", name, self._phase): value for name, value in host.items()}
        return values | {telemetry_key("device", name, self._phase): value for name, value in gpu.items()}

    def notice(self) -> Notice | None:
        """A notice of the GPU's values that could not be measured; None where none is missing, and on a CPU."""
        absent = {} if self._gpu is None else self._gpu.missing
        reasons = {name: why for name, why in absent.items() if name not in SUBSTITUTED}
        reasons |= {"all": self._no_gpu} if self._no_gpu else {}
        if not reasons:
            return None
        return Notice(
            code="not-measured",
            message="; ".join(f"{telemetry_key('device', name, self._phase)}: {why}" for name, why in reasons.items()),
            remedy="`lorameter doctor` says what this machine can measure, and what would change that.",
        )


def open_torch_gpu(device: str) -> Reading[NvmlDevice]:
    """The GPU behind a torch device. CUDA runs already, so torch knows the GPU's UUID, whatever the environment."""
    import torch

    uuid: Any = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    found = open_device() if uuid is None else open_device(f"GPU-{uuid}")
    return found if found.known else open_device()  # a MIG instance has a UUID of its own, and the environment names it


COUNTER_PERIOD_S = 0.1
"""Longest time between two updates of the counter that is allowed for: an assumption, on the safe side of the 10 ms
that users report."""
LEAST_S = 2.0
"""Shortest stretch whose energy is given: each end is uncertain by up to half a period, so 5 % of it at most."""


def energy_between(first: Reading[float], last: Reading[float], seconds: float) -> Reading[float]:
    """Joules between two readings of the counter that are `seconds` apart.

    Missing where a reading is, where the stretch is shorter than `LEAST_S`, and where the counter went back: it counts
    in 64 bits since the driver was loaded, so it was reset in between, and what it had counted until then is lost.
    """
    if first.value is None or last.value is None:
        return missing(first.reason or last.reason)
    if last.value < first.value:
        return missing(
            f"the energy counter went back from {first.value:.3f} to {last.value:.3f} J: the driver was reloaded"
        )
    if seconds < LEAST_S:
        return missing(
            f"{seconds:.2f} s were measured, and the energy counter may move every {COUNTER_PERIOD_S:g} s only: under "
            f"{LEAST_S:g} s its difference says little"
        )
    if last.value == first.value:
        return missing(f"the energy counter stood still at {first.value:.3f} J for {seconds:.2f} s")
    return Reading(value=last.value - first.value)
