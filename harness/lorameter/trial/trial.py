"""A trial in its process: the commands of training and requests, each a method that returns a `PartialRecord`.

Order: build and first step, verify, warm up, timed turns, held-out loss and memory; then requests. The measures of a
command depend on the request: a trial that takes turns with others has no first times, and an isolated trial has no
turns and times its adapter merged. The check watches the first step and the first warm-up step. If steps are compiled,
or run on several ranks, it runs additional steps after the first one and restores adapter, optimizer and random state.
No metric includes its cost.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch

import kernels_check
from kernels_check.check import Check
from kernels_check.observe.modules import RandomState
from lorameter.machine.host import PeakMemoryTracker, host_bytes
from lorameter.machine.nvml import GENERATIONS
from lorameter.records.record import Failure, PartialRecord
from lorameter.stats import is_steady
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import is_packed, unpack_4bit
from lorameter.trial.building.build import SharedBase, build, build_requirements, judge_checks
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.memory import resident_bytes
from lorameter.trial.process import Lap, Stopwatch, TrialTelemetry, release_unused, synchronize
from lorameter.trial.serving.server import Server, check_adapters, check_attention
from lorameter.trial.step import TrainStep, model_inputs

ISOLATED = "packing.isolated"


class Trial:
    """State of one trial between commands. Exceptions propagate to the worker, which reports them.

    `shared` is the base model of the process, on which other trials may also have adapters; each command runs with this
    trial's adapter active and with its own random state. `generations` counts the process generations up to the parent
    of its run; `rank` is that of this process among the ranks of the workload. `build` makes the model and its step,
    and `begin_generate` the server.
    """

    STEP: ClassVar[type[TrainStep]] = TrainStep

    def __init__(
        self, request: TrialRequest, shared: SharedBase, *, generations: int = GENERATIONS, rank: int = 0
    ) -> None:
        self._request = request
        self._rank = rank
        self.shared = shared
        """The base of the process, also for later trials."""
        self._timed = "steps" in request.measures
        self._alone = "peaks" in request.measures
        """Whether no other trial runs in its process, so that it measures memory peaks and its own first times."""
        self._initial = Path(request.scratch) / "initial" if request.variant.rewrites_base else None
        """The folder of the untrained adapter, to which the trained adapter is relative."""
        self._watch = Stopwatch(request.device)
        self._gauge = PeakMemoryTracker(request.device)
        self._telemetry = TrialTelemetry(
            request,
            self._take_step,
            lambda: self._stream.real_tokens,
            agree=self._agree,
            generations=generations,
        )
        self._random: RandomState | None = None
        """Its random state; None before its first step."""
        self._steps_taken = 0
        self._total_steps = 0
        self._watched: kernels_check.Watch | None = None
        """Watches its first two steps; None afterwards, and if the check runs additional steps."""

    def run(self, command: str, **arguments: Any) -> PartialRecord:
        """Execute a command with this trial's adapter."""
        method: Callable[..., PartialRecord] = getattr(self, command)
        if command == "build":
            return method(**arguments)
        with self._active():
            return self._telemetry.around(COMMANDS[command], lambda: method(**arguments))

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        """Activate this trial's adapter and its random state, which is saved for the next command."""
        peft_methods.activate(self._trainee.model, self._trainee.adapter)
        if self._random is not None:
            self._random.restore()
        try:
            yield
        finally:
            self._random = RandomState()

    def build(self) -> PartialRecord:
        """Load the base, attach the adapter, and run the first step."""
        request, shared = self._request, self.shared
        baseline, begin = host_bytes("VmRSS"), time.perf_counter()
        synchronize(request.device)  # CUDA creates its context here, which would otherwise be in the load time
        device_start_s = time.perf_counter() - begin
        if self._alone:
            self._gauge.begin()
        loads, begin = shared.model is None, time.perf_counter()
        stream = TokenStream(
            Path(request.tokens_path), request.workload, request.variant, request.device, rank=self._rank,
            ranks=request.workload.ranks,
        )  # fmt: skip
        per_step = request.workload.batch_size * request.variant.gradient_accumulation
        self._total_steps = request.protocol.all_steps(stream.sequences, per_step)
        trainee = build(
            request, steps=self._total_steps, shared=shared, distribute=lambda model: self._distribute(model, stream),
            rank=self._rank,
        )  # fmt: skip
        load_time = time.perf_counter() - begin
        if self._initial is not None:
            peft_methods.save_initial(trainee.model, self._initial)
        if request.interleaving == "shared-base":
            shared.remember()
        self._trainee, self._stream = trainee, stream
        self._step = self.STEP(trainee, stream, request.variant, request.device)
        self._packed = stream.packed_batch(1)  # to check the isolation of packed records in evaluation
        if not request.variant.compile and request.workload.ranks == 1:
            self._watched = kernels_check.watch(trainee.model, self._requirements())
        with self._active():
            memory = {"host_rss_at_start_bytes": baseline} | self._gauge.peaks("load") if self._alone else {}
            untrained = self._initial_loss()
            with contextlib.nullcontext() if self._watched is None else self._watched.updates_only():
                loss, lap = self._take_step()
            values = {
                "threads": float(request.threads),
                "build_step_time_s": lap.time_s,
                "base_loads": float(loads),
                "base_conversions": float(loads and shared.is_converted),
            }
            if self._alone:
                values |= {"load_time_s": load_time, "first_step_time_s": lap.time_s}
                if request.device.startswith("cuda"):
                    values["device_start_time_s"] = device_start_s
            values |= untrained or self._initial_loss()
        return self._judged(PartialRecord(values=values, memory=memory, samples={"warmup_loss": (loss,)}), [loss])

    def _distribute(self, model: Any, stream: TokenStream) -> Any:
        """The callable of the model's forward pass."""
        return model

    def _initial_loss(self) -> dict[str, float]:
        """The loss on held-out records as before the first step, once per run. A base that the adapter has rewritten,
        or that trains, is no longer there after the step, so its loss is measured before."""
        request, variant = self._request, self._request.variant
        changes = variant.rewrites_base or variant.trains_base
        if not self._timed or request.replicate or changes != (self._steps_taken == 0):
            return {}
        without = contextlib.nullcontext() if changes else peft_methods.without_adapter(self._trainee.model)
        with without:
            return {"held_out_loss_initial": self.shared.once("held_out_loss", self._step.held_out_loss)}

    # --- checks -------------------------------------------------------------------------------------------------------

    def verify(self) -> PartialRecord:
        """Check a step for the variant's requirements; an unmet requirement makes the trial invalid."""
        if self._watched is None:
            return self._check_in_own_steps()
        watched = self._watch_step(self._watched)
        if watched.status != "ok" or watched.checks:
            return watched
        return msgspec.structs.replace(self._check_in_own_steps(), samples=watched.samples)

    def _requirements(self) -> dict[str, Any]:
        """Requirements by path."""
        request, trainee = self._request, self._trainee
        shapes = tuple(parameter.numel() for parameter in trainee.parameters)
        own = build_requirements(
            request.variant, shapes, packed=self._packed is not None,
            on_linear=peft_methods.is_on_linear(trainee.model),
        )  # fmt: skip
        return own | request.requirements

    def _watch_step(self, watch: kernels_check.Watch) -> PartialRecord:
        """Watch the first step of the warm-up. If a required check is unknown, the record has no checks: with an
        initial learning rate of zero, no second step shows that both factors learn."""
        begin = time.perf_counter()
        with watch:
            loss, lap = self._take_step()
        checks, self._watched = list(watch.checks), None
        del watch
        gc.collect()  # the notes form reference cycles; the next step reuses their heap
        values = {"verify_time_s": time.perf_counter() - begin}
        # Later replicates call the model in the same way, so their step suffices if it contains two records.
        shown = any(check.path == ISOLATED and check.status != "unknown" for check in checks)
        if self._packed is not None and (not shown or (self._timed and not self._request.replicate)):
            checks = self._probe_isolation(checks)
            values["isolation_probe_time_s"] = time.perf_counter() - begin - values["verify_time_s"]
        samples: dict[str, tuple[float, ...]] = {"warmup_step_time_s": (lap.time_s,), "warmup_loss": (loss,)}
        fragment = PartialRecord(values=values, samples=samples)
        if not any(check.required is not None and check.status == "unknown" for check in checks):
            fragment = judge_checks(fragment, checks, self._request)
        return self._judged(fragment, [loss])  # a diverged loss explains failed checks

    def _check_in_own_steps(self) -> PartialRecord:
        """Check additional steps and restore the state before them."""
        trainee, step, stream = self._trainee, self._step, self._stream
        position, schedule = stream.position(), trainee.schedule.state_dict()
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        checks, values = self._check(lambda: losses.append(step()), self._requirements())
        release_unused(self._request.device)
        values["verify_time_s"] = time.perf_counter() - begin
        stream.restore(position)
        trainee.schedule.load_state_dict(schedule)
        return self._judged(judge_checks(PartialRecord(values=values), checks, self._request), list(map(float, losses)))

    def _check(self, step: Callable[[], None], required: Mapping[str, Any]) -> tuple[list[Check], dict[str, float]]:
        """The checks of a step whose changes are reverted, and values for the record."""
        return self._probe_isolation(kernels_check.verify(self._trainee.model, step, required)), {}

    def _probe_isolation(self, checks: Sequence[Check]) -> list[Check]:
        """The checks of a step; forward passes probe the isolation of packed records, since each row of the step may
        hold only one record. A fault in the step itself is kept."""
        if self._packed is None:
            return list(checks)
        probed = kernels_check.probe_isolation(self._trainee.model, model_inputs(self._packed))
        return [
            probed if check.path == probed.path and check.status in ("active", "unknown") else check for check in checks
        ]

    # --- steps --------------------------------------------------------------------------------------------------------

    def warm_up(self, steps: int | None = None) -> PartialRecord:
        """Run steps until their times are steady, up to the maximum, or exactly `steps`; none is timed for the result.

        A trial that times no steps runs the minimum, so that the allocator is in a steady state before its peaks are
        measured.
        """
        protocol = self._request.protocol
        most = protocol.warmup_steps_max if self._timed else protocol.warmup_steps_min
        if self._alone:
            self._gauge.begin()  # the training phase begins here, so that its peak excludes the check
        times: list[float] = []
        losses: list[float] = []
        watched = self._steps_taken - 1  # one may have been watched
        while len(times) + watched < most if steps is None else len(times) < steps:
            loss, lap = self._take_step()
            times.append(lap.time_s)
            losses.append(loss)
            if steps is None and len(times) + watched >= protocol.warmup_steps_min and is_steady(times):
                break
        samples = {"warmup_step_time_s": tuple(times), "warmup_loss": tuple(losses)}
        values = {"warmup_steady": float(is_steady(times))} if self._timed and steps is None else {}
        return self._judged(PartialRecord(samples=samples, values=values), losses)

    def turn(self, steps: int) -> PartialRecord:
        """Run `steps` timed steps, at least one."""
        stream = self._stream
        real, padded = stream.real_tokens, stream.padded_tokens
        accumulated = self._request.variant.gradient_accumulation
        # One reading per turn, in its last step, so that no timed step follows it.
        laps = [*(self._take_step() for _ in range(steps - 1)), self._take_step(self._telemetry.look)]
        losses = [loss for loss, _ in laps]
        samples = {
            "step_time_s": tuple(lap.time_s for _, lap in laps),
            "step_cpu_time_s": tuple(lap.cpu_time_s for _, lap in laps),
            "timed_loss": tuple(losses),
            "turn_sequences": (float(steps * self._request.workload.batch_size * accumulated),),
            "turn_tokens": (float(stream.real_tokens - real),),
            "turn_padded_tokens": (float(stream.padded_tokens - padded),),
        }
        return self._judged(PartialRecord(samples=samples), losses)

    def train(self, steps: int) -> PartialRecord:
        """Run `steps` untimed steps of the planned epochs, or the remaining ones."""
        losses = [self._take_step()[0] for _ in range(min(steps, self._total_steps - self._steps_taken))]
        return self._judged(PartialRecord(samples={"remaining_loss": tuple(losses)}), losses)

    def finish_training(self, steps: int | None = None) -> PartialRecord:
        """Measure peaks of training, run the remaining steps, and measure exact bytes by kind and the held-out loss.

        The length of a warm-up depends on noise. Losses are compared between variants, so every trial ends after the
        same number of steps on the same tokens: those of the longest warm-up, or of the planned epochs; or after
        `steps`, if the time limit ends the training earlier.
        """
        trainee, step = self._trainee, self._step
        memory = self._gauge.peaks("train") if self._alone else {}
        last = self._total_steps if steps is None else min(steps, self._total_steps)
        left = self.train(last - self._steps_taken) if self._timed else PartialRecord()
        losses = list(left.samples.get("remaining_loss", ()))
        values = {"trainable_parameters": float(sum(p.numel() for p in trainee.parameters))}
        if self._alone:
            # Gradients exist only between the backward pass and the update, so they are recomputed for counting.
            step.loss(self._stream.take()).backward()
            memory |= resident_bytes(trainee.model, trainee.optimizer)
            trainee.optimizer.zero_grad(set_to_none=True)
        if self._timed:
            values |= {"training_steps": float(self._steps_taken), "held_out_loss": step.held_out_loss()}
            values |= {"training_steps_planned": float(self._total_steps)} if last != self._total_steps else {}
            losses.append(values["held_out_loss"])
        return self._judged(PartialRecord(values=values, memory=memory, samples=left.samples), losses)

    # --- requests -----------------------------------------------------------------------------------------------------

    def save_adapter(self) -> PartialRecord:
        """Save the trained adapter for a new interpreter."""
        peft_methods.save(self._trainee.model, Path(self._request.scratch) / "adapter", initial=self._initial)
        return PartialRecord()

    def begin_generate(self) -> PartialRecord:
        """Run the first request and the discarded ones after it. The optimizer's state is released."""
        trainee, protocol = self._trainee, self._request.protocol
        trainee.model.eval()
        if self._request.variant.merge_adapter:
            peft_methods.merge(trainee.model)
        trainee.optimizer.state.clear()  # a server has no optimizer state, so the peak must exclude it
        release_unused(self._request.device)
        if self._alone:
            self._gauge.begin()
        self._server = Server(trainee.model, trainee.adapter, self._stream, self._request)
        first = self._server.warm_up(1 + protocol.generate_warmup)
        values = {
            "new_tokens": float(self._request.workload.new_tokens),
            "request_batch": float(self._request.workload.request_batch),
            "packed_4bit_decode": float(is_packed(trainee.model)),
        }
        values |= {"first_call_time_s": first.request_time_s} if self._alone else {}
        if "open_ended" in self._request.measures and self._request.device.startswith("cuda"):
            # cuDNN's attention, which torch prefers on Hopper, plans a kernel at the first occurrence of each key
            # length, in tens of milliseconds on the host, which would distort comparisons of answers of other lengths.
            for index in range(min(protocol.open_ended_requests, self._stream.open_ended_prompt_count)):
                self._server.answer(index)
        fragment = PartialRecord(values=values, tokens={"completion": list(first.tokens)})
        if not self._alone:
            fragment = check_attention(fragment, trainee.model, self._server, self._request)
        return check_adapters(fragment, self._server, self._request)

    def request(self) -> PartialRecord:
        """Run one warm request, with the unmerged adapter or, after `merge`, the merged one."""
        return PartialRecord(samples=self._server.request())

    def open_ended(self) -> PartialRecord:
        """Run one request until EOS; its answer goes into the record."""
        index, request = self._server.open_ended()
        samples: dict[str, tuple[float, ...]] = {
            "open_ended_request_time_s": (request.request_time_s,),
            "open_ended_first_token_time_s": (request.first_token_time_s,),
            "open_ended_tokens": (float(len(request.tokens)),),
        }
        return PartialRecord(samples=samples, tokens={f"answer_{index}": list(request.tokens)})

    def base_answers(self) -> PartialRecord:
        """The answers of the base without an adapter to the same prompts."""
        if self._request.variant.rewrites_base or self._request.variant.merge_adapter:
            return PartialRecord()

        def answers() -> dict[str, list[int]]:
            with peft_methods.without_adapter(self._trainee.model):
                return {f"base_answer_{index}": list(server.answer(index).tokens) for index in server.answered}

        server = self._server
        return PartialRecord(tokens=self.shared.once("answers", answers))

    def end_generate(self) -> PartialRecord:
        """Measure the peaks of generation."""
        if not self._alone:
            return PartialRecord()
        fragment = PartialRecord(memory=self._gauge.peaks("generate"))  # before the check, which has its own peak
        return check_attention(fragment, self._trainee.model, self._server, self._request)

    def merge(self) -> PartialRecord:
        """Merge the adapter into the base and warm up again. Ends the trial: the base is changed."""
        self._server.merge(discard=1 + self._request.protocol.generate_warmup)
        return PartialRecord()

    def close(self) -> PartialRecord:
        """End a trial on a shared base, and verify that the base has not changed."""
        unpack_4bit(self._trainee.model)
        if self.shared.unchanged():
            return PartialRecord()
        message = "the base's weights changed while trials shared it, so none of them is what it would be alone"
        return PartialRecord().failed("invalid", Failure(phase="close", kind="BaseChanged", message=message))

    # --- state --------------------------------------------------------------------------------------------------------

    def _agree(self, decision: bool) -> bool:
        """The joint decision of all processes of the trial."""
        return decision

    def _take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        loss, lap = self._watch(self._step, meanwhile)
        self._steps_taken += 1
        return float(loss), lap

    def _judged(self, fragment: PartialRecord, losses: Sequence[float]) -> PartialRecord:
        """The fragment; invalid if one of the losses of the last steps is not finite."""
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self._steps_taken - len(losses) + offset + 1
                message = (
                    f"the loss is {loss} near step {step}; a diverged run has no result. Lower learning_rate (now "
                    f"{self._request.variant.learning_rate:g}) or set max_grad_norm."
                )
                return fragment.failed("invalid", Failure(phase="train", kind="LossNotFinite", message=message))
        return fragment
