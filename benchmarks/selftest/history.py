"""Does a history find what made it slower, and how often does it cry wolf? Constructed years of nightly runs.

    python benchmarks/selftest/history.py FOLDER [--years N] [--keep FILE]

FOLDER holds the recorded noise (processes.csv.gz and its two companions). A year has 365 nights, three changes of
fingerprint at random, and changes of 3, 5 and 10 %, up or down, at random nights. A night's value is that of its run;
how the nights scatter is drawn from the recorded processes (two arms of identical code, their medians after warm-up),
scaled to a standard deviation of 2 %, from a normal distribution of the same size, and from the processes as they were
recorded, which scatter by 27 % (37 % in the ratio of two). Every night the line so far is looked at, as a user would.

A change counts as found in time when it is reported, within two nights of its place, at the latest on the third night
that has it. A place that is ever reported more than a week from all changes is a false one, and counted over the nights
that lie so: a small change cannot be placed to the night. Exit status 1, with the reasons, if a bound is broken beyond
twice the Monte-Carlo error: in nights that scatter by 2 %, 10 % is found in time in 90 %, 5 % in 60 %, and at most one
night in 200 is called a change that is none, whatever the scatter.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from recording import read
from rich import box
from rich.console import Console
from rich.table import Table

from harness.machine.provenance import origin_of
from harness.stats import changes
from harness.stats.changes import LEAST_POINTS, find_changes

NIGHTS, BREAKS = 365, 3
SIZES = (0.03, 0.05, 0.10)
NIGHT_SD = 0.02
LEAST_LINE = 30
"""Nights between two changes of fingerprint."""
APART = 10
"""Nights between any two changes of any kind."""
IN_TIME = 3
NEAR, FAR = 2, 7
LEAST_FOUND = {0.10: 0.90, 0.05: 0.60}
MOST_FALSE = 1 / 200

CAPTION = (
    "in time: reported on the third night at the latest. in the end: reported on the last night of its line. covers: "
    "of those, how many intervals hold the true size. seen: what the lines said themselves, in the median, that three "
    "nights would show with 80 % power."
)

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Year:
    """What happened in it."""

    values: NDArray[np.float64]
    """Log of each night's value."""
    breaks: tuple[int, ...]
    """First nights of a new fingerprint."""
    planted: dict[int, float]
    """First night of a new level, and the log of its size."""

    def lines(self) -> Iterator[tuple[int, int]]:
        """First night and end of each fingerprint."""
        yield from zip((0, *self.breaks), (*self.breaks, NIGHTS), strict=True)


@dataclass
class Count:
    """What years came to."""

    years: int = 0
    in_time: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, SIZES), 0))
    in_the_end: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, SIZES), 0))
    covered: int = 0
    false: int = 0
    nights: int = 0
    """Of those that lie more than a week from all changes."""
    detectable: list[float] = field(default_factory=list)
    """What each line said at its end of what it would have seen."""

    def add(self, other: Count) -> None:
        """Both together."""
        self.years += other.years
        for size in self.in_time:
            self.in_time[size] += other.in_time[size]
            self.in_the_end[size] += other.in_the_end[size]
        self.covered += other.covered
        self.false += other.false
        self.nights += other.nights
        self.detectable += other.detectable


def draw_year(rng: np.random.Generator, draw: Draw) -> Year:
    """Places by rejection, so that all that are allowed are equally likely."""
    while True:
        breaks = tuple(sorted(int(night) for night in rng.choice(NIGHTS, BREAKS, replace=False)))
        ends = (0, *breaks, NIGHTS)
        if min(np.diff(ends)) < LEAST_LINE:
            continue
        places = [int(night) for night in rng.choice(NIGHTS, len(SIZES), replace=False)]
        if min(np.diff(sorted((*ends, *places)))) >= APART:
            break
    values, planted = draw(rng, NIGHTS), {}
    for place, size in zip(places, SIZES, strict=True):
        planted[place] = float(rng.choice([-1.0, 1.0])) * math.log1p(size)
        values[place:] += planted[place]
    for place in breaks:  # another torch, another level: nobody compares across it
        values[place:] += rng.normal(0.0, 0.1)
    return Year(values=values, breaks=breaks, planted=planted)


def judge_year(year: Year) -> Count:
    """Look every night, as far as the line then reached."""
    count = Count(years=1)
    for first, end in year.lines():
        planted = {place - first: log for place, log in year.planted.items() if first <= place < end}
        found: set[int] = set()
        false: list[int] = []
        course = find_changes(year.values[first:end][:0])
        for nights in range(LEAST_POINTS, end - first + 1):
            course = find_changes(year.values[first : first + nights])
            for change in course.changes:
                away = {place: abs(change.first - place) for place in planted}
                if min(away.values(), default=NIGHTS) > FAR and all(abs(change.first - one) > NEAR for one in false):
                    false.append(change.first)
                found |= {place for place, by in away.items() if by <= NEAR and nights <= place + IN_TIME}
        last = {place: one for one in course.changes for place in planted if abs(one.first - place) <= NEAR}
        count.false += len(false)
        count.nights += sum(all(abs(night - place) > FAR for place in planted) for night in range(end - first))
        count.detectable += [] if course.detectable is None else [math.expm1(course.detectable)]
        for place, log in planted.items():
            size = str(min(SIZES, key=lambda one: abs(math.log1p(one) - abs(log))))
            count.in_time[size] += place in found
            count.in_the_end[size] += place in last
            count.covered += place in last and last[place].low <= log <= last[place].high
    return count


def scatters(folder: Path) -> dict[str, Draw]:
    """How nights scatter around their level, as logs."""
    recorded = read(folder).processes
    logs = np.log(np.median(np.concatenate([recorded["A1"], recorded["A2"]]), axis=1))
    logs = logs - logs.mean()
    scaled, sd = logs / logs.std(ddof=1), 100 * float(logs.std(ddof=1))

    def drawn(values: NDArray[np.float64]) -> Draw:
        return lambda rng, count: rng.choice(values, count)

    return {
        f"recorded processes, scaled to {100 * NIGHT_SD:g} %": drawn(NIGHT_SD * scaled),
        f"normal, {100 * NIGHT_SD:g} %": lambda rng, count: rng.normal(0.0, NIGHT_SD, count),
        f"recorded processes as they were, {sd:.0f} % ({math.sqrt(2) * sd:.0f} % in the ratio of two)": drawn(logs),
    }


def table(counts: dict[str, Count]) -> Table:
    """Shares by scatter and size."""
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"Changes found, in % of {next(iter(counts.values())).years} years of {NIGHTS} nights a row",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
    )
    heads = [f"{100 * size:g} %\n{when}" for when in ("in time", "in the end") for size in SIZES]
    for head in ("nights scatter", *heads, "covers", "nights for\na false one", "seen"):
        result.add_column(head, justify="left" if head.startswith("nights scatter") else "right")
    for name, count in counts.items():
        shares = [found[str(size)] / count.years for found in (count.in_time, count.in_the_end) for size in SIZES]
        ended = sum(count.in_the_end.values())
        result.add_row(
            name, *(f"{100 * share:.3g}" for share in shares), f"{100 * count.covered / ended:.0f}" if ended else "–",
            f"{count.nights / count.false:.0f}" if count.false else f"> {count.nights}",
            f"{100 * float(np.median(count.detectable)):.1f} %",
        )  # fmt: skip
    return result


def broken(counts: dict[str, Count]) -> Iterator[str]:
    """What does not hold, beyond twice the Monte-Carlo error of the draws."""
    for place, (name, count) in enumerate(counts.items()):
        most = MOST_FALSE * count.nights
        if count.false > most + 2 * math.sqrt(most):
            yield f"{name}: {count.false} false changes in {count.nights} nights, more than one in {1 / MOST_FALSE:g}"
        for size, least in LEAST_FOUND.items() if place < 2 else ():  # the third is not of this size
            share = count.in_time[str(size)] / count.years
            if share < least - 2 * math.sqrt(least * (1 - least) / count.years):
                yield f"{name}: {100 * size:g} % is found in time in {share:.1%}, below {least:.0%}"
        if place == 2 and float(np.median(count.detectable)) < SIZES[-1]:
            yield f"{name}: the lines say that they would see {SIZES[-1]:.0%}, and they do not"


def identity() -> str:
    """What the years were drawn and judged by: the search, and what stands above that draws and looks."""
    text = "".join(inspect.getsource(one) for one in (changes, draw_year, judge_year, scatters))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(path: Path | None) -> dict[tuple[int, int], Count]:
    """Years that were judged before, by the same method."""
    if path is None or not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(one["kind"], one["year"]): Count(**one["count"]) for one in lines if one["method"] == identity()}


def main(arguments: list[str]) -> int:
    """Draw, look, count, judge."""
    parser = argparse.ArgumentParser(description="What a history finds in constructed years, and what it invents.")
    parser.add_argument("folder", type=Path, help="the recorded noise")
    parser.add_argument("--years", type=int, default=200, help="constructed years a row (default: %(default)s)")
    parser.add_argument(
        "--keep", type=Path, help="a file with the years that were judged; one that was stopped goes on"
    )
    options = parser.parse_args(arguments)
    if options.years < 1:
        parser.error("--years: construct at least one")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120, no_color=True)
    try:
        kinds = scatters(options.folder)
    except (OSError, EOFError, KeyError, ValueError) as error:
        print(f"{options.folder}: cannot use this recording: {error}", file=sys.stderr)
        return 2
    judged = kept(options.keep)
    counts: dict[str, Count] = {}
    for number, (name, draw) in enumerate(kinds.items()):
        counts[name] = Count()
        for place in range(options.years):
            if (number, place) not in judged:
                judged[number, place] = judge_year(draw_year(np.random.default_rng([number, place]), draw))
                if options.keep:
                    line = {"kind": number, "year": place, "count": dataclasses.asdict(judged[number, place])}
                    with options.keep.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"method": identity(), **line}) + "\n")
            counts[name].add(judged[number, place])
    console.print(origin_of(Path(__file__).parent), markup=False, soft_wrap=True)
    console.print(table(counts))
    reasons = list(broken(counts))
    for reason in reasons:
        console.print(f"does not hold: {reason}", markup=False, soft_wrap=True)
    if not reasons:
        console.print("holds: every bound", markup=False)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
