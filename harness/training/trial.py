"""One trial in its own process: the phases, each a method that returns what it added as a `Fragment`.

Order: build and first step, verify, warm up, timed turns, held-out loss and memory, inference. The first step comes
before the check so that its time is that of a process's first step; the check leaves adapter, optimizer and RNG as it
found them, and its cost is in no number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kernels_check
from harness import codec
from harness.errors import LorameterError
from harness.inference.generate import Request, generate
from harness.meters.clock import Lap, Stopwatch
from harness.meters.memory import MemoryGauge, host_bytes, resident_bytes
from harness.protocol import Protocol
from harness.record import Failure, Fragment, Notice, TrialRequest
from harness.stats import is_steady
from harness.training.build import Trainee, build, save_initial, unpack_4bit
from harness.training.process import release_unused
from harness.training.requirements import requirements_of
from harness.training.step import TrainStep
from harness.training.stream import TokenStream

STEADY_WINDOW = 3
"""Steps that must show no more downward trend before a warm-up ends."""


class Trial:
    """State of one trial between commands; what a library raises is the worker's to report."""

    def __init__(self, request: TrialRequest) -> None:
        self._request = request
        self._watch = Stopwatch(request.device)
        self._gauge = MemoryGauge(request.device)
        self._trainee: Trainee | None = None
        self._step: TrainStep | None = None
        self._stream: TokenStream | None = None
        self._steps_taken = 0

    def build(self) -> Fragment:
        """Load, attach, take the first step."""
        request, protocol = self._request, self._request.protocol
        baseline = host_bytes("VmRSS")
        self._gauge.begin()
        begin = time.perf_counter()
        self._trainee = build(request, steps=total_steps(protocol))
        load_time = time.perf_counter() - begin
        if request.variant.rewrites_base:
            save_initial(self._trainee.model, self._initial)
        self._stream = TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)
        self._step = TrainStep(self._trainee, self._stream, request.variant, request.device)
        memory = {"host_baseline_bytes": baseline} | self._gauge.peaks("load")
        values = {"threads": float(request.threads), "load_time_s": load_time}
        loss, lap = self._take_step()
        values["first_step_time_s"] = lap.time_s
        if not request.variant.rewrites_base:
            with self._trainee.model.disable_adapter():  # which is what the adapter was before its first step
                values["held_out_loss_initial"] = self._step.held_out_loss()
        return self._judged(Fragment(values=values, memory=memory, samples={"warmup_loss": (loss,)}), [loss])

    def verify(self) -> Fragment:
        """Watch a step and judge what the variant claims; a claim that does not hold makes the trial invalid."""
        trainee, step, stream = self._parts()
        request = self._request
        packed = stream.packed_batch()
        shapes = tuple(p.numel() for p in trainee.model.parameters() if p.requires_grad)
        required = requirements_of(request.variant, shapes, packed=packed is not None) | request.requirements
        position, schedule = stream.position(), trainee.schedule.state_dict()
        batch = None if packed is None else step.inputs(packed)
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        checks = kernels_check.verify(trainee.model, lambda: losses.append(step()), required, batch=batch)
        release_unused(request.device)
        seconds = time.perf_counter() - begin
        stream.restore(position)
        trainee.schedule.load_state_dict(schedule)
        failed = [check for check in checks if check.required is not None and not check.met]
        fragment = Fragment(checks=tuple(codec.to_json(check) for check in checks), values={"verify_time_s": seconds})
        diverged = self._judged(fragment, [float(loss) for loss in losses])
        if diverged.status != "ok":  # explains every check that failed with it
            return diverged
        if not failed:
            return fragment
        said = "; ".join(f"{check.path}: required {check.required!r}, {check.reason}" for check in failed)
        if request.allow_fallback:
            notice = Notice(
                code="fallback-allowed",
                message=f"{request.variant.name}: measured although not what it claims: {said}",
                remedy="Rank it under what really ran, or set allow_fallback = false in the study.",
            )
            return fragment.with_notice(notice)
        return fragment.failed("invalid", Failure(phase="verify", kind="RequiredPathNotActive", message=said))

    def warm_up(self) -> Fragment:
        """Steps until their times are steady, or the cap; all are kept, none is timed for the result."""
        protocol = self._request.protocol
        self._gauge.begin()  # from here to the last turn is the training phase; the check's memory is not in its peak
        times: list[float] = []
        losses: list[float] = []
        while len(times) < protocol.warmup_steps_max:
            loss, lap = self._take_step()
            times.append(lap.time_s)
            losses.append(loss)
            if len(times) >= protocol.warmup_steps_min and is_steady(times, STEADY_WINDOW):
                break
        fragment = Fragment(
            samples={"warmup_step_time_s": tuple(times), "warmup_loss": tuple(losses)},
            values={"warmup_steady": float(is_steady(times, STEADY_WINDOW))},
        )
        return self._judged(fragment, losses)

    def turn(self, steps: int) -> Fragment:
        """`steps` timed steps."""
        _, _, stream = self._parts()
        real, padded = stream.real_tokens, stream.padded_tokens
        accumulated = self._request.variant.gradient_accumulation
        taken = [self._take_step() for _ in range(steps)]
        losses = [loss for loss, _ in taken]
        counts = {"real_tokens": stream.real_tokens - real, "padded_tokens": stream.padded_tokens - padded}
        samples = {
            "step_time_s": tuple(lap.time_s for _, lap in taken),
            "step_cpu_time_s": tuple(lap.cpu_time_s for _, lap in taken),
            "train_loss": tuple(losses),
            "turn_sequences": (float(steps * self._request.workload.batch_size * accumulated),),
        } | {f"turn_{key}": (float(value),) for key, value in counts.items()}
        return self._judged(Fragment(samples=samples), losses)

    def finish_training(self) -> Fragment:
        """Peaks of training, the steps that a short warm-up saved, exact bytes by kind, held-out loss.

        How long a warm-up lasts depends on noise. Losses are compared between variants, so every trial ends after the
        same number of steps on the same tokens.
        """
        trainee, step, stream = self._parts()
        memory = self._gauge.peaks("train")
        losses = [self._take_step()[0] for _ in range(total_steps(self._request.protocol) - self._steps_taken)]
        # Gradients live only between backward and the optimizer, so they are made once more, untimed, to be counted.
        step.loss(stream.take()).backward()
        memory |= resident_bytes(trainee.model, trainee.optimizer)
        trainee.optimizer.zero_grad(set_to_none=True)
        values = {
            "held_out_loss": step.held_out_loss(),
            "trainable_parameters": float(sum(p.numel() for p in trainee.model.parameters() if p.requires_grad)),
        }
        fragment = Fragment(values=values, memory=memory, samples={"catch_up_loss": tuple(losses)})
        return self._judged(fragment, [*losses, values["held_out_loss"]])

    def generate(self) -> Fragment:
        """First call, warm requests, then the same with the adapter merged. Ends the trial: the base is changed."""
        trainee, _, stream = self._parts()
        model, protocol, workload = trainee.model, self._request.protocol, self._request.workload
        model.eval()
        trainee.optimizer.state.clear()  # a server holds none, so it is not in the peak
        release_unused(self._request.device)
        self._gauge.begin()

        def request(index: int) -> Request:
            return generate(model, stream.prompt(index), workload.new_tokens)

        first = request(0)
        values = {"first_call_time_s": first.request_time_s, "new_tokens": float(workload.new_tokens)}
        values["packed_4bit_decode"] = float(_packed(model))
        samples = self._warm(request, protocol.generate_warmup, protocol.generate_requests)
        memory = self._gauge.peaks("generate")
        unpack_4bit(model)
        model.merge_adapter()
        merged = self._warm(request, 1 + protocol.generate_warmup, protocol.generate_requests)
        samples |= {f"merged_{name}": taken for name, taken in merged.items()}
        return Fragment(values=values, samples=samples, memory=memory, tokens={"completion": list(first.tokens)})

    def save_adapter(self) -> Fragment:
        """Write the trained adapter where a new interpreter will load it from."""
        trainee, _, _ = self._parts()
        initial = str(self._initial) if self._request.variant.rewrites_base else None
        folder = str(Path(self._request.scratch) / "adapter")
        trainee.model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)
        return Fragment()

    @property
    def _initial(self) -> Path:
        return Path(self._request.scratch) / "initial"

    def _warm(self, request: Callable[[int], Request], discard: int, count: int) -> dict[str, tuple[float, ...]]:
        for index in range(discard):
            request(index)
        taken = [request(index) for index in range(count)]
        names = ("request_time_s", "first_token_time_s", "time_per_output_token_s")
        return {name: tuple(getattr(item, name) for item in taken) for name in names}

    def _take_step(self) -> tuple[float, Lap]:
        _, step, _ = self._parts()
        loss, lap = self._watch(step)
        self._steps_taken += 1
        return float(loss), lap

    def _parts(self) -> tuple[Trainee, TrainStep, TokenStream]:
        if self._trainee is None or self._step is None or self._stream is None:
            raise LorameterError(f"trial {self._request.trial}: asked to run before it was built")
        return self._trainee, self._step, self._stream

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


def total_steps(protocol: Protocol) -> int:
    """Optimizer steps of every trial, however long its warm-up was: the first, the warm-up at most, the timed ones."""
    return 1 + protocol.warmup_steps_max + protocol.turns * protocol.steps_per_turn


def _packed(model: torch.nn.Module) -> bool:
    """Whether 4-bit layers run in bitsandbytes' CPU packing (see `unpack_4bit`)."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states if state is not None)
