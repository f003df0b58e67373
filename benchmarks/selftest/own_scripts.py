"""Tests the verdicts of `lorameter ab` on two scripts, and measures the overhead of the meter in a training.

    python benchmarks/selftest/own_scripts.py [--tries N] [--replicates N] [--model DIRECTORY]

Verdicts, on `work_script.py`: a script against itself is called different in at most one of eight A/Bs, and a script
whose step has 104 products instead of 100 is called slower in at least nine of ten. A comparison with a script without
products measures their share of a step.

Overhead, on `meter_script.py`: with the meter a step takes at most 0.5 % longer, or 100 µs if that is more. The upper
end of the 95 % interval must be within this bound, for wall time and for CPU time, against the same process with the
meter removed (its callback, hooks and patches) and against a process that was never wrapped. The processes take turns
of a few steps, since other load changes within a second. A step is timed from its start to the start of the next step;
the first step of a turn, whose caches hold data of the other process, is dropped, unless a turn is one step. Reports of
the meter, which cover many steps, are timed separately and divided evenly among the steps. A replicate starts new
processes and takes the median over rounds, whose order is shuffled. A step of the default model takes about 10 ms;
--model names another one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from shared import format_comparison, print_origin, report_violations, run_ab

from lorameter.attach.launch import RUN, child_environment
from lorameter.machine.processes import allowed_cpus, pin_to_cpus
from lorameter.stats import mean_interval

SCRIPT = Path(__file__).with_name("work_script.py")
PRODUCTS, INJECTED = 100, 104
REPLICATES, STEPS = "8", "40"
MAX_FALSE_ALARMS, MIN_DETECTED = 1 / 8, 9 / 10
MAX_OVERHEAD_S, MAX_OVERHEAD_SHARE = 100e-6, 0.005
ALONE, OFF, OFF_AGAIN, ON = "a process that was never wrapped", "off", "off again", "on"
CONDITIONS = (ALONE, OFF, OFF_AGAIN, ON)
"""State of the meter in a turn: absent, off, off a second time (the control), on."""
DIFFERENCES = ((OFF_AGAIN, OFF), (ON, OFF), (ON, ALONE))
CLOCKS = ("wall", "CPU")
WARM_UP = 20
"""Steps before the rounds: the meter's own warm-up of up to 13 steps, and the watched steps."""
METER_SCRIPT = Path(__file__).with_name("meter_script.py")


def compare_scripts(products: int, folder: Path) -> dict[str, Any]:
    """Run an A/B of the script against one with this number of products, and return its document."""
    base, candidate = (f"python {SCRIPT.name} --products {count}" for count in (PRODUCTS, products))
    words = ["--base-command", base, "--candidate-command", candidate, "--replicates", REPLICATES, "--steps", STEPS]
    return run_ab([*words, "--runs-dir", str(folder / "runs")], cwd=folder)


def judge_verdicts(tries: int) -> Iterator[str]:
    """Print the A/Bs of identical and of slower scripts alternately; yield the bounds that do not hold."""
    counts: dict[str, Counter[str]] = {"identical": Counter(), "injected": Counter()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copy(SCRIPT, folder)
        share = 1 - compare_scripts(0, folder)["step"]["ratio"]
        print(
            f"products are {share:.1%} of a step, so {share * (INJECTED / PRODUCTS - 1):.2%} are injected", flush=True
        )
        for number in range(tries):
            for part, products in (("identical", PRODUCTS), ("injected", INJECTED)):
                document = compare_scripts(products, folder)
                step, verdicts = document["step"], [row["verdict"] for row in document["comparisons"]]
                counts[part][step["verdict"]] += 1
                counts[part]["any"] += bool({"regressed", "improved"} & {*verdicts})
                text = f"{step['verdict']} {format_comparison(step)}, {document['interleaving']}"
                print(f"{part} {number}: {text}", flush=True)
    alarms, detected = counts["identical"]["any"], counts["injected"]["regressed"]
    print(f"identical: {alarms} of {tries} are called different; injected: {detected} of {tries} are called slower")
    if alarms > MAX_FALSE_ALARMS * tries:
        yield f"identical: {alarms} of {tries} are called different, at most {MAX_FALSE_ALARMS:.1%} are allowed"
    if detected < MIN_DETECTED * tries:
        yield f"injected: {detected} of {tries} are called slower, {MIN_DETECTED:.0%} are required"


class TrainingProcess:
    """A process that runs `meter_script.py`."""

    def __init__(self, folder: Path, steps: int, model: str, *, wrapped: bool) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if wrapped:
            variables = child_environment(variables, {RUN: str(folder / "runs" / "run")})
        command = [
            sys.executable,
            str(METER_SCRIPT),
            model,
            str(steps),
            str(folder / ("wrapped" if wrapped else "plain")),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
        )
        self.counts = [0.0] * 4
        """The number of steps that the meter has observed and reported, and the wall and CPU time of the reports."""

    def wait(self) -> list[float]:
        """Wait for the next message and return its numbers."""
        for line in self.process.stdout or ():
            if line.startswith(("ready", "took")):
                return [*map(float, line.split()[1:])]
        raise SystemExit(f"a process ended with {self.process.wait()} before its turns")

    def take_turn(self, condition: str, steps: int) -> dict[str, float]:
        """Take steps and return their mean time in seconds, by clock."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{'on' if condition == ON else 'off'} {steps}\n")
        self.process.stdin.flush()
        numbers = self.wait()
        observed = numbers[0] - self.counts[0]
        if observed != (steps if condition == ON else 0):
            raise SystemExit(f"the meter has observed {observed:.0f} steps of a turn with it {condition}")
        self.counts, starts = numbers[:4], (numbers[4::2], numbers[5::2])
        durations = [[later - earlier for earlier, later in itertools.pairwise(one)] for one in starts]
        return {clock: statistics.fmean(one[1:] or one) for clock, one in zip(CLOCKS, durations, strict=True)}


def measure_replicate(rounds: int, turn: int, model: str, seed: int) -> dict[tuple[str, ...], float]:
    """Start both processes on one CPU and let them take turns.

    Returns:
        Medians over the rounds, in seconds per step: of steps without the meter, under (clock, `ALONE`), and of each
        pair of `DIFFERENCES`, under (clock, condition, base).

    Raises:
        SystemExit: the meter has reported no step, or the wrapped process has left no run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runs").mkdir()
        steps = WARM_UP + (rounds + 1) * turn * len(CONDITIONS) + 2
        plain, wrapped = processes = [TrainingProcess(folder, steps, model, wrapped=one) for one in (False, True)]
        cpus = allowed_cpus(os.getpid())
        for one in processes:
            one.wait()
            pin_to_cpus(one.process.pid, {cpus[seed % len(cpus)]})
        plain.take_turn(ALONE, WARM_UP)
        wrapped.take_turn(ON, WARM_UP)
        before, shuffler, times = wrapped.counts, random.Random(seed), []
        for _ in range(1 + rounds):
            order = shuffler.sample(CONDITIONS, len(CONDITIONS))
            times.append({name: (plain if name == ALONE else wrapped).take_turn(name, turn) for name in order})
        for one in processes:
            one.process.kill()
            one.process.wait()
        if not (folder / "runs" / "run" / "manifest.json").is_file():
            raise SystemExit("a wrapped process has left no run")
    _, reported, *seconds = (now - then for now, then in zip(wrapped.counts, before, strict=True))
    if not reported:
        raise SystemExit("--rounds: the meter has not reported a step in so few rounds; use more")
    medians: dict[tuple[str, ...], float] = {}
    for clock, reports_s in zip(CLOCKS, seconds, strict=True):
        # the first round reads files and fills caches
        alone, off, off_again, on = (np.array([one[name][clock] for one in times[1:]]) for name in CONDITIONS)
        on += reports_s / reported
        medians[clock, ALONE] = float(np.median(alone))
        medians[clock, OFF_AGAIN, OFF] = float(np.median(off_again - off))
        medians[clock, ON, OFF] = float(np.median(on - (off + off_again) / 2))
        medians[clock, ON, ALONE] = float(np.median(on - alone))
    return medians


def judge_overhead(replicates: list[dict[tuple[str, ...], float]]) -> Iterator[str]:
    """Print the differences between the processes; yield the bounds that do not hold."""
    for clock in CLOCKS:
        step_s = statistics.fmean(one[clock, ALONE] for one in replicates)
        limit_s = max(MAX_OVERHEAD_S, MAX_OVERHEAD_SHARE * step_s)
        print(f"{clock} time of a step without the meter: {step_s * 1e3:.3f} ms")
        for name, base in DIFFERENCES:
            difference = mean_interval([one[clock, name, base] for one in replicates])
            mean, low, high = difference.value, difference.low, difference.high
            if low is None or high is None:
                raise SystemExit("--replicates: one replicate has no interval; use at least two")
            microseconds = f"{mean * 1e6:.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}]"
            shares = f"{mean / step_s:.3%} [{low / step_s:.3%}, {high / step_s:.3%}]"
            print(f"  {name} against {base}: {microseconds}, {shares}")
            if name == ON and high > limit_s:
                yield f"{clock} time against {base}: up to {high * 1e6:.1f} µs a step, {limit_s * 1e6:.0f} are allowed"


def main() -> int:
    """Measure and print the verdicts and the overhead; return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="A/Bs of identical and of slower scripts")
    parser.add_argument("--replicates", type=int, default=12, help="pairs of processes with and without the meter")
    parser.add_argument("--rounds", type=int, default=130, help="rounds of a replicate, with a turn of each condition")
    parser.add_argument("--turn", type=int, default=3, help="steps of a turn")
    parser.add_argument("--model", default="small", metavar="DIRECTORY", help="default: a step of about 10 ms")
    options = parser.parse_args()
    print_origin()
    violations = [*judge_verdicts(options.tries)] if options.tries else []
    settings = (options.rounds, options.turn, options.model)
    replicates = [measure_replicate(*settings, seed) for seed in range(options.replicates)]
    print(f"meter: {options.replicates} replicates of {options.rounds} rounds of {options.turn} steps")
    return report_violations([*violations, *judge_overhead(replicates)])


if __name__ == "__main__":
    sys.exit(main())
