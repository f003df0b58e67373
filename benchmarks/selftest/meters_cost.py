"""What each meter takes on this machine, in microseconds.

Readings stand before and after a timed stretch and never inside it. Whether a step notices them is another question,
which `test_harness.py` asks of real steps.

    python benchmarks/selftest/meters_cost.py [--readings N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from harness.machine.cgroup import CpuTimes
from harness.machine.host import ROOT, HostWatch, host_counters, pressure_s
from harness.machine.memory import MemoryGauge
from harness.machine.neighbours import neighbours_of
from harness.machine.nvml import Device, open_device
from harness.machine.watch import DeviceWatch
from harness.trial.clock import Stopwatch


def cost(call: Callable[[], object], readings: int) -> tuple[float, float, float]:
    """Quartiles of the time of a call, in microseconds."""
    call()
    times = []
    for _ in range(readings):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def host_meters() -> dict[str, Callable[[], object]]:
    """The clock of a step, the peaks of a phase, and a look at the host with its parts."""
    watch, cgroups = HostWatch(), CpuTimes(ROOT)
    clock, gauge = Stopwatch("cpu"), MemoryGauge("cpu")

    def stretch() -> None:
        watch.begin()
        watch.end()

    def peaks() -> None:
        gauge.begin()
        gauge.peaks("train")

    return {
        "clock, a lap of nothing": lambda: clock(_nothing),
        "peaks, begin and end": peaks,
        "pressure, one file": lambda: pressure_s(ROOT, "cpu"),
        "CPU quota": cgroups.read,
        "all counters": lambda: host_counters(ROOT, cgroups),
        "begin and end": stretch,
    }


def _nothing() -> None:
    """What a lap of no work times."""


def card_meters(device: Device) -> dict[str, Callable[[], object]]:
    """The parts of a look at a card, and the whole."""
    watch = DeviceWatch(device, energy=True)

    def stretch() -> None:
        watch.begin(time.monotonic())
        watch.end(time.monotonic())

    return {
        "energy": device.energy_j,
        "sample": device.sample,
        "memory": device.memory,
        "neighbours": lambda: neighbours_of(device),
        "facts": device.facts,
        "begin and end": stretch,
    }


def print_costs(title: str, meters: dict[str, Callable[[], object]], readings: int, console: Console) -> None:
    """Median and quartiles of each."""
    table = Table(title=title, title_justify="left")
    for head in ("meter", "µs, median", "quartiles"):
        table.add_column(head, justify="left" if head == "meter" else "right")
    for name, call in meters.items():
        low, middle, high = cost(call, readings)
        table.add_row(name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}")
    console.print(table)


def main() -> None:
    """Print what was measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--readings", type=int, default=300)
    given = options.parse_args()
    console = Console(width=100, highlight=False)
    print_costs("Host", host_meters(), given.readings, console)
    opened = open_device()
    if opened.value is None:
        console.print(f"Card: not measured ({opened.reason})")
    else:
        print_costs("Card", card_meters(opened.value), given.readings, console)


if __name__ == "__main__":
    main()
