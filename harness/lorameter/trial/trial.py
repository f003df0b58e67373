"""A trial in its process: it builds, checks and warms up by methods that return a `PartialRecord`, and executes the
commands of its measurements (`lorameter.trial.measurements`).

The measures of a command depend on the request: a trial that takes turns with others has no first times, and an
isolated trial has no turns and times its adapter merged. The check watches the first step and the first warm-up step.
If steps are compiled, or run on several ranks, it runs additional steps after the first one and restores adapter,
optimizer and random state. No metric includes its cost.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import pkgutil
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
from lorameter.measurements.metrics import FUNCTIONS
from lorameter.records.record import Failure, PartialRecord
from lorameter.stats import is_steady
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import SharedBase, build, build_requirements, judge_checks
from lorameter.trial.building.quantizers import unpack_4bit
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import Lap, Stopwatch, TrialTelemetry, release_unused, synchronize
from lorameter.trial.serving.server import Server
from lorameter.trial.step import TrainStep, model_inputs

ISOLATED = "packing.isolated"


class Trial:
    """State of one trial between commands. Exceptions propagate to the worker, which reports them.

    `shared` is the base model of the process, on which other trials may also have adapters; each command runs with this
    trial's adapter active and with its own random state. `generations` counts the process generations up to the parent
    of its run; `rank` is that of this process among the ranks of the workload. `build` makes the model and its step,
    and `begin_generate` the server.
    """

    server: Server

    STEP: ClassVar[type[TrainStep]] = TrainStep

    def __init__(
        self, request: TrialRequest, shared: SharedBase, *, generations: int = GENERATIONS, rank: int = 0
    ) -> None:
        self.request = request
        self._rank = rank
        self.shared = shared
        """The base of the process, also for later trials."""
        self.timed = "steps" in request.measures
        self.alone = "peaks" in request.measures
        """Whether no other trial runs in its process, so that it measures memory peaks and its own first times."""
        self.initial = Path(request.scratch) / "initial" if request.variant.rewrites_base else None
        """The folder of the untrained adapter, to which the trained adapter is relative."""
        self._watch = Stopwatch(request.device)
        self.gauge = PeakMemoryTracker(request.device)
        self.telemetry = TrialTelemetry(
            request,
            self.take_step,
            lambda: self.stream.real_tokens,
            agree=self._agree,
            generations=generations,
        )
        self._random: RandomState | None = None
        """Its random state; None before its first step."""
        self.steps_taken = 0
        self.total_steps = 0
        self._watched: kernels_check.Watch | None = None
        """Watches its first two steps; None afterwards, and if the check runs additional steps."""

    def run(self, command: str, **arguments: Any) -> PartialRecord:
        """Execute a command with this trial's adapter."""
        if command == "build":
            return self.build()
        with self._active():
            return self.telemetry.around(COMMANDS[command], lambda: self._execute(command, **arguments))

    def _execute(self, command: str, **arguments: Any) -> PartialRecord:
        """Execute a command of a measurement, or one of the trial itself."""
        function = pkgutil.resolve_name(FUNCTIONS[command]) if command in FUNCTIONS else None
        method = getattr(self, command) if function is None else functools.partial(function, self)
        return method(**arguments)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        """Activate this trial's adapter and its random state, which is saved for the next command."""
        peft_methods.activate(self.trainee.model, self.trainee.adapter)
        if self._random is not None:
            self._random.restore()
        try:
            yield
        finally:
            self._random = RandomState()

    def build(self) -> PartialRecord:
        """Load the base, attach the adapter, and run the first step."""
        request, shared = self.request, self.shared
        baseline, begin = host_bytes("VmRSS"), time.perf_counter()
        synchronize(request.device)  # CUDA creates its context here, which would otherwise be in the load time
        device_start_s = time.perf_counter() - begin
        if self.alone:
            self.gauge.begin()
        loads, begin = shared.model is None, time.perf_counter()
        stream = TokenStream(
            Path(request.tokens_path), request.workload, request.variant, request.device, rank=self._rank,
            ranks=request.workload.ranks,
        )  # fmt: skip
        per_step = request.workload.batch_size * request.variant.gradient_accumulation
        self.total_steps = request.protocol.all_steps(stream.sequences, per_step)
        trainee = build(
            request, steps=self.total_steps, shared=shared, distribute=lambda model: self._distribute(model, stream),
            rank=self._rank,
        )  # fmt: skip
        load_time = time.perf_counter() - begin
        if self.initial is not None:
            peft_methods.save_initial(trainee.model, self.initial)
        if request.interleaving == "shared-base":
            shared.remember()
        self.trainee, self.stream = trainee, stream
        self.step = self.STEP(trainee, stream, request.variant, request.device)
        self._packed = stream.packed_batch(1)  # to check the isolation of packed records in evaluation
        if not request.variant.compile and request.workload.ranks == 1:
            self._watched = kernels_check.watch(trainee.model, self._requirements())
        with self._active():
            memory = {"host_rss_at_start_bytes": baseline} | self.gauge.peaks("load") if self.alone else {}
            untrained = self._initial_loss()
            with contextlib.nullcontext() if self._watched is None else self._watched.updates_only():
                loss, lap = self.take_step()
            values = {
                "threads": float(request.threads),
                "build_step_time_s": lap.time_s,
                "base_loads": float(loads),
                "base_conversions": float(loads and shared.is_converted),
            }
            if self.alone:
                values |= {"load_time_s": load_time, "first_step_time_s": lap.time_s}
                if request.device.startswith("cuda"):
                    values["device_start_time_s"] = device_start_s
            values |= untrained or self._initial_loss()
        return self.judged(PartialRecord(values=values, memory=memory, samples={"warmup_loss": (loss,)}), [loss])

    def _distribute(self, model: Any, stream: TokenStream) -> Any:
        """The callable of the model's forward pass."""
        return model

    def _initial_loss(self) -> dict[str, float]:
        """The loss on held-out records as before the first step, once per run. A base that the adapter has rewritten,
        or that trains, is no longer there after the step, so its loss is measured before."""
        request, variant = self.request, self.request.variant
        changes = variant.rewrites_base or variant.trains_base
        if not self.timed or request.replicate or changes != (self.steps_taken == 0):
            return {}
        without = contextlib.nullcontext() if changes else peft_methods.without_adapter(self.trainee.model)
        with without:
            return {"held_out_loss_initial": self.shared.once("held_out_loss", self.step.held_out_loss)}

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
        request, trainee = self.request, self.trainee
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
            loss, lap = self.take_step()
        checks, self._watched = list(watch.checks), None
        del watch
        gc.collect()  # the notes form reference cycles; the next step reuses their heap
        values = {"verify_time_s": time.perf_counter() - begin}
        # Later replicates call the model in the same way, so their step suffices if it contains two records.
        shown = any(check.path == ISOLATED and check.status != "unknown" for check in checks)
        if self._packed is not None and (not shown or (self.timed and not self.request.replicate)):
            checks = self._probe_isolation(checks)
            values["isolation_probe_time_s"] = time.perf_counter() - begin - values["verify_time_s"]
        samples: dict[str, tuple[float, ...]] = {"warmup_step_time_s": (lap.time_s,), "warmup_loss": (loss,)}
        fragment = PartialRecord(values=values, samples=samples)
        if not any(check.required is not None and check.status == "unknown" for check in checks):
            fragment = judge_checks(fragment, checks, self.request)
        return self.judged(fragment, [loss])  # a diverged loss explains failed checks

    def _check_in_own_steps(self) -> PartialRecord:
        """Check additional steps and restore the state before them."""
        trainee, step, stream = self.trainee, self.step, self.stream
        position, schedule = stream.position(), trainee.schedule.state_dict()
        losses: list[torch.Tensor] = []
        begin = time.perf_counter()
        checks, values = self._check(lambda: losses.append(step()), self._requirements())
        release_unused(self.request.device)
        values["verify_time_s"] = time.perf_counter() - begin
        stream.restore(position)
        trainee.schedule.load_state_dict(schedule)
        return self.judged(judge_checks(PartialRecord(values=values), checks, self.request), list(map(float, losses)))

    def _check(self, step: Callable[[], None], required: Mapping[str, Any]) -> tuple[list[Check], dict[str, float]]:
        """The checks of a step whose changes are reverted, and values for the record."""
        return self._probe_isolation(kernels_check.verify(self.trainee.model, step, required)), {}

    def _probe_isolation(self, checks: Sequence[Check]) -> list[Check]:
        """The checks of a step; forward passes probe the isolation of packed records, since each row of the step may
        hold only one record. A fault in the step itself is kept."""
        if self._packed is None:
            return list(checks)
        probed = kernels_check.probe_isolation(self.trainee.model, model_inputs(self._packed))
        return [
            probed if check.path == probed.path and check.status in ("active", "unknown") else check for check in checks
        ]

    # --- steps --------------------------------------------------------------------------------------------------------

    def warm_up(self, steps: int | None = None) -> PartialRecord:
        """Run steps until their times are steady, up to the maximum, or exactly `steps`; none is timed for the result.

        A trial that times no steps runs the minimum, so that the allocator is in a steady state before its peaks are
        measured.
        """
        protocol = self.request.protocol
        most = protocol.warmup_steps_max if self.timed else protocol.warmup_steps_min
        if self.alone:
            self.gauge.begin()  # the training phase begins here, so that its peak excludes the check
        times: list[float] = []
        losses: list[float] = []
        watched = self.steps_taken - 1  # one may have been watched
        while len(times) + watched < most if steps is None else len(times) < steps:
            loss, lap = self.take_step()
            times.append(lap.time_s)
            losses.append(loss)
            if steps is None and len(times) + watched >= protocol.warmup_steps_min and is_steady(times):
                break
        samples = {"warmup_step_time_s": tuple(times), "warmup_loss": tuple(losses)}
        values = {"warmup_steady": float(is_steady(times))} if self.timed and steps is None else {}
        return self.judged(PartialRecord(samples=samples, values=values), losses)

    def close(self) -> PartialRecord:
        """End a trial on a shared base, and verify that the base has not changed."""
        unpack_4bit(self.trainee.model)
        if self.shared.unchanged():
            return PartialRecord()
        message = "the base's weights changed while trials shared it, so none of them is what it would be alone"
        return PartialRecord().failed("invalid", Failure(phase="close", kind="BaseChanged", message=message))

    # --- state --------------------------------------------------------------------------------------------------------

    def _agree(self, decision: bool) -> bool:
        """The joint decision of all processes of the trial."""
        return decision

    def take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        """Run a step; returns its loss and its time (see `Stopwatch`)."""
        loss, lap = self._watch(self.step, meanwhile)
        self.steps_taken += 1
        return float(loss), lap

    def judged(self, fragment: PartialRecord, losses: Sequence[float]) -> PartialRecord:
        """The fragment; invalid if one of the losses of the last steps is not finite."""
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.steps_taken - len(losses) + offset + 1
                message = (
                    f"the loss is {loss} near step {step}; a diverged run has no result. Lower learning_rate (now "
                    f"{self.request.variant.learning_rate:g}) or set max_grad_norm."
                )
                return fragment.failed("invalid", Failure(phase="train", kind="LossNotFinite", message=message))
        return fragment
