"""What a meter costs a step: a training with it and without, taking turns.

Two processes run one script, the second with the hook and its writer. In this one the meter is on for some turns and
taken off for others: its callback, its hooks and the methods that it times are gone then, and what is left is the
script. All take turns of some steps, and each says how long it was from the begin of a step to that of the next, on the
wall and on its CPUs, so that all that the meter does in a step and between two is in it. The first step of a turn finds
the caches as the others have left them, which no training does that runs by itself: it is not counted, unless a turn is
one step, as of a model whose step is far longer than it takes to fill a cache. Turns are short, since neighbours of the
machine come and go within a second. What the meter does for many steps in one of them, telling its follower, is timed
by itself, left out of that one and added to each by its share. The order is shuffled in each round, and the differences
of a round are paired.

A replicate is the median of its rounds, all of it is started anew for the next one, on the next CPU, and the mean of
the replicates stands with Student's 95 % interval. What is judged is the upper end of the interval of the difference
between on and off, and of that between on and the script alone, both on the wall, which is what a step takes, and on
the CPUs: at most 0.5 % of a step, or 100 µs of a shorter one. Off, which has two turns of a round, against off again
says what no difference looks like. Between the two processes the interval is wider, as they differ by where their
memory lies; but what the meter did to a process for good is seen there alone.

    python benchmarks/selftest/meter_live.py [--replicates N] [--rounds N] [--turn STEPS] [--model DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.attach.child import environment
from harness.attach.variables import COMMAND, RUN
from harness.machine.provenance import origin_of
from harness.machine.seating import cpus_of, seat
from harness.stats import mean_interval

ROOT = Path(__file__).parents[2]
LIMIT_S, LIMIT_SHARE = 100e-6, 0.005
ALONE, OFF, AGAIN, ON = "alone", "off", "off again", "on"
"""The script alone, in a process of its own; the meter taken off, twice; the meter on."""
BOTH = "off twice"
"""The mean of both turns without it."""
TURNS = (ALONE, OFF, AGAIN, ON)
DIFFERENCES = ((AGAIN, OFF), (ON, BOTH), (ON, ALONE))
KINDS = ("wall", "CPU")
WARM_UP = 20
"""Steps before the rounds: the meter's own warm-up, which has 13 at most, and those that it watches."""
SCRIPT = Path(__file__).with_name("meter_script.py")


class Arm:
    """One process of the script."""

    def __init__(
        self, folder: Path, steps: int, model: str, *, wrapped: bool, under: Sequence[str] = (), **variables: str
    ) -> None:
        """`under`: the command that runs it; `variables`: of its environment."""
        variables, name = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}, "plain"
        if wrapped:
            told = {RUN: str(folder / "runs" / "run"), COMMAND: f"python {SCRIPT.name}"}
            variables, name = environment(variables, variables=told), "wrapped"
        command = [*under, sys.executable, str(SCRIPT), model, str(steps), str(folder / name)]
        self.followed = 0.0
        self.told: tuple[float, dict[str, float]] = 0.0, {}
        """Of how many steps the follower was told so far, and how long that took."""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
        )

    def wait(self) -> str:
        """Its next word."""
        for line in self.process.stdout or ():
            if line.startswith(("ready", "took")):
                return line
        raise SystemExit(f"a process has ended with {self.process.wait()} before its turns had")

    def turn(self, name: str, steps: int) -> dict[str, float]:
        """Its next steps; the mean of each kind of time."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{'on' if name == ON else 'off'} {steps}\n")
        self.process.stdin.flush()
        followed, told, telling, telling_cpu, *clocks = map(float, self.wait().split()[1:])
        self.told = told, {"wall": telling, "CPU": telling_cpu}
        if followed - self.followed != (steps if name == ON else 0):
            raise SystemExit(f"the meter has followed {followed - self.followed:.0f} steps of a turn with it {name}")
        self.followed, found = followed, {}
        for kind, seen in zip(KINDS, (clocks[::2], clocks[1::2]), strict=True):
            spent = [later - earlier for earlier, later in itertools.pairwise(seen)]
            found[kind] = statistics.fmean(spent[1:] or spent)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Medians over the rounds, in seconds a step, by the kind of time."""

    steps: dict[str, float]
    """Of a step alone."""
    extra: dict[tuple[str, str, str], float]
    """Of the paired differences, of one kind of turn from another."""
    telling: dict[str, float]
    """What it takes to tell of a step, which is in the differences of `ON`."""
    written: bool
    """Whether the wrapped process has left a run."""


def take_turns(rounds: int, turn: int, model: str, seed: int) -> Replicate:
    """Start both processes and let them alternate, so many steps a turn."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runs").mkdir()
        length = WARM_UP + (rounds + 1) * turn * len(TURNS) + 2
        plain, wrapped = (Arm(folder, length, model, wrapped=one) for one in (False, True))
        cpus = cpus_of(os.getpid())
        for arm in (plain, wrapped):
            arm.wait()
            seat(arm.process.pid, {cpus[seed % len(cpus)]})
        plain.turn(ALONE, WARM_UP)
        wrapped.turn(ON, WARM_UP)
        number, telling = wrapped.told
        shuffled, found = random.Random(seed), []
        for _ in range(1 + rounds):
            order = shuffled.sample(TURNS, len(TURNS))
            found.append({name: (plain if name == ALONE else wrapped).turn(name, turn) for name in order})
        for arm in (plain, wrapped):
            arm.process.kill()
            arm.process.wait()
        written = (folder / "runs" / "run" / "manifest.json").is_file()
    if wrapped.told[0] == number:
        raise SystemExit("--rounds: the meter has told of no step in so few; make more")
    shares = {kind: (wrapped.told[1][kind] - telling[kind]) / (wrapped.told[0] - number) for kind in KINDS}
    counted = found[1:]  # the first has what is read once
    for one in counted:
        one[ON] = {kind: one[ON][kind] + shares[kind] for kind in KINDS}
        one[BOTH] = {kind: (one[OFF][kind] + one[AGAIN][kind]) / 2 for kind in KINDS}
    return Replicate(
        steps={kind: statistics.median(one[ALONE][kind] for one in counted) for kind in KINDS},
        extra={
            (kind, name, base): statistics.median(one[name][kind] - one[base][kind] for one in counted)
            for kind in KINDS
            for name, base in DIFFERENCES
        },
        telling=shares,
        written=written,
    )


def main() -> int:
    """Take turns, print what was found, and say whether the limit was held."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--replicates", type=int, default=40)
    options.add_argument("--rounds", type=int, default=130)
    options.add_argument("--turn", type=int, default=3, help="steps of a turn")
    options.add_argument("--model", default="small", help="a directory with a model; default: a step of about 10 ms")
    chosen = options.parse_args()
    print(origin_of(ROOT), flush=True)
    found = [take_turns(chosen.rounds, chosen.turn, chosen.model, seed) for seed in range(chosen.replicates)]
    written = all(one.written for one in found)
    model = Path(chosen.model).name
    size = f"{len(found)} replicates of {chosen.rounds} rounds of {chosen.turn} steps"
    print(f"{model}: {size}, every run written: {written}")
    broken = []
    for kind in KINDS:
        step = statistics.fmean(one.steps[kind] for one in found)
        print(f"{kind} time of a step alone {step * 1e3:.3f} ms")
        telling, low, high = interval_of([one.telling[kind] for one in found])
        print(f"  telling of it, which is in {ON}, {telling * 1e6:.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}] a step")
        for name, base in DIFFERENCES:
            mean, low, high = interval_of([one.extra[kind, name, base] for one in found])
            print(
                f"  {name:9} against {base:9} {mean * 1e6:8.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}] a step, "
                f"{mean / step:.3%} [{low / step:.3%}, {high / step:.3%}]"
            )
            if name == ON and high > limit_of(step):
                broken.append(f"{kind} time: against {base} at most {high * 1e6:.1f} µs a step")
    limit = f"limit: {LIMIT_S * 1e6:.0f} µs or {LIMIT_SHARE:.1%} of a step"
    print(f"{limit}: {'NOT HELD: ' + '; '.join(broken) if broken else 'held'}")
    return 0 if written and not broken else 1


def interval_of(replicates: Sequence[float]) -> tuple[float, float, float]:
    """Their mean, and both ends of its interval."""
    mean, low, high = mean_interval(replicates)
    if low is None or high is None:
        raise SystemExit("--replicates: one has no interval; make two at least")
    return mean, low, high


def limit_of(step_s: float) -> float:
    """The most that a meter may cost such a step, in seconds."""
    return max(LIMIT_S, LIMIT_SHARE * step_s)


if __name__ == "__main__":
    sys.exit(main())
