"""What the meters cost on this machine: microseconds a reading, and whether a timed stretch notices them.

Readings stand before and after a timed stretch and never inside it, so they cost a run time and a number nothing,
unless they leave caches cold. The last table looks for that: the same work right after a reading and without one, in
turns, as the ratio of the pairs.

    python benchmarks/selftest/meters_cost.py [--readings N] [--pairs N]

Prints tables and ends with 1 where work after a reading is slower by more than the tolerance, with its interval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from harness.meters.cgroup import CpuTimes
from harness.meters.clock import Stopwatch
from harness.meters.host import ROOT, HostWatch, host_counters, pressure_s
from harness.meters.memory import MemoryGauge
from harness.meters.neighbours import neighbours_of
from harness.meters.nvml import Device, open_device
from harness.meters.watch import DeviceWatch
from harness.stats import compare_trials
from harness.units import format_ratio

TOLERANCE = 0.01
REPLICATES = 8
WORK_S = 2e-3


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


def timed_after(read: Callable[[], object] | None, rounds: int) -> float:
    """Seconds that the work takes right after a reading, or after none."""
    if read is not None:
        read()
    begin = time.perf_counter()
    total = 0
    for value in range(rounds):
        total += value * value
    return time.perf_counter() - begin


def after_a_reading(pairs: int, console: Console) -> bool:
    """Whether work is as fast right after a reading as without one."""
    watch = HostWatch()
    rounds = 1000
    while min(timed_after(None, rounds) for _ in range(3)) < WORK_S:  # the best of three was not interrupted
        rounds *= 2
    without: list[list[float]] = []
    after: list[list[float]] = []
    for _ in range(REPLICATES):
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(pairs):
            for reads in random.sample((False, True), 2):
                times[reads].append(timed_after(watch.begin if reads else None, rounds))
        without.append(times[False])
        after.append(times[True])
    found = compare_trials(without, after, pairing="turn", tolerance=TOLERANCE)
    ratio = format_ratio(found.ratio, found.low, found.high)
    console.print(
        f"work of {1e3 * statistics.median(without[0]):.1f} ms right after a reading, over the same without: {ratio}, "
        f"{found.verdict} ({REPLICATES} × {pairs} pairs)"
    )
    return found.verdict != "regressed"


def main() -> int:
    """Print what was measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--readings", type=int, default=300)
    options.add_argument("--pairs", type=int, default=40)
    given = options.parse_args()
    console = Console(width=100, highlight=False)
    print_costs("Host", host_meters(), given.readings, console)
    opened = open_device()
    if opened.value is None:
        console.print(f"Card: not measured ({opened.reason})")
    else:
        print_costs("Card", card_meters(opened.value), given.readings, console)
    return 0 if after_a_reading(given.pairs, console) else 1


if __name__ == "__main__":
    sys.exit(main())
