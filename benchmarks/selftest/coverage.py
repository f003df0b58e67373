"""Does the 95 % interval hold the true ratio in 95 % of runs, and does a family raise its alarms at the promised rate?

    python benchmarks/selftest/coverage.py

Both are simulated, because only there the truth is known; the intervals and verdicts are those of `harness.stats`.
Gaussian noise must be covered as promised, up to 1 point. Heavy tails, bursts and drift break the assumption of
Student's interval; there the coverage may be off by 2 points below and 3 above. Under drift the sides of a turn stand
at neighbouring times in random order, so that drift does not cancel but turns into scatter.

Exit status 1, with the reasons, if a bound is broken.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import signal

from harness.stats import Pairing, compare_family, compare_trials

RATIO = 1.05
SIZES = tuple(range(5, 13))
TURNS = 10
FAMILY = 10
FAMILY_SIZES = (5, 12)
MOST_FAMILY_ALARMS = 0.05
SD = 0.02
"""Of a side's log time in a replicate, where nothing else is said."""
CHUNK = 1000

Times = NDArray[np.float64]
Sides = tuple[Times, Times]


@dataclass(frozen=True)
class Noise:
    """A kind of noise, how its runs are compared, and the coverage that is asked for."""

    name: str
    simulate: Callable[[np.random.Generator, int, int], Sides]
    """Log times of identical code: two arrays of draws × replicates × turns."""
    pairing: Pairing
    least: float
    most: float
    effort: float = 1.0
    """Part of the draws that it gets."""


def gaussian(rng: np.random.Generator, draws: int, size: int) -> Sides:
    """Normal replicates, beside ten times as much noise that both sides share."""
    shared = rng.normal(0.0, 10 * SD, (draws, size, 1))
    base, candidate = rng.normal(0.0, SD, (2, draws, size, 1))
    return shared + base, shared + candidate


def unshared(rng: np.random.Generator, draws: int, size: int) -> Sides:
    """Normal replicates with nothing in common."""
    base, candidate = rng.normal(0.0, SD, (2, draws, size, 1))
    return base, candidate


def heavy_tails(rng: np.random.Generator, draws: int, size: int) -> Sides:
    """Replicates from Student's t with three degrees of freedom, which has no fourth moment."""
    base, candidate = SD * rng.standard_t(3, (2, draws, size, 1))
    return base, candidate


def bursts(rng: np.random.Generator, draws: int, size: int) -> Sides:
    """Normal replicates; each turn of each side is hit, one time in five, by a lognormal slow-down."""
    hit = rng.random((2, draws, size, TURNS)) < 0.2
    burst = hit * rng.lognormal(math.log(0.2), 1.0, hit.shape)
    base, candidate = rng.normal(0.0, SD, (2, draws, size, 1)) + rng.normal(0.0, SD, hit.shape) + burst
    return base, candidate


def drift(rng: np.random.Generator, draws: int, size: int) -> Sides:
    """A machine that slows by half over the run, and wanders; the sides of a turn follow each other in random order."""
    moments = size * TURNS * 2
    wander = signal.lfilter([1.0], [1.0, -0.95], rng.normal(0.0, SD, (draws, moments + 100)), axis=1)[:, 100:]
    course = (wander + np.linspace(0.0, math.log(1.5), moments)).reshape(draws, size, TURNS, 2)
    first = rng.random((draws, size, TURNS)) < 0.5
    base, candidate = rng.normal(0.0, SD, (2, draws, size, 1))
    return (
        base + np.where(first, course[..., 0], course[..., 1]),
        candidate + np.where(first, course[..., 1], course[..., 0]),
    )


NOISES = (
    Noise("Gaussian, paired", gaussian, "replicate", 0.94, 0.96),
    Noise("Gaussian, unpaired (Welch)", unshared, "none", 0.94, 0.96),
    Noise("heavy tails: t with 3 df", heavy_tails, "replicate", 0.93, 0.98, effort=0.25),
    Noise("lognormal bursts, by turn", bursts, "turn", 0.93, 0.98, effort=0.25),
    Noise("linear and AR(1) drift, by turn", drift, "turn", 0.93, 0.98, effort=0.25),
)


def chunks(draws: int) -> Iterator[int]:
    """Parts of `draws` that fit into memory."""
    for start in range(0, draws, CHUNK):
        yield min(CHUNK, draws - start)


def covered(noise: Noise, size: int, draws: int) -> float:
    """Share of runs whose interval holds the true ratio."""
    rng = np.random.default_rng([2, size])
    inside = 0
    for count in chunks(draws):
        base, candidate = noise.simulate(rng, count, size)
        for ours, theirs in zip(np.exp(base), RATIO * np.exp(candidate), strict=True):
            found = compare_trials(ours, theirs, pairing=noise.pairing)
            inside += found.low is not None and found.high is not None and found.low <= RATIO <= found.high
    return inside / draws


def family_alarms(size: int, draws: int, *, one_reference: bool) -> float:
    """Share of families of identical code in which any comparison is called regressed or improved, at tolerance 0."""
    rng = np.random.default_rng([3, size])
    alarms = 0
    for count in chunks(draws):
        base, candidates = np.exp(rng.normal(0.0, SD, (2, count, FAMILY, size, 1)))
        if one_reference:
            base[:] = base[:, :1]
        for ours, theirs in zip(base, candidates, strict=True):
            pairs = {str(index): (ours[index], theirs[index]) for index in range(FAMILY)}
            found = compare_family(pairs, pairing="replicate", tolerance=0.0)
            alarms += any(one.verdict in ("regressed", "improved") for one in found.values())
    return alarms / draws


@dataclass(frozen=True)
class Cell:
    """One simulated share and its bounds."""

    row: str
    size: int
    share: float
    least: float
    most: float
    draws: int

    @property
    def holds(self) -> bool:
        """Within its bounds, the share as it is."""
        return self.least <= self.share <= self.most


def measure(draws: int) -> Iterator[Cell]:
    """All cells: coverage by noise, then the family's alarms."""
    for noise in NOISES:
        count = max(round(noise.effort * draws), 1)
        for size in SIZES:
            yield Cell(noise.name, size, covered(noise, size, count), noise.least, noise.most, count)
    count = max(draws // 5, 1)
    # A rate that is exact has the Monte-Carlo error on either side of it; coverage has its band instead.
    most = MOST_FAMILY_ALARMS + 2 * math.sqrt(MOST_FAMILY_ALARMS * (1 - MOST_FAMILY_ALARMS) / count)
    for one_reference, name in ((False, "independent"), (True, "one reference")):
        for size in FAMILY_SIZES:
            alarms = family_alarms(size, count, one_reference=one_reference)
            yield Cell(f"Holm, {FAMILY} null comparisons, {name}", size, alarms, 0.0, most, count)


def table(cells: list[Cell]) -> Table:
    """Noise by row, replicates by column, in percent."""
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Runs, in %, whose 95 % interval holds the true ratio; last rows: families with any false alarm",
        title_justify="left",
        caption="runs: simulated for each cell. The bound of the families includes twice their Monte-Carlo error.",
        caption_justify="left",
    )
    result.add_column("noise")
    for size in SIZES:
        result.add_column(f"n={size}", justify="right")
    result.add_column("bounds", justify="right")
    result.add_column("runs", justify="right")
    for name in dict.fromkeys(cell.row for cell in cells):
        own = {cell.size: cell for cell in cells if cell.row == name}
        any_cell = next(iter(own.values()))
        shares = [f"{100 * own[size].share:.2f}" if size in own else "" for size in SIZES]
        bounds = f"{100 * any_cell.least:.0f}–{100 * any_cell.most:.4g}"
        result.add_row(name, *shares, bounds, str(any_cell.draws))
    return result


def main(arguments: list[str]) -> int:
    """Simulate, print, judge."""
    parser = argparse.ArgumentParser(description="Coverage of the intervals and error rate of families, simulated.")
    parser.add_argument(
        "--draws", type=int, default=20_000, help="runs a cell of Gaussian noise (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error("--draws: simulate at least one run")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120, no_color=True)
    cells = list(measure(options.draws))
    console.print(table(cells))
    failed = [cell for cell in cells if not cell.holds]
    for cell in failed:
        console.print(
            f"does not hold: {cell.row}, {cell.size} replicates: {cell.share:.2%} of {cell.draws} runs, "
            f"not within {cell.least:.2%} to {cell.most:.2%}",
            markup=False,
            soft_wrap=True,
        )
    if not failed:
        console.print("holds: every bound", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
