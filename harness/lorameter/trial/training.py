"""The training of one trial in its process: the commands, each a method that returns what it added as a
`PartialRecord`.

Order: build and first step, verify, warm up, timed turns, held-out loss and memory. What a command measures depends on
what the request asks for: a trial that takes turns with others has no first times of its own to report, and an
isolated trial has no turns. The check watches the first step and the first one of the warm-up. Where steps compile, or
several ranks take them, it takes steps of its own after the first one and restores adapter, optimizer and RNG. Its cost
is in no number.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch

import kernels_check
from kernels_check.check import Check
from lorameter.errors import LorameterError
from lorameter.machine.gpus import GENERATIONS
from lorameter.machine.memory import PeakMemoryTracker, host_bytes
from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord, judge_required
from lorameter.stats import is_steady
from lorameter.studies.request import COMMANDS, TrialRequest, words_of
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import TrainableModel, build
from lorameter.trial.building.requirements import requirements_of
from lorameter.trial.building.shared import ActiveAdapter, SharedBase
from lorameter.trial.clock import Lap, Stopwatch
from lorameter.trial.data.stream import Batch, TokenStream
from lorameter.trial.memory import resident_bytes
from lorameter.trial.process import release_unused, start_device
from lorameter.trial.step import TrainStep
from lorameter.trial.telemetry import TrialTelemetry

ISOLATED = "packing.isolated"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a trial has once it is built."""

    trainee: TrainableModel
    step: TrainStep
    stream: TokenStream
    seat: ActiveAdapter


class Training:
    """State of one trial between commands, up to the end of its training; what a library raises is the worker's to
    report.

    `shared` is the base model of the process, on which other trials may have their adapters; each command runs with
    this trial's adapter active and its own random numbers.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = words_of("trial")
    GENERATIONS: ClassVar[int] = GENERATIONS
    """From the process of a trial up to the parent of its run."""

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        self._request = request
        self.shared = shared
        """The base of the process, for the trials that come after."""
        self._watch = Stopwatch(request.device)
        self._gauge = PeakMemoryTracker(request.device)
        self._surroundings = TrialTelemetry(
            request,
            self._take_step,
            lambda: self._built.stream.real_tokens,
            agree=self._agree,
            generations=self.GENERATIONS,
        )
        self._parts: _Parts | None = None
        self._steps_taken = 0
        self._total_steps = 0
        self._watched: kernels_check.Watch | None = None
        """What watches its first two steps, until it has; None where it is checked in steps of its own."""

    def run(self, command: str, **arguments: Any) -> PartialRecord:
        """Carry out a command in this trial's seat. Raises ValueError for a command that does not exist."""
        if command not in self.COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        method: Callable[..., PartialRecord] = getattr(self, command)
        if command == "build":
            return method(**arguments)
        with self._built.seat.taken():
            return self._surroundings.around(COMMANDS[command], lambda: method(**arguments))

    def build(self) -> PartialRecord:
        """Load, attach, take the first step."""
        request, protocol = self._request, self._request.protocol
        baseline, started = host_bytes("VmRSS"), start_device(request.device)
        if self._alone:
            self._gauge.begin()
        loads, conversions, begin = self.shared.loads, self.shared.conversions, time.perf_counter()
        stream = self._open_stream()
        per_step = request.workload.batch_size * request.variant.gradient_accumulation
        self._total_steps = protocol.all_steps(stream.sequences, per_step)
        trainee = self._build_trainee()
        load_time = time.perf_counter() - begin
        if request.variant.rewrites_base:
            peft_methods.save_initial(trainee.model, self._initial)
        if request.interleaving == "shared-base":
            self.shared.remember()
        step = self._make_step(trainee, stream)
        packed = self._packed(stream)
        self._watched = watch_of(request, trainee, packed)
        self._parts = _Parts(trainee, step, stream, ActiveAdapter(trainee.model, trainee.adapter))
        with self._parts.seat.taken():
            memory = {"host_rss_at_start_bytes": baseline} | self._gauge.peaks("load") if self._alone else {}
            with contextlib.nullcontext() if self._watched is None else self._watched.updates_only():
                loss, lap = self._take_step()
            values = {
                "threads": float(request.threads),
                "build_step_time_s": lap.time_s,
                "base_loads": float(self.shared.loads - loads),
                "base_conversions": float(self.shared.conversions - conversions),
            }
            if self._alone:
                values |= {"load_time_s": load_time, "first_step_time_s": lap.time_s, **started}
            values |= self._initial_loss()
        return self._judged(PartialRecord(values=values, memory=memory, samples={"warmup_loss": (loss,)}), [loss])

    def _initial_loss(self) -> dict[str, float]:
        """The base's own loss on held-out records, where a trial can tell it: once a run."""
        request, parts = self._request, self._built
        own = request.variant.rewrites_base or request.variant.trains_base
        if not self._timed or request.replicate or own:
            return {}
        with peft_methods.without_adapter(parts.trainee.model):  # which is what the adapter was before its first step
            return {"held_out_loss_initial": self.shared.once("held_out_loss", parts.step.held_out_loss)}

    def verify(self) -> PartialRecord:
        """Watch a step and judge what the variant claims; a claim that does not hold makes the trial invalid."""
        if self._watched is None:
            return self._check_in_own_steps()
        watched, undecided = self._watch_step(self._watched)
        if watched.status != "ok" or not undecided:
            return watched
        found = self._check_in_own_steps()
        values = dict(found.values)
        values["verify_time_s"] += watched.values["verify_time_s"]
        return msgspec.structs.replace(found, values=values, samples=watched.samples)

    def _check_in_own_steps(self) -> PartialRecord:
        """A check in steps of its own, which are taken back."""
        parts, request = self._built, self._request
        trainee, step, stream = parts.trainee, parts.step, parts.stream
        packed = self._packed(stream)
        position, schedule = stream.position(), trainee.schedule.state_dict()
        batch = None if packed is None else step.inputs(packed)
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        checks, values = self._check(lambda: losses.append(step()), wanted_of(request, trainee, packed), batch)
        release_unused(request.device)
        seconds = time.perf_counter() - begin
        stream.restore(position)
        trainee.schedule.load_state_dict(schedule)
        fragment = PartialRecord(checks=as_data(checks), values={"verify_time_s": seconds, **values})
        diverged = self._judged(fragment, [float(loss) for loss in losses])
        return judge_checks(fragment, checks, request) if diverged.status == "ok" else diverged

    def _packed(self, stream: TokenStream) -> Batch | None:
        """A row of packed records, by which their isolation is judged in evaluation; None where nothing is packed."""
        return stream.packed_batch(1)

    def _watch_step(self, watch: kernels_check.Watch) -> tuple[PartialRecord, bool]:
        """The first step of the warm-up, watched after a glance at the first of the process; and whether it left open
        what is required: under a learning rate that begins at zero no second step shows that both factors learn."""
        begin = time.perf_counter()
        with watch:
            loss, lap = self._take_step()
        checks, self._watched = watch.checks, None
        del watch
        gc.collect()  # what was noted refers to itself; what the heap has got is left to the next step
        values = {"verify_time_s": time.perf_counter() - begin}
        packed = self._packed(self._built.stream)
        # Later replicates call the model alike, and are judged by what their step gives it, if that shows two records.
        shown = any(check.path == ISOLATED and check.status != "unknown" for check in checks)
        if packed is not None and not (shown and (self._request.replicate or not self._timed)):
            probed = kernels_check.probe_isolation(self._built.trainee.model, self._built.step.inputs(packed))
            checks = with_probe(checks, probed)
            values["isolation_probe_time_s"] = time.perf_counter() - begin - values["verify_time_s"]
        fragment = PartialRecord(
            checks=as_data(checks),
            values=values,
            samples={"warmup_step_time_s": (lap.time_s,), "warmup_loss": (loss,)},
        )
        diverged = self._judged(fragment, [loss])  # explains every check that failed with it
        if diverged.status != "ok":
            return diverged, False
        if any(check.required is not None and check.status == "unknown" for check in checks):
            return msgspec.structs.replace(fragment, checks=()), True
        return judge_checks(fragment, checks, self._request), False

    def _check(
        self, step: Callable[[], None], required: Mapping[str, Any], batch: Mapping[str, Any] | None
    ) -> tuple[Sequence[Check], Mapping[str, float]]:
        """What is found of a step, which is left without a trace, and values that come with it."""
        checks = kernels_check.verify(self._built.trainee.model, step, required)
        if batch is not None:  # the rows of the step may hold one record each
            checks = with_probe(checks, kernels_check.probe_isolation(self._built.trainee.model, batch))
        return checks, {}

    def _open_stream(self) -> TokenStream:
        request = self._request
        return TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)

    def _build_trainee(self) -> TrainableModel:
        return build(self._request, steps=self._total_steps, shared=self.shared)

    def _make_step(self, trainee: TrainableModel, stream: TokenStream) -> TrainStep:
        return TrainStep(trainee, stream, self._request.variant, self._request.device)

    def warm_up(self, steps: int | None = None) -> PartialRecord:
        """Steps until their times are steady, or the cap, or just `steps` of them; all are kept, none is timed for the
        result.

        A trial that times no steps takes the fewest: they settle the allocator, whose peaks it is there for.
        """
        protocol = self._request.protocol
        most = protocol.warmup_steps_max if self._timed else protocol.warmup_steps_min
        if self._sees_peaks:
            self._gauge.begin()  # to the last step is the training phase; the check's memory is not in its peak
        times: list[float] = []
        losses: list[float] = []
        taken = self._steps_taken - 1  # one may have been watched
        while len(times) + taken < most if steps is None else len(times) < steps:
            loss, lap = self._take_step()
            times.append(lap.time_s)
            losses.append(loss)
            if steps is None and len(times) + taken >= protocol.warmup_steps_min and is_steady(times):
                break
        return self._judged(
            PartialRecord(
                samples={"warmup_step_time_s": tuple(times), "warmup_loss": tuple(losses)},
                values={"warmup_steady": float(is_steady(times))} if self._timed and steps is None else {},
            ),
            losses,
        )

    def turn(self, steps: int) -> PartialRecord:
        """`steps` timed steps, at least one."""
        stream = self._built.stream
        real, padded = stream.real_tokens, stream.padded_tokens
        accumulated = self._request.variant.gradient_accumulation
        # One look a turn, into its last step: what comes after it waits for nothing.
        taken = [*(self._take_step() for _ in range(steps - 1)), self._take_step(self._surroundings.look)]
        losses = [loss for loss, _ in taken]
        samples = {
            "step_time_s": tuple(lap.time_s for _, lap in taken),
            "step_cpu_time_s": tuple(lap.cpu_time_s for _, lap in taken),
            "timed_loss": tuple(losses),
            "turn_sequences": (float(steps * self._request.workload.batch_size * accumulated),),
            "turn_tokens": (float(stream.real_tokens - real),),
            "turn_padded_tokens": (float(stream.padded_tokens - padded),),
        }
        return self._judged(PartialRecord(samples=samples), losses)

    def train(self, steps: int) -> PartialRecord:
        """`steps` untimed steps of the epochs asked for, or what is left of them."""
        losses = [self._take_step()[0] for _ in range(min(steps, self._total_steps - self._steps_taken))]
        return self._judged(PartialRecord(samples={"remaining_loss": tuple(losses)}), losses)

    def finish_training(self, steps: int | None = None) -> PartialRecord:
        """Peaks of training, the steps that are left to take, exact bytes by kind, held-out loss.

        How long a warm-up lasts depends on noise. Losses are compared between variants, so every trial ends after the
        same number of steps on the same tokens: those of the longest warm-up, or of the epochs asked for; or after
        `steps` of them, where the time does not reach further.
        """
        trainee, step = self._built.trainee, self._built.step
        values = {"trainable_parameters": float(sum(p.numel() for p in trainee.parameters))}
        memory: dict[str, int] = {}
        samples: dict[str, tuple[float, ...]] = {}
        losses: list[float] = []
        if self._sees_peaks:
            memory = self._gauge.peaks("train")
        if self._timed:
            last = self._total_steps if steps is None else min(steps, self._total_steps)
            losses = [self._take_step()[0] for _ in range(last - self._steps_taken)]
            samples["remaining_loss"] = tuple(losses)
            values |= {"training_steps": float(self._steps_taken)}
            values |= {"training_steps_planned": float(self._total_steps)} if last != self._total_steps else {}
        if self._alone:
            # Gradients live only between backward and the optimizer, so they are made once more to be counted.
            step.loss(self._built.stream.take()).backward()
            memory |= resident_bytes(trainee.model, trainee.optimizer)
            trainee.optimizer.zero_grad(set_to_none=True)
        elif self._sees_peaks:
            memory |= resident_bytes(trainee.model, trainee.optimizer)
            del memory["gradient_bytes"]
        if self._timed:
            values["held_out_loss"] = step.held_out_loss()
            losses = [*losses, values["held_out_loss"]]
        return self._judged(PartialRecord(values=values, memory=memory, samples=samples), losses)

    def _agree(self, decision: bool) -> bool:
        """What all processes of the trial decide."""
        return decision

    @property
    def _timed(self) -> bool:
        return "steps" in self._request.measures

    @property
    def _sees_peaks(self) -> bool:
        return "peaks" in self._request.measures

    @property
    def _alone(self) -> bool:
        """Whether the trial is the only one at work, so that first times are its own."""
        return self._sees_peaks and self._request.interleaving != "lockstep"

    @property
    def _initial(self) -> Path:
        return Path(self._request.scratch) / "initial"

    @property
    def _built(self) -> _Parts:
        if self._parts is None:
            raise LorameterError(f"trial {self._request.trial}: asked to run before it was built")
        return self._parts

    def _take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        loss, lap = self._watch(self._built.step, meanwhile)
        self._steps_taken += 1
        return float(loss), lap

    def _judged(self, fragment: PartialRecord, losses: list[float]) -> PartialRecord:
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self._steps_taken - len(losses) + offset + 1
                message = (
                    f"the loss is {loss} near step {step}; a diverged run has no result. Lower learning_rate (now "
                    f"{self._request.variant.learning_rate:g}) or set max_grad_norm."
                )
                return fragment.failed("invalid", Failure(phase="train", kind="LossNotFinite", message=message))
        return fragment


# --- checks -----------------------------------------------------------------------------------------------------------


def wanted_of(request: TrialRequest, trainee: TrainableModel, packed: Batch | None) -> dict[str, Any]:
    """Requirements by path; `packed` is what the isolation of records is probed with."""
    shapes = tuple(parameter.numel() for parameter in trainee.parameters)
    on_linear = peft_methods.is_on_linear(trainee.model)
    own = requirements_of(request.variant, shapes, packed=packed is not None, on_linear=on_linear)
    return own | request.requirements


def watch_of(request: TrialRequest, trainee: TrainableModel, packed: Batch | None) -> kernels_check.Watch | None:
    """What watches the first two steps of a trial; None where it is checked in steps of its own: where they compile, or
    several ranks take them."""
    if request.variant.compile or request.workload.ranks > 1:
        return None
    return kernels_check.watch(trainee.model, wanted_of(request, trainee, packed))


def with_probe(checks: Sequence[Check], probed: Check) -> list[Check]:
    """The checks of a step, one of which was probed by forward passes as well; a fault that the step shows stays."""
    return [
        probed if check.path == probed.path and check.status in ("active", "unknown") else check for check in checks
    ]


def judge_checks(fragment: PartialRecord, checks: Sequence[Check], request: TrialRequest) -> PartialRecord:
    """The fragment that holds the checks, invalid where a required path is not active."""
    judged: Mapping[str, Any] = {check.path: check.required for check in checks if check.required is not None}
    return judge_required(fragment, judged, name=request.variant.name, allow_fallback=request.allow_fallback)


def as_data(checks: Sequence[Check]) -> tuple[dict[str, Any], ...]:
    """The checks as a record holds them."""
    return tuple(codec.to_json(check) for check in checks)
