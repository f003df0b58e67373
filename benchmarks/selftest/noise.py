"""What each rule says of identical code, and of code that is 5 % slower, on noise that was recorded on a busy machine.

    python benchmarks/selftest/noise.py FOLDER

FOLDER holds lockstep.csv.gz (two live processes in turns), one_process.csv.gz (all arms in one process, in turns) and
processes.csv.gz (one process an arm and block). Runs of 5 and of 8 replicates are drawn from them, without repetition
within a run, where a file holds at least twice 8; else they are simulated with the file's variance components. Where
two arms are identical code, which of them is called the base is drawn too: so their true ratio is exactly 1. The
verdicts of `harness.stats.compare_trials` are counted beside those of other tools' rules on the same draws.

Exit status 1, with the reasons, if lorameter's rules do not hold what docs/method.md says of them; 2 for bad input.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from peer_rules import RULES, WITH_TURNS
from recording import Recording, Run, Times, components, facts, read
from rich import box
from rich.console import Console
from rich.table import Table

from harness.stats import Pairing, compare_trials

SIZES = (5, 8)
ENOUGH = 2 * max(SIZES)
CHUNK = 2000
MOST_ALARMS, LEAST_FOUND = 0.025, 0.95


@dataclass(frozen=True)
class Design:
    """A way to measure: how a run is drawn, and what its two sides share."""

    name: str
    source: str
    pairing: Pairing
    draw: Callable[[np.random.Generator, int, int], Run]


@dataclass(frozen=True)
class Row:
    """Shares of verdicts by number of replicates."""

    rule: str
    source: str
    same: dict[int, Counter[str]]
    found: dict[int, float]
    design: Design | None = None


def choose(rng: np.random.Generator, draws: int, population: int, size: int) -> NDArray[np.intp]:
    """Draws × size indexes, none twice in a draw."""
    return rng.random((draws, population)).argsort(axis=1)[:, :size]


def swapped(rng: np.random.Generator, one: Times, other: Times) -> tuple[Times, Times]:
    """Which of two identical arms is the base, replicate by replicate."""
    first = rng.random(one.shape[:2])[:, :, None] < 0.5
    return np.where(first, one, other), np.where(first, other, one)


def draw_paired(arms: dict[str, Times]) -> Callable[[np.random.Generator, int, int], Run]:
    """Replicates as recorded: identical arms A1 and A2, slower arm B5, all of one replicate."""

    def draw(rng: np.random.Generator, draws: int, size: int) -> Run:
        chosen = choose(rng, draws, len(arms["A1"]), size)
        base, same = swapped(rng, arms["A1"][chosen], arms["A2"][chosen])
        return Run(base, same, arms["B5"][chosen])

    return draw


def draw_separate(arms: dict[str, Times]) -> Callable[[np.random.Generator, int, int], Run]:
    """Processes of either side drawn from the whole recording, with nothing in common."""
    identical = np.concatenate([arms["A1"], arms["A2"]])

    def draw(rng: np.random.Generator, draws: int, size: int) -> Run:
        chosen = identical[choose(rng, draws, len(identical), 2 * size)]
        return Run(chosen[:, :size], chosen[:, size:], arms["B5"][choose(rng, draws, len(arms["B5"]), size)])

    return draw


def designs(recording: Recording) -> Iterator[Design]:
    """Ours, from the finest pairing to none; files with few replicates are simulated."""
    noise = components(recording)
    arms = recording.one_process
    name = "by turn, one process"
    if len(arms["A1"]) >= ENOUGH:
        yield Design(name, f"drawn of {len(arms['A1'])}", "turn", draw_paired(arms))
    yield Design(name, f"simulated, sd {100 * noise['one process'].sd:.1f} %", "turn", noise["one process"].draw)
    yield Design(
        "by turn, two processes", f"simulated, sd {100 * noise['lockstep'].sd:.1f} %", "turn", noise["lockstep"].draw
    )
    blocks = len(recording.processes["A1"])
    if blocks < ENOUGH:
        raise ValueError(f"processes.csv.gz has {blocks} blocks, fewer than the {ENOUGH} to draw runs from")
    yield Design("by replicate (block)", f"drawn of {blocks}", "replicate", draw_paired(recording.processes))
    yield Design("unpaired (Welch)", f"drawn of {2 * blocks}", "none", draw_separate(recording.processes))


def verdicts(design: Design, draws: int) -> tuple[Row, dict[int, Run]]:
    """Ours on every draw, and the first draws for the rules of others."""
    same: dict[int, Counter[str]] = {}
    found: dict[int, float] = {}
    first: dict[int, Run] = {}
    for size in SIZES:
        rng = np.random.default_rng([size, draws])
        counts: Counter[str] = Counter()
        slower = 0
        for start in range(0, draws, CHUNK):
            run = design.draw(rng, min(CHUNK, draws - start), size)
            first.setdefault(size, run)
            for base, identical, slow in zip(*run, strict=True):
                counts[compare_trials(base, identical, pairing=design.pairing).verdict] += 1
                slower += compare_trials(base, slow, pairing=design.pairing).verdict == "regressed"
        same[size], found[size] = counts, slower / draws
    return Row(f"lorameter {design.name}", design.source, same, found, design), first


def peers(runs: dict[int, Run], names: tuple[str, ...], source: str) -> Iterator[Row]:
    """The rules of others on draws of ours."""
    for name in names:
        same, found = {}, {}
        for size, run in runs.items():
            alarms = int(RULES[name](run.base, run.same).sum())
            same[size] = Counter({"regressed": alarms, "": len(run.base) - alarms})
            found[size] = float(RULES[name](run.base, run.slow).mean())
        yield Row(name, source, same, found)


def measure(recording: Recording, draws: int) -> list[Row]:
    """All rows of the table."""
    ours: list[Row] = []
    theirs: list[Row] = []
    for design in designs(recording):
        row, runs = verdicts(design, draws)
        ours.append(row)
        if design.pairing == "none":
            theirs += peers(runs, tuple(RULES), "as unpaired")
        elif design.source.startswith("drawn") and design.pairing == "turn":
            theirs += peers(runs, WITH_TURNS, "as by turn, drawn")
    return [*ours, *theirs]


def share(row: Row, size: int, verdict: str) -> float:
    """Of the draws of identical code."""
    return row.same[size][verdict] / row.same[size].total()


def broken(rows: list[Row]) -> Iterator[str]:
    """What does not hold, beyond twice the Monte-Carlo error of the draws."""
    for row in rows:
        if row.design is None:
            continue
        for size in SIZES:
            where = f"{row.rule} ({row.source}), {size} replicates"
            draws = row.same[size].total()
            alarms, equal, open_ = (
                share(row, size, verdict) for verdict in ("regressed", "equivalent", "inconclusive")
            )
            if alarms > MOST_ALARMS + 2 * math.sqrt(MOST_ALARMS * (1 - MOST_ALARMS) / draws):
                yield f"{where}: identical code is called regressed in {alarms:.2%} of {draws} runs, above 2.5 %"
            if row.design.pairing == "turn":
                least = LEAST_FOUND - 2 * math.sqrt(LEAST_FOUND * (1 - LEAST_FOUND) / draws)
                if size == max(SIZES) and row.found[size] < least:
                    yield f"{where}: 5 % slower is found in {row.found[size]:.1%} of {draws} runs, below 95 %"
            elif equal >= open_:
                yield f"{where}: identical code is called equivalent in {equal:.1%} and inconclusive in {open_:.1%}"
            if row.design.pairing == "none" and equal > 0:
                yield f"{where}: unpaired times are called equivalent in {equal:.2%}"


def table(rows: list[Row], draws: int) -> Table:
    """Rules by row; shares in percent."""
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Verdicts in % of runs, by number of replicates",
        title_justify="left",
        caption=f"same …: identical code called regressed, equivalent, inconclusive (what is left: improved). "
        f"–: the rule has no such verdict. {draws} draws a cell for lorameter, {min(CHUNK, draws)} for others; "
        f"Monte-Carlo error at 2.5 %: ± {100 * math.sqrt(0.025 * 0.975 / draws):.2f}. The draws come from one "
        "recording: that error does not tell how another machine would do.",
        caption_justify="left",
    )
    result.add_column("rule")
    result.add_column("runs")
    for size in SIZES:
        for head in ("same\nregr.", "same\nequiv.", "same\nincon.", "+5 %\nfound"):
            result.add_column(f"n={size}\n{head}", justify="right")
    for row in rows:
        cells = []
        for size in SIZES:
            cells.append(f"{100 * share(row, size, 'regressed'):.1f}")
            if row.rule.startswith("lorameter"):
                cells += [f"{100 * share(row, size, verdict):.1f}" for verdict in ("equivalent", "inconclusive")]
            else:
                cells += ["–", "–"]
            cells.append(f"{100 * row.found[size]:.1f}")
        result.add_row(row.rule, row.source, *cells)
    return result


def main(arguments: list[str]) -> int:
    """Read, draw, print, judge."""
    parser = argparse.ArgumentParser(description="What each decision rule says of recorded noise.")
    parser.add_argument("folder", type=Path, help="lockstep.csv.gz, one_process.csv.gz and processes.csv.gz")
    parser.add_argument("--draws", type=int, default=10_000, help="runs drawn a cell (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error("--draws: draw at least one run")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120, no_color=True)
    try:
        recording = read(options.folder)
        rows = measure(recording, options.draws)
    except (OSError, EOFError, KeyError, ValueError) as error:
        print(f"{options.folder}: cannot use this recording: {error}", file=sys.stderr)
        return 2
    for name, value in facts(recording):
        console.print(f"{name:34} {value}", markup=False)
    console.print()
    console.print(table(rows, options.draws))
    reasons = list(broken(rows))
    for reason in reasons:
        console.print(f"does not hold: {reason}", markup=False, soft_wrap=True)
    if not reasons:
        console.print("holds: every limit of docs/method.md on these draws", markup=False)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
