"""A machine in simulated time that takes what a real one has taken: two idle cores and six variants of a real model.

Commands cost what they were measured to cost, in steps where they are made of steps: a check under the profiler of two
natural steps, the probe of packed records, the base's held-out loss. Two processes at once take `beside` times as long
as each alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

from harness.records.record import Fragment
from harness.run.executors import Place
from harness.studies.protocol import Protocol
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.studies.workload import Workload

NAMES = ("bf16-r8", "bf16-r64", "bf16-dora", "nf4-r8", "nf4-r64", "nf4-dora")
ATTACHING_S, GLANCE, WATCHED, PROFILED, PROBE, LOSS = 0.3, 1.05, 1.35, 1.9, 3.5, 0.75
"""Seconds of attaching an adapter; steps that one is worth whose update is looked at, a watched and a profiled one, the
probe of packed records, a held-out loss."""
FIRST = 1.3
"""The first step of a process over a later one."""
SCATTER = 0.012
"""Of the steps of one process."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Seconds by variant of a step, a request, a merged one and a cold start, and what comes before everything."""

    steps: tuple[float, ...]
    requests: tuple[float, ...]
    merged: tuple[float, ...]
    colds: tuple[float, ...]
    preparing: float
    beside: float = 1.08

    def of(self, kind: str, trial: str) -> float:
        """Of a trial, by its name."""
        name = trial.partition("-")[2].removesuffix("-solo").removesuffix("-control")
        return getattr(self, kind)[NAMES.index(name)]


SMOLLM2 = Figures(
    steps=(1.84, 2.22, 2.32, 1.89, 2.26, 2.63), requests=(1.29, 1.49, 11.7, 1.0, 1.18, 12.4),
    merged=(1.05, 1.05, 1.02, 0.76, 0.77, 0.8), colds=(6.5, 5.8, 16.2, 8.7, 8.5, 18.6), preparing=7.0,
)  # fmt: skip
"""SmolLM2-135M on two cores of an AMD EPYC with nothing beside it."""
GEMMA3 = Figures(
    steps=(2.6, 2.9, 3.1, 2.7, 3.0, 3.4), requests=(2.4, 2.6, 14.0, 2.2, 2.4, 15.0),
    merged=(1.9, 1.9, 1.9, 1.6, 1.6, 1.6), colds=(35.0, 35.0, 50.0, 40.0, 40.0, 55.0), preparing=60.0,
)  # fmt: skip
"""Gemma 3 270M from a GGUF file, which a cold start dequantises."""


def study_of(limit_s: float) -> Study:
    """The six variants, with a limit."""
    variants = tuple(
        Variant(
            name=name,
            r=64 if name.endswith("r64") else 8,
            use_dora=name.endswith("dora"),
            quantization="nf4" if name.startswith("nf4") else "none",
        )
        for name in NAMES
    )
    protocol = Protocol(replicates=12, max_minutes=limit_s / 60)
    return Study(
        name="six", title="six", workload=Workload(model="smollm2-135m"), variants=variants, reference="bf16-r8",
        protocol=protocol,
    )  # fmt: skip


@dataclass
class Machine:
    """Executor of such a machine; its workers are asked in two halves."""

    figures: Figures
    now: float = 0.0
    asked: list[tuple[float, str, str]] = field(default_factory=list)
    requests: dict[str, dict] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    drawn: random.Random = field(default_factory=lambda: random.Random(7))

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def make_place(self, trial, log):
        """A name."""
        return Place(scratch=trial, log_path=log)

    def clear_place(self, trial):
        """Nothing is there."""

    def launch(self):
        """A fork."""
        self.now += 0.02
        return Worker(self)

    def cold_start(self, request):
        """A new interpreter."""
        self.now += self.figures.of("colds", request.trial)
        return Fragment(samples={"cold_start_time_s": (self.figures.of("colds", request.trial),)})

    def takes(self, trial, command, arguments) -> float:
        """Seconds of a command."""
        if command == "prepare":
            self.requests[trial] = arguments["request"]
            return 0.02
        step, request = self.figures.of("steps", trial), self.figures.of("requests", trial)
        if command == "turn":
            return arguments["steps"] * step
        if command == "request":
            return self.figures.of("merged", trial) if trial in self.merged else request
        untimed = {
            "build": lambda: ATTACHING_S + step * self._built(trial),
            "verify": lambda: step * self._checked(trial),
            "warm_up": lambda: step * self.warm_up(trial, arguments),
            "finish_training": lambda: step * LOSS * arguments.get("held_out", True),
            "begin_generate": lambda: (0.3 if arguments.get("brief") else 2.3) * request + 1.0,
            "merge": lambda: 1.3 + (0.2 if arguments.get("brief") else 2.0) * self.figures.of("merged", trial),
        }.get(command, lambda: 0.01)
        return self.figures.beside * untimed()

    def _built(self, trial) -> float:
        asked = self.requests[trial]
        loss = LOSS * (asked.get("asks_base", True) and asked["replicate"] == 0 and "steps" in asked["measures"])
        return FIRST * (GLANCE if asked.get("natural") else 1.0) + loss

    def _checked(self, trial) -> float:
        asked = self.requests[trial]
        own = 0.0 if asked.get("natural") else 1.0  # steps that are taken back
        if asked["instrument"] == "profile":
            return PROFILED + own + PROBE * asked.get("asks_base", True)
        return WATCHED + own

    def warm_up(self, trial, arguments) -> int:
        """Steps of a warm-up, but for one that was watched."""
        asked = self.requests[trial]
        if asked.get("warm_up_steps") is not None:
            return asked["warm_up_steps"] - 1
        return 3 if "steps" not in asked["measures"] else 2 if arguments.get("brief") else 7

    def answers(self, trial, command, arguments) -> Fragment:
        """What comes of it."""
        self.asked.append((self.now, trial, command))
        if command == "merge":
            self.merged.add(trial)
        if command == "prepare":
            return Fragment()
        step = self.figures.of("steps", trial)
        if command == "build":
            return Fragment(values={"build_step_time_s": FIRST * GLANCE * step})
        if command == "verify" and self.requests[trial].get("natural"):
            return Fragment(samples={"warmup_step_time_s": (2 * step,)})
        if command == "warm_up":
            return Fragment(samples={"warmup_step_time_s": (step,) * self.warm_up(trial, arguments)})
        if command == "turn":
            times = tuple(step * self.drawn.gauss(1.0, SCATTER) for _ in range(arguments["steps"]))
            return Fragment(samples={"step_time_s": times, "step_cpu_time_s": times})
        if command == "begin_generate" and arguments.get("brief"):
            return Fragment(values={"foreseen_request_time_s": self.figures.of("requests", trial)})
        if command == "merge" and arguments.get("brief"):
            return Fragment(values={"foreseen_merged_request_time_s": self.figures.of("merged", trial)})
        return Fragment(samples={"request_time_s": (1.0,)}) if command == "request" else Fragment()


class Worker:
    """Is at work from when it is asked until it has taken its time; whoever waits for it moves the clock."""

    start_latency_s = 0.01

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._always = os.open(os.devnull, os.O_RDONLY)

    def fileno(self):
        """Of something that can always be read: in simulated time the one asked first has answered first."""
        return self._always

    def ask(self, command, trial, timeout_s, **arguments):
        """Both halves."""
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command, trial, **arguments):
        """Begin."""
        self._asked = trial, command, arguments
        self._due = self._machine.now + self._machine.takes(trial, command, arguments)

    def receive(self, command, timeout_s):
        """Have ended."""
        self._machine.now = max(self._machine.now, self._due)
        return self._machine.answers(*self._asked)

    def close(self):
        """Gone."""
        os.close(self._always)
