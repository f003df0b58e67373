"""Where the time of a step, or of a request, goes: its phases between borders, and what runs in them.

On CUDA a border is an event, which the device stamps when it comes to it and the host does not wait for; a phase's time
is then the device's own, with its waiting for launches in it. On a CPU it is a reading of a clock. Under the profiler
it is a mark in the records; they tell a kernel's phase by the host's clock, so the device ends with each phase.

Borders cost something, so plain and bordered steps take turns: both then meet the same machine, and the difference of a
pair is the cost of the borders. The profiler comes last of all, after the requests too, in steps of its own: it slows
down everything, and what it holds stays in the process.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lorameter.records.activity import LEAST_STEP_PAIRS, STEP_PHASES, TRACE, Activity
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import TrainableModel
from lorameter.trial.clock import Stopwatch
from lorameter.trial.data.stream import Batch, TokenStream
from lorameter.trial.process import synchronize
from lorameter.trial.profiling.activity import MARK, activity_of
from lorameter.trial.step import TrainStep

MOST_PAIRS = 128
LEAST_PROFILED, MOST_PROFILED = 3, 12
PROFILED_BUDGET_S = 3.0
"""Steps are profiled for so long, within these numbers: the records of a step take megabytes."""


class Phases:
    """The time of each phase, one after the other or with something between them."""

    def __init__(self, names: Sequence[str], device: str) -> None:
        """`names` are all that there are; `device` is as torch names it."""
        self._names = tuple(names)
        self._device = device
        self._times_s = dict.fromkeys(self._names, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._phase = ""
        self._since: Any = None
        self._mark: Any = None
        self.marked = False
        """Whether phases are marked for the profiler, and not timed."""

    def begin(self, *, marked: bool = False) -> None:
        """Start from zero, in no phase."""
        self._leave()
        self.marked = marked
        self._events = []
        self._times_s = dict.fromkeys(self._names, 0.0)
        synchronize(self._device)

    def turn(self, phase: str) -> None:
        """End the phase that is on, and begin this one; "" begins none."""
        if self.marked:
            if self._mark is not None:
                synchronize(self._device)
            self._leave()
            if phase:
                self._mark = record_function(MARK + phase)
                self._mark.__enter__()
            return
        now = self._stamp()
        if self._phase and self._on_cuda:
            self._events.append((self._phase, self._since, now))
        elif self._phase:
            self._times_s[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Begin with this phase, and end with whatever phase is on then; one that an exception ends has no time."""
        self.turn(phase)
        try:
            yield
            self.turn("")
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """Be in no phase, without a border: nothing is asked of a device that may not answer any more."""
        mark, self._phase, self._since, self._mark = self._mark, "", None, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def times_s(self) -> dict[str, float]:
        """Seconds of each phase since `begin`; the device must have finished."""
        for name, begin, end in self._events:
            self._times_s[name] += begin.elapsed_time(end) / 1e3
        self._events = []
        return self._times_s

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def _stamp(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class BorderedStep(TrainStep):
    """The same step with the time of each of its phases."""

    def __init__(self, trainee: TrainableModel, stream: TokenStream, request: TrialRequest) -> None:
        super().__init__(trainee, stream, request.variant, request.device)
        self.phases = Phases(STEP_PHASES, request.device)

    def take(self) -> Batch:
        """The next batch, on the device."""
        with self.phases.within("data"):
            return super().take()

    def loss(self, batch: Batch) -> torch.Tensor:
        """The forward pass."""
        with self.phases.within("forward"):
            return super().loss(batch)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """The backward pass."""
        with self.phases.within("backward"):
            return super().backward(loss)

    def update(self) -> None:
        """Clipping and the optimizer."""
        with self.phases.within("update"):
            super().update()


class Bordered(Protocol):
    """What is called in phases: a step, or a request."""

    phases: Phases

    def __call__(self) -> Any:
        """Once through all phases."""


def step_times(
    plain: Callable[[], torch.Tensor], bordered: BorderedStep, device: str, *, budget_s: float
) -> dict[str, tuple[float, ...]]:
    """Pairs of a plain and a bordered step, each first in every other pair.

    Returns:
        What `pair_times` does, and `timed_loss` with the losses of all steps in order.
    """

    def samples_of(loss: torch.Tensor, is_plain: bool) -> dict[str, float]:
        return {"timed_loss": float(loss)}

    return pair_times(plain, bordered, device, what="step", samples_of=samples_of, budget_s=budget_s)


def pair_times(
    plain: Callable[[], Any],
    bordered: Bordered,
    device: str,
    *,
    what: str,
    samples_of: Callable[[Any, bool], Mapping[str, float]],
    budget_s: float,
) -> dict[str, tuple[float, ...]]:
    """Pairs of a plain and a bordered call, each first in every other pair.

    Args:
        plain: the call as it is.
        bordered: the same with the times of its phases.
        device: as torch names it.
        what: what a call is, in the names of the samples ("step").
        samples_of: makes samples of a call's result and whether the call was a plain one.
        budget_s: time for pairs; at least `LEAST_STEP_PAIRS` are taken.

    Returns:
        Samples in seconds, one a pair: `plain_WHAT_time_s` with `plain_WHAT_cpu_time_s`, `bordered_WHAT_time_s`,
        `phase_PHASE_s`, and `between_WHATs_s`, from the end of a call to the beginning of the next: reading what it
        gave and keeping its times. Then those of `samples_of`.
    """
    watch = Stopwatch(device)
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def step(*, is_plain: bool, ended_s: float) -> float:
        if not is_plain:
            bordered.phases.begin()
        elif not math.isnan(ended_s):
            keep(f"between_{what}s_s", time.perf_counter() - ended_s)
        given, lap = watch(plain if is_plain else bordered)
        ended_s = time.perf_counter()
        for name, value in samples_of(given, is_plain).items():
            keep(name, value)
        kind = "plain" if is_plain else "bordered"
        keep(f"{kind}_{what}_time_s", lap.time_s)
        keep(f"{kind}_{what}_cpu_time_s", lap.cpu_time_s)
        if not is_plain:
            for phase, seconds in bordered.phases.times_s().items():
                keep(f"phase_{phase}_s", seconds)
        return ended_s

    begin, pair, ended_s = time.perf_counter(), 0, math.nan
    while pair < LEAST_STEP_PAIRS or (pair < MOST_PAIRS and time.perf_counter() - begin < budget_s):
        for is_plain in (True, False) if pair % 2 == 0 else (False, True):
            ended_s = step(is_plain=is_plain, ended_s=ended_s)
        pair += 1
    return {name: tuple(values) for name, values in found.items()}


def profiled(
    bordered: Bordered,
    device: str,
    folder: Path,
    *,
    trace: str = TRACE,
    phase_names: Sequence[str] = STEP_PHASES,
    weights: Mapping[tuple[int, int], str] | None = None,
) -> Activity:
    """What ran in some steps, or requests, under the profiler; their trace is written to `folder`.

    A plain one before them says how many there is time for and makes what the optimizer keeps. Another one is watched
    and not recorded: the profiler's own start is not a step's. It is one session with them, since two on each other's
    heels can collide in CUPTI. One that is without a kernel of the GPU for all that is tried once more.

    `phase_names` and `weights` are those of `lorameter.trial.profiling.activity.activity_of`.
    """

    def session() -> Activity:
        times, events = _session(bordered, device, folder / trace)
        return activity_of(events, times, device, phase_names=phase_names, weights=weights)

    found = session()
    return session() if found.missing else found


def _session(bordered: Bordered, device: str, trace: Path) -> tuple[tuple[float, ...], Any]:
    """Times of the calls that were recorded, and the records. The shapes are for what is copied (`copies`)."""
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    watch = Stopwatch(device)
    times: list[float] = []
    bordered.phases.begin()
    alone_s = watch(bordered)[1].time_s
    steps = min(MOST_PROFILED, max(LEAST_PROFILED, int(PROFILED_BUDGET_S / alone_s)))
    planned = schedule(wait=0, warmup=1, active=steps)
    with profile(activities=activities, schedule=planned, record_shapes=True) as recorded:
        for number in range(1 + steps):
            bordered.phases.begin(marked=True)
            lap = watch(bordered)[1]
            if number:
                times.append(lap.time_s)
            if number < steps:  # the session must still be open when it is read
                recorded.step()
    recorded.export_chrome_trace(str(trace))
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    return tuple(times), () if results is None else results.events()


def useful_tokens(stream: TokenStream, rows: int) -> dict[str, float]:
    """Mean real tokens of a step of `rows` sequences, and its pairs of a query and a key that attention must see."""
    lengths, part = stream.record_lengths(), rows / stream.sequences
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return {"useful_positions": part * sum(lengths), "useful_pairs": part * pairs}


def see_wanted(model: torch.nn.Module, step: Callable[[], object]) -> dict[str, bool | None]:
    """Takes the step and returns the modules that it calls, by their names in transformers' model, with whether
    autograd computes the gradient of their first input (of the first block the layers that take the embeddings have
    none); None if that is no tensor."""
    seen: dict[str, bool | None] = {}

    def look(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].requires_grad if args and isinstance(args[0], torch.Tensor) else None)

        return see

    hooks = [part.register_forward_pre_hook(look(name)) for name, part in peft_methods.wrapped(model).named_modules()]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return seen
