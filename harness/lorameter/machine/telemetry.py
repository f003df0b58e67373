"""The surroundings of a trial's timed stretches: one flat dict of values for its record, and what could not be had.

Heat, power and the kernel's counters are read before and after a stretch (a turn, a request) and never during it: no
thread polls while something is timed. What accumulates is a difference; what fluctuates is known at the ends only,
right after the work and before the GPU has cooled, over as many ends as a trial has turns.

A GPU may lower its clocks as soon as it has nothing to do, so those of a step are read while its work is still
queued: the host has launched all and would only wait (`look`; `lorameter.trial.clock` calls it). In a
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
import time
from collections.abc import Callable
from typing import Any

from lorameter.machine.gpus import GENERATIONS, neighbours_of
from lorameter.machine.host import HostTelemetry
from lorameter.machine.nvml import IDLE, POWER_CAPPED, PROTECTING, CardSample, Clocks, NvmlDevice, open_device
from lorameter.machine.reading import Reading, missing
from lorameter.records.record import Notice

UNITS = ("s", "bytes", "hz", "j", "w", "c")
SUBSTITUTED = ("thermal_slowdown_s", "power_slowdown_s", "memory_clock_hz", "temperature_margin_c", "own_bytes")
"""What many GPUs do not tell, and a reader of the numbers can do without: samples, the SM clock, the temperature and
what torch's allocator reserved say nearly the same."""


@functools.cache  # a few dozen names, asked for of every trial
def telemetry_key(owner: str, what: str, phase: str) -> str:
    """The name of a value in the record: the phase goes before the unit, where there is one."""
    stem, _, unit = what.rpartition("_")
    return f"{owner}_{stem}_{phase}_{unit}" if unit in UNITS else f"{owner}_{what}_{phase}"


class GpuTelemetry:
    """What a GPU did in the stretches between `begin` and `end`, over all of them.

    Energy is the difference from the first begin to the last end, so it holds what the GPU takes between stretches
    too: a hand-over of a millisecond between turns of 50 ms or more. Ask for it only where no other trial takes turns.
    """

    def __init__(self, device: NvmlDevice, *, energy: bool, generations: int = GENERATIONS) -> None:
        self._device = device
        self._energy = energy
        self._generations = generations
        self._first: tuple[float, CardSample] | None = None
        self._before: CardSample | None = None
        self._looked = False
        self._found: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}
        """Names of values that this GPU does not give, with the reason."""

    def begin(self, now_s: float) -> None:
        """Something timed is about to start; `now_s` is on the clock of `end`."""
        self._before = self._device.sample()
        self._events(self._before.events)
        self._looked = False
        if self._first is None:
            self._first = (now_s, self._before)

    def look(self) -> None:
        """What is timed has been launched and is going on. The clocks of a GPU that has finished it are left out."""
        seen = self._device.clocks()
        if seen.events.value is not None and IDLE in seen.events.value:
            return
        self._events(seen.events)
        self._clocks(seen)
        self._looked = self._looked or seen.sm_clock_hz.known

    def end(self, now_s: float) -> dict[str, float]:
        """It has ended: what was found so far. Raises RuntimeError without `begin`."""
        if self._before is None or self._first is None:
            raise RuntimeError("end() without begin(): nothing is being watched")
        before, last = self._before, self._device.sample()
        self._before = None
        self._events(last.events)
        self._keep("power_w", last.power_w)
        if not self._looked and (last.events.value is None or IDLE not in last.events.value):
            self._clocks(last)
        self._keep("temperature_c", last.temperature_c)
        self._keep("temperature_margin_c", last.temperature_margin_c)
        for name in ("thermal_slowdown_s", "power_slowdown_s"):
            self._difference(name, getattr(before, name), getattr(last, name))
        self._neighbours()
        totals = {name: combine(found) for name, combine in _COMBINED.items() if (found := self._of(name))}
        if self._energy:
            begun_s, first = self._first
            energy = energy_between(first.energy_j, last.energy_j, now_s - begun_s)
            if energy.value is not None:
                self.missing.pop("energy_j", None)  # what was too short at first is long enough now
                totals |= {"energy_j": energy.value, "energy_s": now_s - begun_s}
            else:
                self.missing["energy_j"] = energy.reason
        return totals

    def _clocks(self, seen: CardSample | Clocks) -> None:
        self._keep("sm_clock_hz", seen.sm_clock_hz)
        self._keep("memory_clock_hz", seen.memory_clock_hz)

    def _events(self, found: Reading[tuple[str, ...]]) -> None:
        self._keep("samples", found.then(lambda words: 1.0))
        self._keep("throttled_samples", found.then(lambda words: float(bool(PROTECTING & set(words)))))
        self._keep("power_capped_samples", found.then(lambda words: float(bool(POWER_CAPPED & set(words)))))

    def _neighbours(self) -> None:
        found = neighbours_of(self._device, generations=self._generations)
        self._keep("own_bytes", found.own_bytes.then(float))
        self._keep("used_bytes", found.used_bytes.then(float))
        self._keep("others", found.others.then(lambda pids: float(len(pids))))
        self._keep("others_bytes", found.others_bytes.then(float))
        self._keep("hidden_bytes", found.hidden_bytes.then(float))

    def _difference(self, name: str, before: Reading[float], after: Reading[float]) -> None:
        if before.value is not None and after.value is not None and after.value >= before.value:
            self._keep(name, Reading(value=after.value - before.value))
        else:
            self.missing[name] = before.reason or after.reason or "the counter went back: the driver was reloaded"

    def _keep(self, name: str, reading: Reading[float]) -> None:
        if reading.value is None:
            self.missing[name] = reading.reason
        else:
            self._found.setdefault(name, []).append(reading.value)

    def _of(self, name: str) -> list[float]:
        """What `_COMBINED` combines under a name: the readings of the quantity that it is an extreme of."""
        source = _SOURCES.get(name, name)
        return [] if source in self.missing else self._found.get(source, [])


def _mean(found: list[float]) -> float:
    return sum(found) / len(found)


_COMBINED: dict[str, Callable[[list[float]], float]] = {
    "power_w": _mean,
    "sm_clock_min_hz": min,
    "sm_clock_max_hz": max,
    "memory_clock_min_hz": min,
    "memory_clock_max_hz": max,
    "temperature_c": max,
    "temperature_margin_c": min,
    "samples": sum,
    "throttled_samples": sum,
    "power_capped_samples": sum,
    "thermal_slowdown_s": sum,
    "power_slowdown_s": sum,
    "own_bytes": max,
    "used_bytes": max,
    "others": max,
    "others_bytes": max,
    "hidden_bytes": max,
}
"""Values of the record, and how each is computed from the readings at the ends of the stretches."""
_SOURCES = {
    "sm_clock_min_hz": "sm_clock_hz",
    "sm_clock_max_hz": "sm_clock_hz",
    "memory_clock_min_hz": "memory_clock_hz",
    "memory_clock_max_hz": "memory_clock_hz",
}


class Telemetry:
    """Host and device around the timed stretches of one phase of a trial.

    `begin` and `end` take what NVML takes for about twelve answers, and 0.3 ms on the host together; both belong
    outside what is timed. Not shared between threads.
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
            device: where the trial runs, as torch names it; NVML is asked on CUDA only.
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
        self._card: GpuTelemetry | None = None
        self._no_card = ""

    def begin(self) -> None:
        """A timed stretch is about to start. The first one opens the device."""
        if self._card is None and self._device.startswith("cuda") and not self._no_card:
            opened = card_of(self._device)
            self._no_card = opened.reason
            if opened.value is not None:
                self._card = GpuTelemetry(opened.value, energy=self._energy, generations=self._generations)
        if self._card is not None:
            self._card.begin(self._clock())
        self._host.begin()

    def look(self) -> None:
        """What is timed is under way on the GPU, and the host would only wait for it."""
        if self._card is not None:
            self._card.look()

    def end(self) -> dict[str, float]:
        """It has ended: all values so far, by their names in the record."""
        host = self._host.end()
        card = {} if self._card is None else self._card.end(self._clock())
        values = {telemetry_key("host", name, self._phase): value for name, value in host.items()}
        return values | {telemetry_key("device", name, self._phase): value for name, value in card.items()}

    @property
    def missing(self) -> dict[str, str]:
        """Names of the record that have no value, with the reason."""
        reasons = {telemetry_key("host", name, self._phase): why for name, why in self._host.missing.items()}
        if self._no_card:
            reasons[telemetry_key("device", "all", self._phase)] = self._no_card
        if self._card is not None:
            reasons |= {telemetry_key("device", name, self._phase): why for name, why in self._card.missing.items()}
        return reasons

    def notice(self) -> Notice | None:
        """What of the device could not be measured; None where nothing is missing, and on a CPU."""
        minor = {telemetry_key("device", name, self._phase) for name in SUBSTITUTED}
        absent = {name: why for name, why in self.missing.items() if name.startswith("device_") and name not in minor}
        if not absent:
            return None
        return Notice(
            code="not-measured",
            message="; ".join(f"{name}: {why}" for name, why in absent.items()),
            remedy="`lorameter doctor` says what this machine can measure, and what would change that.",
        )


def card_of(device: str) -> Reading[NvmlDevice]:
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
