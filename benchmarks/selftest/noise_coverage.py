"""Measures the coverage of the intervals and the error rates of the verdicts, on simulated and on recorded noise.

    python benchmarks/selftest/noise_coverage.py [--draws N] [--part coverage families scatter looks noise claims]

- coverage: the 95 % interval covers the true ratio in 94 to 96 % of the runs under Gaussian noise; in 93 to 98 % under
  heavy tails, bursts and drift, which violate the assumption of Student's interval.
- families: of ten comparisons of identical code at tolerance 0, any is called different in at most 5 % of the runs.
- scatter: variants of a run that share their scatter (`lorameter.stats.share_scatter`), with 3, 5 and 8 replicates, 3,
  5 and 14 variants, and arms with equal scatter, with two, three or five times the scatter, with heavy tails, or with
  one replicate shifted for all. All intervals of a run cover the truth in at least 94 % of the runs, in 95 % with equal
  scatter; any identical variant is called slower or faster by more than the tolerance of 1 % in at most 5 %. The
  half-width is printed as a share of that from each comparison's own scatter.
- looks: runs that end as soon as every comparison is decided (`lorameter.stats.looks`), with Gaussian noise, equal or
  with one arm of five times the scatter, and with recorded noise if there is any. Of identical variants any is called
  slower or faster in at most 5 % of the runs, each is called slower in at most 2.5 %, and the interval at the end holds
  the truth in at least 94 %. How often slower code is found, and after how many replicates on average, is printed.
- noise: runs drawn from the recording in $LORAMETER_NOISE or simulated from its variance components. Identical code is
  called regressed in at most 2.5 % of the runs; with turns, 5 % slower code is found in 95 % of the runs with 8
  replicates; without any pairing identical code is never called equivalent. Other decision rules on the same draws are
  printed next to them. Skipped without the recording.
- claims: simulated runs of the built-in study of LoRA parameters (`simulated_claims.py`). At most 5 % of the runs have
  a wrong verdict on a claim, and 80 % find each injected effect.

A bound holds unless an exact binomial test at 1 % rejects it.

The recording has three files, one for each design: `processes.csv.gz` has one process per arm and block,
`lockstep.csv.gz` two live processes in turns, `one_process.csv.gz` all arms of one process in turns. Arms A1 and A2 are
identical code, B5 does 5 % more work. The log times have two variance components (Kalibera & Jones 2013): between
replicates, which more steps do not reduce, and within one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import simulated_claims
from numpy.typing import NDArray
from scipy import signal, stats
from shared import Share, print_origin, report_violations

from lorameter.stats import (
    Comparison,
    Effect,
    Pairing,
    VerdictRule,
    compare_trials,
    decide_family,
    estimate_effect,
    share_scatter,
)
from lorameter.stats.effect import paired_effect
from lorameter.stats.looks import look_level, planned_looks

WARM_UP, MIN_STEPS = 20, 10
"""Number of warm-up steps that are dropped, and the minimum number of steps that must remain."""
MIN_OCCUPANCY = 0.95
TRUE_RATIO = 1.05
REPLICATES, TURNS = tuple(range(5, 13)), 10
SD = 0.02
"""Standard deviation of a side's log time in a replicate."""
MAX_CHUNK = 1000
"""Maximum number of runs that are drawn from the recording at once."""
FAMILY_SIZE = 10
RECORDED_REPLICATES = (5, 8)
"""Numbers of replicates of the runs that are drawn from the recording."""

Times = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int, int], Times]
"""A function of a generator and the numbers of draws and replicates; it returns the log times of two identical sides,
sides × draws × replicates × turns."""
Draw = Callable[[np.random.Generator, int, int], tuple[Times, Times, Times]]
"""A function of a generator and the numbers of draws and replicates; it returns the times of a base, of identical code
and of slower code, each draws × replicates × turns."""


def gaussian(rng: np.random.Generator, draws: int, size: int) -> Times:
    """Draw normal replicates with ten times as much shared noise."""
    return rng.normal(0.0, 10 * SD, (draws, size, 1)) + rng.normal(0.0, SD, (2, draws, size, 1))


def unshared(rng: np.random.Generator, draws: int, size: int) -> Times:
    """Draw normal replicates without shared noise."""
    return rng.normal(0.0, SD, (2, draws, size, 1))


def heavy_tails(rng: np.random.Generator, draws: int, size: int) -> Times:
    """Draw replicates from Student's t with three degrees of freedom, which has no fourth moment."""
    return SD * rng.standard_t(3, (2, draws, size, 1))


def bursts(rng: np.random.Generator, draws: int, size: int) -> Times:
    """Draw normal replicates; a lognormal slow-down hits one in five turns of a side."""
    hit = rng.random((2, draws, size, TURNS)) < 0.2
    burst = hit * rng.lognormal(math.log(0.2), 1.0, hit.shape)
    return rng.normal(0.0, SD, (2, draws, size, 1)) + rng.normal(0.0, SD, hit.shape) + burst


def drift(rng: np.random.Generator, draws: int, size: int) -> Times:
    """Draw times of a machine that slows by half and wanders; the sides of a turn run one after the other in random
    order."""
    moments = size * TURNS * 2
    course_noise = signal.lfilter([1.0], [1.0, -0.95], rng.normal(0.0, SD, (draws, moments + 100)), axis=1)[:, 100:]
    course = (course_noise + np.linspace(0.0, math.log(1.5), moments)).reshape(draws, size, TURNS, 2)
    first = rng.random((draws, size, TURNS, 1)) < 0.5
    course = np.where(first, course, course[..., ::-1])
    return rng.normal(0.0, SD, (2, draws, size, 1)) + np.moveaxis(course, -1, 0)


NOISES: tuple[tuple[str, Noise, Pairing, float, float, float], ...] = (
    ("Gaussian, paired", gaussian, "replicate", 0.94, 0.96, 1.0),
    ("Gaussian, unpaired (Welch)", unshared, "none", 0.94, 0.96, 1.0),
    ("heavy tails (t with 3 df)", heavy_tails, "replicate", 0.93, 0.98, 0.25),
    ("lognormal bursts, by turn", bursts, "turn", 0.93, 0.98, 0.25),
    ("linear and AR(1) drift, by turn", drift, "turn", 0.93, 0.98, 0.25),
)
"""Name, noise, pairing, minimum and maximum coverage, and the share of the draws."""


def coverage(draws: int) -> Iterator[Share]:
    """Yield how often the interval covers the true ratio, by noise and number of replicates."""
    for name, simulate, pairing, minimum, maximum, share in NOISES:
        for size in REPLICATES:
            count = math.ceil(share * draws)
            times = np.exp(simulate(np.random.default_rng([2, size]), count, size))
            covered = 0
            for base, candidate in zip(*times, strict=True):
                found = compare_trials(base, TRUE_RATIO * candidate, pairing=pairing)
                covered += found.low is not None and found.high is not None and found.low <= TRUE_RATIO <= found.high
            yield Share(f"{name}, {size} replicates: the interval holds the ratio", covered, count, minimum, maximum)


def families(draws: int) -> Iterator[Share]:
    """Yield how often any of ten comparisons of identical code is called different, with separate bases and with one
    base."""
    for (one_reference, name), size in itertools.product(((False, "a base each"), (True, "one base")), (5, 12)):
        count, alarms = math.ceil(draws / 5), 0
        times = np.exp(np.random.default_rng([3, size]).normal(0.0, SD, (2, count, FAMILY_SIZE, size, 1)))
        for bases, others in zip(*times, strict=True):
            effects = {
                index: estimate_effect(bases[0 if one_reference else index], others[index], "replicate")
                for index in range(FAMILY_SIZE)
            }
            alarms += _called_different(effects, tolerance=0.0)
        description = f"{FAMILY_SIZE} comparisons, {name}, {size} replicates: any is called different"
        yield Share(description, alarms, count, maximum=0.05)


def _called_different(effects: dict[int, Effect], *, tolerance: float) -> bool:
    verdicts = decide_family(effects, dict.fromkeys(effects, VerdictRule(tolerance=tolerance))).values()
    return any(one.verdict in ("regressed", "improved") for one in verdicts)


SCATTERS: dict[str, tuple[float, ...]] = {
    "equal": (), "reference 2": (2.0, 2.0), "one 2": (1.0, 1.0, 2.0), "one 3": (1.0, 1.0, 3.0),
    "one 5": (1.0, 1.0, 5.0), "t with 4 df": (), "replicate shifted": (),
}  # fmt: skip
"""The standard deviations of the first arms in units of `SD`; those of the others are 1. The first two arms are the
reference and its control."""


def scatter(draws: int) -> Iterator[Share]:
    """Yield the coverage of all intervals of a run and the false alarms, with the width relative to intervals from the
    separate scatter of each comparison."""
    for size, variants, (name, first) in itertools.product((3, 5, 8), (3, 5, 14), SCATTERS.items()):
        rng, count = np.random.default_rng([4, size, variants]), math.ceil(draws / 2)
        rule, covered, alarms = VerdictRule(tolerance=0.0, family=variants), 0, 0
        widths: tuple[list[float], list[float]] = ([], [])
        scales = SD * np.array([*first, *[1.0] * (variants + 1 - len(first))])[:, None]
        for _ in range(count):
            noise = rng.standard_normal((variants + 1, size))
            if name == "t with 4 df":
                noise = rng.standard_t(4, noise.shape) / math.sqrt(2)
            logs = scales * noise
            if name == "replicate shifted":
                logs[:, 0] += math.log(1.5)
            separate = {arm: paired_effect(logs[arm] - logs[0], "turn") for arm in range(1, variants + 1)}
            shared = share_scatter(separate)
            covered += all(abs(effect.log_ratio) <= _half_width(effect, rule) for effect in shared.values())
            alarms += _called_different(shared, tolerance=0.01)
            for half_widths, effects in zip(widths, (separate, shared), strict=True):
                half_widths += [_half_width(effect, rule) for effect in effects.values()]
        relative_width = float(np.median(widths[1]) / np.median(widths[0]))
        description = f"{size} replicates, {variants} variants, {name}, half-width {relative_width:.2f} of own"
        yield Share(f"{description}: all intervals hold", covered, count, 0.95 if name == "equal" else 0.94)
        yield Share(f"{description}: any called different", alarms, count, maximum=0.05)


def _half_width(effect: Effect, rule: VerdictRule) -> float:
    return 0.0 if effect.spread is None else effect.spread.half_width(rule.tail(effect.spread))


def end_by_looks(effects_of: Callable[[int], dict[int, Effect]]) -> tuple[int, dict[int, Comparison]]:
    """The replicates and comparisons of a run that ends when all are decided; `effects_of` a number of replicates are
    its effects."""
    looks, found = planned_looks(max(REPLICATES)), dict[int, Comparison]()
    level = look_level(VerdictRule().alpha, looks)
    for look in looks:
        effects = effects_of(look)
        found = decide_family(effects, dict.fromkeys(effects, VerdictRule(alpha=level)))
        if all(one.verdict != "inconclusive" for one in found.values()):
            break
    return look, found


def _stopped(
    description: str, runs: Iterable[tuple[int, dict[int, Comparison]]], *, true_ratio: float = 1.0
) -> Iterator[Share]:
    """Yield the shares of runs that ended by looks: alarms on identical code or slower code found, and coverage."""
    ended = list(runs)
    mean = np.mean([look for look, _ in ended])
    every = [one for _, found in ended for one in found.values()]
    wrong = sum(any(one.verdict in ("regressed", "improved") for one in found.values()) for _, found in ended)
    slower = sum(one.verdict == "regressed" for one in every)
    covered = sum(one.low is not None and one.high is not None and one.low <= true_ratio <= one.high for one in every)
    where = f"{description}, {mean:.1f} replicates on average"
    if true_ratio == 1:
        yield Share(f"{where}: any called different", wrong, len(ended), maximum=0.05)
        yield Share(f"{where}: called slower", slower, len(every), maximum=0.025)
    else:
        equal = sum(one.verdict == "equivalent" for one in every)
        yield Share(f"{where}: called slower", slower, len(every))
        yield Share(f"{where}: called equivalent within 5 %", equal, len(every))
    yield Share(f"{where}: the interval holds", covered, len(every), minimum=0.94)


def looks(draws: int) -> Iterator[Share]:
    """Yield alarms, coverage and power of runs that end as soon as every comparison is decided."""
    most, count = max(REPLICATES), math.ceil(draws / 10)

    def family(logs: Times, look: int) -> dict[int, Effect]:
        effects = {arm: paired_effect(logs[arm, :look] - logs[0, :look], "turn") for arm in range(1, len(logs))}
        shared = share_scatter(effects)
        return {arm: shared[arm] for arm in shared if arm > 1}  # the first is the control

    for variants, (name, first) in itertools.product((3, 5, 14), (("equal", ()), ("one 5", SCATTERS["one 5"]))):
        rng = np.random.default_rng([5, variants])
        scales = SD * np.array([*first, *[1.0] * (variants + 2 - len(first))])[:, None]
        runs = (scales * rng.standard_normal((variants + 2, most)) for _ in range(count))
        yield from _stopped(f"looks, {variants} variants, {name}", (end_by_looks(partial(family, one)) for one in runs))
    for percent, sd in ((0, 0.01), (0, 0.02), (4, 0.01), (4, 0.02), (8, 0.02)):
        rng, ratio = np.random.default_rng([6, percent]), 1 + percent / 100
        values = rng.normal(math.log(ratio), sd, (count, most))
        ends = (end_by_looks(lambda look, one=one: {0: paired_effect(one[:look], "turn")}) for one in values)
        yield from _stopped(f"looks, +{percent} % at a scatter of {100 * sd:.0f} %", ends, true_ratio=ratio)


def recorded_looks(draw: Draw, draws: int, name: str) -> Iterator[Share]:
    """Yield the same for one comparison on recorded noise."""
    times = draw(np.random.default_rng(7), draws, max(REPLICATES))
    for title, other, ratio in (("identical code", times[1], 1.0), ("5 % slower code", times[2], TRUE_RATIO)):
        ends = (
            end_by_looks(lambda look, a=a, b=b: {0: estimate_effect(a[:look], b[:look], "turn")})
            for a, b in zip(times[0], other, strict=True)
        )
        yield from _stopped(f"looks, {name}, {title}", ends, true_ratio=ratio)


def read_times(frame: pd.DataFrame, keys: list[str], step: str, value: str) -> dict[str, Times]:
    """Return the step times by the value of the first key, each replicates × steps, without the warm-up."""
    dropped = WARM_UP if frame[step].nunique() >= WARM_UP + MIN_STEPS else 0
    wide = frame[frame[step] >= dropped].pivot(index=keys, columns=step, values=value)
    return {str(name): group.to_numpy(dtype=float) for name, group in wide.groupby(level=0)}


def log_ratios(base: Times, candidate: Times) -> Times:
    """Return for each replicate the median of the turns' log ratios."""
    return np.median(np.log(candidate) - np.log(base), axis=1)


def _choose_indexes(rng: np.random.Generator, draws: int, population: int, size: int) -> NDArray[np.intp]:
    """Return draws × size indexes without repetition within a draw."""
    return rng.random((draws, population)).argsort(axis=1)[:, :size]


def draw_paired(arms: dict[str, Times], rng: np.random.Generator, draws: int, size: int) -> tuple[Times, Times, Times]:
    """Draw recorded replicates. Each identical arm is the base in half of them, so that their true ratio is 1."""
    chosen = _choose_indexes(rng, draws, len(arms["A1"]), size)
    one, other = arms["A1"][chosen], arms["A2"][chosen]
    first = rng.random(one.shape[:2])[:, :, None] < 0.5
    return np.where(first, one, other), np.where(first, other, one), arms["B5"][chosen]


def draw_separate(
    arms: dict[str, Times], rng: np.random.Generator, draws: int, size: int
) -> tuple[Times, Times, Times]:
    """Draw the processes of each side independently from the whole recording."""
    identical = np.concatenate([arms["A1"], arms["A2"]])
    chosen = identical[_choose_indexes(rng, draws, len(identical), 2 * size)]
    return chosen[:, :size], chosen[:, size:], arms["B5"][_choose_indexes(rng, draws, len(arms["B5"]), size)]


def draw_simulated(
    sd: float, turns: Times, rng: np.random.Generator, draws: int, size: int
) -> tuple[Times, Times, Times]:
    """Draw normal replicates, each with the deviations of the turns of a recorded replicate, with a random sign."""
    shape = (2, draws, size)
    sign = rng.choice([-1.0, 1.0], size=(*shape, 1))
    replicates = rng.normal(0.0, sd, (*shape, 1)) + sign * turns[rng.integers(len(turns), size=shape)]
    same, slow = np.exp(replicates)
    return np.ones_like(same), same, TRUE_RATIO * slow


def designs(
    arms: dict[str, Times], pairs: dict[str, tuple[Times, Times]], blocks: dict[str, Times]
) -> Iterator[tuple[str, Pairing, Draw]]:
    """Yield designs from the finest pairing to none; runs of two processes in turns are simulated, since few pairs were
    recorded, with the standard deviation of a replicate's log ratio, pooled over pairs of arms."""
    yield f"by turn in one process, drawn from {len(arms['A1'])}", "turn", partial(draw_paired, arms)
    shared = [(arms["A1"], arms["A2"]), (arms["A1"], arms["B5"])]
    for name, sides in (("one process", shared), ("two processes", list(pairs.values()))):
        ratios = [log_ratios(base, candidate) for base, candidate in sides]
        centred = np.concatenate([one - one.mean() for one in ratios])
        sd = math.sqrt((centred**2).sum() / (len(centred) - len(ratios)))
        logs = np.concatenate([np.log(candidate / base) for base, candidate in sides])
        turns = logs - np.median(logs, axis=1, keepdims=True)
        yield f"by turn in {name}, simulated with sd {100 * sd:.1f} %", "turn", partial(draw_simulated, sd, turns)
    yield f"by block, drawn from {len(blocks['A1'])}", "replicate", partial(draw_paired, blocks)
    yield f"unpaired (Welch), drawn from {2 * len(blocks['A1'])}", "none", partial(draw_separate, blocks)


def describe_noise(
    arms: dict[str, Times], pairs: dict[str, tuple[Times, Times]], blocks: dict[str, Times], cpu: dict[str, Times]
) -> Iterator[tuple[str, str]]:
    """Yield the figures about the noise in docs/method.md; `cpu` are the CPU times of the blocks."""
    walls, used = (np.concatenate([times["A1"], times["A2"]]) for times in (blocks, cpu))
    times, medians = np.log(walls), np.median(walls, axis=1)
    within = float(times.var(axis=1, ddof=1).mean())
    between = max(float(times.mean(axis=1).var(ddof=1)) - within / times.shape[1], 0.0)
    quiet = medians[used.sum(axis=1) / walls.sum(axis=1) >= MIN_OCCUPANCY]
    block = np.log(np.median(blocks["A2"], axis=1) / np.median(blocks["A1"], axis=1))

    def sd(values: Times) -> str:
        return f"{100 * values.std(ddof=1):.1f} % ({len(values)} pairs)"

    yield "sd of log time between / within", f"{between**0.5:.1%} / {within**0.5:.1%} ({len(times)} processes)"
    yield "intraclass correlation", f"{between / (between + within):.2f}"
    yield "CV of the processes' medians", f"{stats.variation(medians, ddof=1):.1%}"
    kept = f"{len(quiet) / len(medians):.1%} kept"
    yield f"the same, occupancy ≥ {MIN_OCCUPANCY}", f"{stats.variation(quiet, ddof=1):.1%} ({kept})"
    yield "sd of the A/A log ratio, unpaired", f"{math.sqrt(2) * np.log(medians).std(ddof=1):.1%}"
    yield "the same, paired by block", sd(block)
    yield "the same, in turns, two processes", sd(log_ratios(*pairs["AA"]))
    yield "the same, in turns, one process", sd(log_ratios(arms["A1"], arms["A2"]))


def recorded_noise(draws: int) -> Iterator[Share]:
    """Yield how often each verdict is reached on identical and on slower code, by design and number of replicates."""
    folder = Path(os.environ["LORAMETER_NOISE"])
    shared, lockstep, single = (
        pd.read_csv(folder / f"{name}.csv.gz") for name in ("one_process", "lockstep", "processes")
    )
    arms = read_times(shared, ["arm", "proc"], "round", "ns")
    sides = {arm: read_times(side, ["kind", "pair"], "round", "ns") for arm, side in lockstep.groupby("arm")}
    pairs = {kind: (sides["a"][kind], sides["b"][kind]) for kind in ("AA", "AB5")}
    blocks, cpu = (read_times(single, ["arm", "block"], "it", value) for value in ("ns", "cpu_ns"))
    for name, value in describe_noise(arms, pairs, blocks, cpu):
        print(f"{name:36} {value}")
    for name, pairing, draw in designs(arms, pairs, blocks):
        if pairing == "turn":
            yield from recorded_looks(draw, MAX_CHUNK, name)
    for (name, pairing, draw), size in itertools.product(designs(arms, pairs, blocks), RECORDED_REPLICATES):
        rng, where = np.random.default_rng([size, draws]), f"{name}, {size} replicates"
        same, slower, rounds = Counter[str](), 0, math.ceil(draws / MAX_CHUNK)
        for number in range(rounds):
            times = draw(rng, MAX_CHUNK, size)
            for base, identical, slow in zip(*times, strict=True):
                same[compare_trials(base, identical, pairing=pairing).verdict] += 1
                slower += compare_trials(base, slow, pairing=pairing).verdict == "regressed"
            if number == 0 and pairing == "none":
                yield from other_rules(*times[:2], size)
        drawn = rounds * MAX_CHUNK
        yield Share(f"{where}: identical code is called regressed", same["regressed"], drawn, maximum=0.025)
        equivalent = 0.0 if pairing == "none" else None
        yield Share(f"{where}: identical code is called equivalent", same["equivalent"], drawn, maximum=equivalent)
        minimum = 0.95 if pairing == "turn" and size == max(RECORDED_REPLICATES) else None
        yield Share(f"{where}: 5 % slower code is found", slower, drawn, minimum)


def other_rules(base: Times, same: Times, size: int) -> Iterator[Share]:
    """Yield the false alarms of rules that treat steps as independent samples, on identical code measured at different
    times."""
    base, same = (times.reshape(len(times), -1) for times in (base, same))
    t_test, u_test = stats.ttest_ind(same, base, axis=1), stats.mannwhitneyu(same, base, axis=1)
    rules = {
        "Student's t-test over all steps": (t_test.pvalue < 0.05) & (t_test.statistic > 0),
        "U test over all steps": (u_test.pvalue < 0.05) & (np.median(same, axis=1) > np.median(base, axis=1)),
        "mean more than 5 % above": same.mean(axis=1) > 1.05 * base.mean(axis=1),
    }
    for name, alarms in rules.items():
        yield Share(
            f"other rule, {name}, {size} processes: identical code is called slower", int(alarms.sum()), len(base)
        )


def main(arguments: list[str] | None = None) -> int:
    """Print each share; return 1 where a bound does not hold."""
    parts = {
        "coverage": coverage,
        "families": families,
        "scatter": scatter,
        "looks": looks,
        "noise": lambda draws: recorded_noise(draws // 2),
        "claims": lambda draws: simulated_claims.compute_shares(math.ceil(draws / 40)),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draws", type=int, default=20_000, help="runs for each share of Gaussian noise (default: %(default)s)"
    )
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    options = parser.parse_args(arguments)
    print_origin()
    violations = []
    for part in options.part:
        if part == "noise" and not os.environ.get("LORAMETER_NOISE"):
            print("noise: skipped, LORAMETER_NOISE is not set")
            continue
        for share in parts[part](options.draws):
            print(share, flush=True)
            violations += [] if share.holds else [str(share)]
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
