"""The recorded noise: reading it, describing it, and its variance components.

Three files, one a way to measure: one process an arm and block, two live processes in turns, all arms of one process in
turns. A1 and A2 are identical code, B5 does 5 % more real work. Two variance components of the log times matter
(Kalibera & Jones 2013): between replicates, which more iterations do not average away, and inside one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

WARM_UP = 20
LEAST_TIMED = 10
"""Steps that must remain for warm-up to be dropped."""
LEAST_OCCUPANCY = 0.95

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Recording:
    """Times in nanoseconds, replicates × iterations after warm-up, by arm."""

    one_process: dict[str, Times]
    lockstep: dict[str, tuple[Times, Times]]
    """By kind: base and candidate."""
    processes: dict[str, Times]
    occupancy: dict[str, Times]
    """CPU time over wall time, a number a process."""
    dropped: dict[str, str]


class Run(NamedTuple):
    """Draws of one design: arrays of draws × replicates × iterations."""

    base: Times
    same: Times
    slow: Times


def timed(frame: pd.DataFrame, keys: list[str], step: str, value: str) -> tuple[dict[str, Times], str]:
    """One array a value of the first key, replicates × steps, warm-up dropped; and how much was."""
    steps = frame[step].nunique()
    dropped = WARM_UP if steps >= WARM_UP + LEAST_TIMED else 0
    wide = frame[frame[step] >= dropped].pivot(index=keys, columns=step, values=value)
    if wide.isna().to_numpy().any():
        raise ValueError(f"not every {keys[-1]} has every {step}")
    arrays = {str(name): group.to_numpy(dtype=float) for name, group in wide.groupby(level=0)}
    return arrays, f"{dropped} of {steps}"


def read(folder: Path) -> Recording:
    """The three files. Raises OSError, KeyError or ValueError for what is not there or not whole."""
    shared = pd.read_csv(folder / "one_process.csv.gz")
    pairs = pd.read_csv(folder / "lockstep.csv.gz")
    single = pd.read_csv(folder / "processes.csv.gz")
    one_process, dropped_shared = timed(shared, ["arm", "proc"], "round", "ns")
    sides = {arm: timed(side, ["kind", "pair"], "round", "ns") for arm, side in pairs.groupby("arm")}
    processes, dropped_single = timed(single, ["arm", "block"], "it", "ns")
    cpu, _ = timed(single, ["arm", "block"], "it", "cpu_ns")
    return Recording(
        one_process=one_process,
        lockstep={kind: (sides["a"][0][kind], sides["b"][0][kind]) for kind in ("AA", "AB5")},
        processes=processes,
        occupancy={arm: cpu[arm].sum(axis=1) / processes[arm].sum(axis=1) for arm in processes},
        dropped={"one process": dropped_shared, "lockstep": sides["a"][1], "processes": dropped_single},
    )


def log_ratios(base: Times, candidate: Times) -> Times:
    """One a replicate: the median of the turns' log ratios."""
    return np.median(np.log(candidate) - np.log(base), axis=1)


@dataclass(frozen=True)
class TurnNoise:
    """Variance components of turns: how replicates scatter, and what the turns inside them do."""

    sd: float
    """Of a replicate's log ratio, its arm's mean removed."""
    df: int
    inside: Times
    """Recorded log ratios of the turns, replicates × turns, each centred at its median."""

    def draw(self, rng: np.random.Generator, draws: int, size: int) -> Run:
        """Normal replicates, each with the turns of a recorded one, either way round; slower by exactly 5 %."""

        def ratio() -> Times:
            turns = self.inside[rng.integers(len(self.inside), size=(draws, size))]
            sign = rng.choice([-1.0, 1.0], size=(draws, size, 1))
            return np.exp(rng.normal(0.0, self.sd, (draws, size, 1)) + sign * turns)

        return Run(np.ones((draws, size, self.inside.shape[1])), ratio(), 1.05 * ratio())


def turn_noise(*sides: tuple[Times, Times]) -> TurnNoise:
    """Pooled over several pairs of arms."""
    values = [log_ratios(base, candidate) for base, candidate in sides]
    df = sum(len(value) - 1 for value in values)
    squares = sum(float(((value - value.mean()) ** 2).sum()) for value in values)
    inside = [np.log(candidate / base) for base, candidate in sides]
    centred = [turns - np.median(turns, axis=1, keepdims=True) for turns in inside]
    return TurnNoise(sd=math.sqrt(squares / df), df=df, inside=np.concatenate(centred))


def components(recording: Recording) -> dict[str, TurnNoise]:
    """Of both ways to take turns, pooled over identical and slower arms."""
    arms = recording.one_process
    return {
        "one process": turn_noise((arms["A1"], arms["A2"]), (arms["A1"], arms["B5"])),
        "lockstep": turn_noise(*recording.lockstep.values()),
    }


def facts(recording: Recording) -> Iterator[tuple[str, str]]:
    """What docs/method.md says of the noise, from these files."""
    arms, single, lockstep = recording.one_process, recording.processes, recording.lockstep
    times = np.log(np.concatenate([single["A1"], single["A2"]]))
    within = float(times.var(axis=1, ddof=1).mean())
    between = max(float(times.mean(axis=1).var(ddof=1)) - within / times.shape[1], 0.0)
    medians = np.median(np.exp(times), axis=1)
    occupancy = np.concatenate([recording.occupancy["A1"], recording.occupancy["A2"]])
    quiet = medians[occupancy >= LEAST_OCCUPANCY]

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    def cv(values: Times) -> str:
        return percent(float(values.std(ddof=1) / values.mean())) if len(values) > 1 else "–"

    def sd(values: Times) -> str:
        return f"{percent(float(values.std(ddof=1)))} ({len(values)} pairs)"

    block = np.log(np.median(single["A2"], axis=1) / np.median(single["A1"], axis=1))
    yield "dropped as warm-up", ", ".join(f"{name} {count}" for name, count in recording.dropped.items())
    yield (
        "sd of log time between / within",
        f"{percent(between**0.5)} / {percent(within**0.5)} ({len(times)} processes)",
    )
    yield "intraclass correlation", f"{between / (between + within):.2f}" if between + within else "–"
    yield "CV of the processes' medians", cv(medians)
    yield f"the same, occupancy ≥ {LEAST_OCCUPANCY}", f"{cv(quiet)} ({percent(len(quiet) / len(medians))} kept)"
    yield "sd of A/A log ratio, unpaired", percent(math.sqrt(2) * float(np.log(medians).std(ddof=1)))
    yield "… paired by block", sd(block)
    yield "… in turns, two processes", sd(log_ratios(*lockstep["AA"]))
    yield "… in turns, one process", sd(log_ratios(arms["A1"], arms["A2"]))
    for name, noise in components(recording).items():
        inside = float(np.median(noise.inside.std(axis=1)))
        yield (
            f"simulated as {name}",
            f"sd of replicates {percent(noise.sd)} (df {noise.df}), of turns {percent(inside)}",
        )
    slow = {
        "one process": log_ratios(arms["A1"], arms["B5"]),
        "two processes": log_ratios(*lockstep["AB5"]),
    }
    for name, values in slow.items():
        error = values.std(ddof=1) / math.sqrt(len(values))
        yield f"slower arm, {name}", f"+{100 * math.expm1(values.mean()):.1f} ± {100 * error:.1f} % as recorded"
