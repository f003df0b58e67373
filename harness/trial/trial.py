"""One trial in its process: the commands, each a method that returns what it added as a `Fragment`.

Order: build and first step, verify, warm up, timed turns, held-out loss and memory, inference. What a command measures
depends on what the request asks for: a trial that takes turns beside others has no peaks of its own to report, and a
solo trial has no turns. The first step comes
before the check so that its time is that of a process's first step; the check leaves adapter, optimizer and RNG as it
found them, and its cost is in no number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import kernels_check
from harness.errors import LorameterError
from harness.machine.memory import MemoryGauge, host_bytes
from harness.records import codec
from harness.records.record import Failure, Fragment
from harness.records.required import judge_required
from harness.stats import is_steady
from harness.studies.command import COMMANDS, words_of
from harness.studies.request import TrialRequest
from harness.trial.building import lora
from harness.trial.building.build import Trainee, build
from harness.trial.building.packing import is_packed, unpack_4bit
from harness.trial.building.requirements import requirements_of
from harness.trial.building.shared import Seat, SharedBase
from harness.trial.clock import Lap, Stopwatch
from harness.trial.data.stream import TokenStream
from harness.trial.inference.proof import prove_attention, prove_mixing
from harness.trial.inference.server import Server
from harness.trial.memory import resident_bytes
from harness.trial.process import release_unused, start_device
from harness.trial.step import TrainStep
from harness.trial.surroundings import Surroundings
from kernels_check.check import Check


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a trial has once it is built."""

    trainee: Trainee
    step: TrainStep
    stream: TokenStream
    seat: Seat


class Trial:
    """State of one trial between commands; what a library raises is the worker's to report.

    `shared` is the base model of the process, on which other trials may have their adapters; each command runs with
    this trial's adapter active and its own random numbers.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = words_of("trial")

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        self._request = request
        self.shared = shared
        """The base of the process, for the trials that come after."""
        self._watch = Stopwatch(request.device)
        self._gauge = MemoryGauge(request.device)
        self._surroundings = Surroundings(request, self._take_step, lambda: self._built.stream.real_tokens)
        self._parts: _Parts | None = None
        self._steps_taken = 0
        self._total_steps = 0
        self._server: Server | None = None

    def run(self, command: str, **arguments: Any) -> Fragment:
        """Carry out a command in this trial's seat. Raises ValueError for a command that does not exist."""
        if command not in self.COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        method: Callable[..., Fragment] = getattr(self, command)
        if command == "build":
            return method(**arguments)
        with self._built.seat.taken():
            return self._surroundings.around(COMMANDS[command], lambda: method(**arguments))

    def build(self) -> Fragment:
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
            lora.save_initial(trainee.model, self._initial)
        if request.interleaving == "shared-base":
            self.shared.remember()
        step = self._make_step(trainee, stream)
        self._parts = _Parts(trainee, step, stream, Seat(trainee.model, trainee.adapter))
        with self._parts.seat.taken():
            memory = {"host_baseline_bytes": baseline} | self._gauge.peaks("load") if self._alone else {}
            loss, lap = self._take_step()
            values = {
                "threads": float(request.threads),
                "base_loads": float(self.shared.loads - loads),
                "base_conversions": float(self.shared.conversions - conversions),
            }
            if self._alone:
                values |= {"load_time_s": load_time, "first_step_time_s": lap.time_s, **started}
            if (
                self._timed and request.replicate == 0 and not request.variant.rewrites_base
            ):  # the base's: never another
                with lora.without_adapter(trainee.model):  # which is what the adapter was before its first step
                    values["held_out_loss_initial"] = self.shared.once("held_out_loss", step.held_out_loss)
        return self._judged(Fragment(values=values, memory=memory, samples={"warmup_loss": (loss,)}), [loss])

    def verify(self) -> Fragment:
        """Watch a step and judge what the variant claims; a claim that does not hold makes the trial invalid."""
        parts, request = self._built, self._request
        trainee, step, stream = parts.trainee, parts.step, parts.stream
        packed = stream.packed_batch()
        shapes = tuple(parameter.numel() for parameter in trainee.parameters)
        required = requirements_of(request.variant, shapes, packed=packed is not None) | request.requirements
        position, schedule = stream.position(), trainee.schedule.state_dict()
        batch = None if packed is None else step.inputs(packed)
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        checks, values = self._check(lambda: losses.append(step()), required, batch)
        release_unused(request.device)
        seconds = time.perf_counter() - begin
        stream.restore(position)
        trainee.schedule.load_state_dict(schedule)
        found = tuple(codec.to_json(check) for check in checks)
        fragment = Fragment(checks=found, values={"verify_time_s": seconds, **values})
        diverged = self._judged(fragment, [float(loss) for loss in losses])
        if diverged.status != "ok":  # explains every check that failed with it
            return diverged
        # What only a profile tells is no row of a step under the spy: the replicate that was profiled judged it.
        judged = {check.path: check.required for check in checks if check.required is not None}
        return judge_required(fragment, judged, name=request.variant.name, allow_fallback=request.allow_fallback)

    def _check(
        self, step: Callable[[], None], required: Mapping[str, Any], batch: Mapping[str, Any] | None
    ) -> tuple[Sequence[Check], Mapping[str, float]]:
        """What is found of a step, which is left without a trace, and values that come with it."""
        model, instrument = self._built.trainee.model, self._request.instrument
        return kernels_check.verify(model, step, required, batch=batch, instrument=instrument), {}

    def _open_stream(self) -> TokenStream:
        request = self._request
        return TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)

    def _build_trainee(self) -> Trainee:
        return build(self._request, steps=self._total_steps, shared=self.shared)

    def _make_step(self, trainee: Trainee, stream: TokenStream) -> TrainStep:
        return TrainStep(trainee, stream, self._request.variant, self._request.device)

    def warm_up(self) -> Fragment:
        """Steps until their times are steady, or the cap; all are kept, none is timed for the result.

        A trial that times no steps takes the fewest: they settle the allocator, whose peaks it is there for.
        """
        protocol = self._request.protocol
        if self._alone:
            self._gauge.begin()  # to the last step is the training phase; the check's memory is not in its peak
        times: list[float] = []
        losses: list[float] = []
        while len(times) < (protocol.warmup_steps_max if self._timed else protocol.warmup_steps_min):
            loss, lap = self._take_step()
            times.append(lap.time_s)
            losses.append(loss)
            if len(times) >= protocol.warmup_steps_min and is_steady(times):
                break
        fragment = Fragment(
            samples={"warmup_step_time_s": tuple(times), "warmup_loss": tuple(losses)},
            values={"warmup_steady": float(is_steady(times))} if self._timed else {},
        )
        return self._judged(fragment, losses)

    def turn(self, steps: int) -> Fragment:
        """`steps` timed steps, at least one."""
        stream = self._built.stream
        real, padded = stream.real_tokens, stream.padded_tokens
        accumulated = self._request.variant.gradient_accumulation
        # One look a turn, into its last step: what comes after it waits for nothing.
        taken = [*(self._take_step() for _ in range(steps - 1)), self._take_step(self._surroundings.look)]
        losses = [loss for loss, _ in taken]
        counts = {"real_tokens": stream.real_tokens - real, "padded_tokens": stream.padded_tokens - padded}
        samples = {
            "step_time_s": tuple(lap.time_s for _, lap in taken),
            "step_cpu_time_s": tuple(lap.cpu_time_s for _, lap in taken),
            "train_loss": tuple(losses),
            "turn_sequences": (float(steps * self._request.workload.batch_size * accumulated),),
        } | {f"turn_{key}": (float(value),) for key, value in counts.items()}
        return self._judged(Fragment(samples=samples), losses)

    def train(self, steps: int) -> Fragment:
        """`steps` untimed steps of the epochs asked for, or what is left of them."""
        losses = [self._take_step()[0] for _ in range(min(steps, self._total_steps - self._steps_taken))]
        return self._judged(Fragment(samples={"catch_up_loss": tuple(losses)}), losses)

    def finish_training(self, steps: int | None = None) -> Fragment:
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
        if self._alone:
            memory = self._gauge.peaks("train")
        if self._timed:
            last = self._total_steps if steps is None else min(steps, self._total_steps)
            losses = [self._take_step()[0] for _ in range(last - self._steps_taken)]
            samples["catch_up_loss"] = tuple(losses)
            values |= {"training_steps": float(self._steps_taken)}
            values |= {"training_steps_planned": float(self._total_steps)} if last < self._total_steps else {}
        if self._alone:
            # Gradients live only between backward and the optimizer, so they are made once more to be counted.
            step.loss(self._built.stream.take()).backward()
            memory |= resident_bytes(trainee.model, trainee.optimizer)
            trainee.optimizer.zero_grad(set_to_none=True)
        if self._timed:
            values["held_out_loss"] = step.held_out_loss()
            losses = [*losses, values["held_out_loss"]]
        return self._judged(Fragment(values=values, memory=memory, samples=samples), losses)

    def save_adapter(self) -> Fragment:
        """Write the trained adapter where a new interpreter will load it from."""
        initial = self._initial if self._request.variant.rewrites_base else None
        lora.save(self._built.trainee.model, Path(self._request.scratch) / "adapter", initial=initial)
        return Fragment()

    def begin_generate(self) -> Fragment:
        """First call and the discarded requests after it. Training has ended: the optimizer's state is let go."""
        trainee, protocol = self._built.trainee, self._request.protocol
        trainee.model.eval()
        if self._request.variant.merge_adapter:
            lora.merge(trainee.model)
        trainee.optimizer.state.clear()  # a server holds none, so it is not in the peak
        release_unused(self._request.device)
        if self._alone:
            self._gauge.begin()
        self._server = Server(trainee.model, trainee.adapter, self._built.stream, self._request)
        first = self._server.warm_up(1 + protocol.generate_warmup)
        values = {
            "new_tokens": float(self._request.workload.new_tokens),
            "request_batch": float(self._request.workload.request_batch),
            "packed_4bit_decode": float(is_packed(trainee.model)),
        }
        if self._alone:
            values["first_call_time_s"] = first.request_time_s
        if "natural" in self._request.measures and self._request.device.startswith("cuda"):
            self._server.visit(protocol.natural_requests)
        fragment = Fragment(values=values, tokens={"completion": list(first.tokens)})
        fragment = prove_attention(fragment, trainee.model, self._server, self._request)
        return prove_mixing(fragment, self._server, self._request)

    def request(self) -> Fragment:
        """One warm request, by the adapter beside the base or, after `merge`, merged into it."""
        return Fragment(samples=self._serving.request())

    def natural(self) -> Fragment:
        """One request that the model ends itself; its answer goes into the record."""
        index, request = self._serving.natural()
        samples: dict[str, tuple[float, ...]] = {
            "natural_request_time_s": (request.request_time_s,),
            "natural_first_token_time_s": (request.first_token_time_s,),
            "natural_tokens": (float(len(request.tokens)),),
        }
        return Fragment(samples=samples, tokens={f"answer_{index}": list(request.tokens)})

    def untrained(self) -> Fragment:
        """The answers to the same prompts before training: those of the base without an adapter."""
        if self._request.variant.rewrites_base or self._request.variant.merge_adapter:
            return Fragment()

        def answers() -> dict[str, list[int]]:
            with lora.without_adapter(self._built.trainee.model):
                return {f"untrained_{index}": list(server.answer(index).tokens) for index in server.answered}

        server = self._serving
        return Fragment(tokens=self.shared.once("answers", answers))

    def end_generate(self) -> Fragment:
        """Peaks of generation."""
        return Fragment(memory=self._gauge.peaks("generate"))

    def merge(self) -> Fragment:
        """Merge the adapter into the base and warm up again. Ends the trial: the base is changed."""
        self._serving.merge(discard=1 + self._request.protocol.generate_warmup)
        return Fragment()

    def close(self) -> Fragment:
        """The last word of a trial on a base that others share: the base must be what it was."""
        unpack_4bit(self._built.trainee.model)
        if self.shared.unchanged():
            return Fragment()
        message = "the base's weights changed while trials shared it, so none of them is what it would be alone"
        return Fragment().failed("invalid", Failure(phase="close", kind="BaseChanged", message=message))

    @property
    def _timed(self) -> bool:
        return "steps" in self._request.measures

    @property
    def _alone(self) -> bool:
        return "peaks" in self._request.measures

    @property
    def _initial(self) -> Path:
        return Path(self._request.scratch) / "initial"

    @property
    def _built(self) -> _Parts:
        if self._parts is None:
            raise LorameterError(f"trial {self._request.trial}: asked to run before it was built")
        return self._parts

    @property
    def _serving(self) -> Server:
        if self._server is None:
            raise LorameterError(f"trial {self._request.trial}: asked for a request before generation began")
        return self._server

    def _take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        loss, lap = self._watch(self._built.step, meanwhile)
        self._steps_taken += 1
        return float(loss), lap

    def _judged(self, fragment: Fragment, losses: list[float]) -> Fragment:
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self._steps_taken - len(losses) + offset + 1
                message = (
                    f"the loss is {loss} near step {step}; a diverged run has no result. Lower learning_rate (now "
                    f"{self._request.variant.learning_rate:g}) or set max_grad_norm."
                )
                return fragment.failed("invalid", Failure(phase="train", kind="LossNotFinite", message=message))
        return fragment
