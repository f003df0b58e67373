"""Times the phases of a step or a request, and profiles their operators.

On CUDA a border between two phases is an event, for which the host does not wait; a phase's time is then the device's
own, including its waiting for launches. On a CPU a border is a clock reading. Under the profiler it is a mark in the
records. The records assign a kernel to a phase by the host's clock, so the device is synchronised at each phase.

Borders take time, so plain and bordered steps alternate: both run under the same conditions, and the difference of a
pair is the cost of the borders. The profiler runs last, after the requests, in separate steps, because it slows down
everything and its memory stays in the process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers.pytorch_utils import Conv1D

from lorameter.records.activity import (
    CACHE,
    HEAD,
    MIN_STEP_PAIRS,
    REQUEST_PHASES,
    STEP_PHASES,
    TRACE,
    Activity,
    ModelSize,
    RequestFacts,
)
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import TrainableModel
from lorameter.trial.data.stream import Batch, TokenStream
from lorameter.trial.memory import cached_tensors, find_cache, output_head, resident_tensors, storage_bytes
from lorameter.trial.process import Stopwatch, synchronize
from lorameter.trial.profiling.activity import MARK, PART, summarise_activity
from lorameter.trial.serving.server import Request
from lorameter.trial.step import TrainStep

MAX_PAIRS = 128
MIN_PROFILED, MAX_PROFILED = 3, 12
PROFILED_BUDGET_S = 3.0
"""Seconds of profiled steps, within these numbers of steps: the records of a step take megabytes."""


class Phases:
    """Times phases, which need not be adjacent."""

    def __init__(self, names: Sequence[str], device: str) -> None:
        """`names` are those of all phases; `device` is a torch device type."""
        self._device, self._on_cuda = device, device.startswith("cuda")
        self._names = names
        self._borders: list[tuple[str, Any]] = []
        """The phase that begins at each border, and its timestamp: an event, or a time in seconds."""
        self._mark: Any = None
        self.marked = False
        """Whether phases are only marked for the profiler instead of timed."""

    def begin(self, *, marked: bool = False) -> None:
        """Reset all times, outside of any phase."""
        self._leave()
        self.marked, self._borders = marked, []
        synchronize(self._device)

    def turn(self, phase: str) -> None:
        """End the current phase, and begin this one; "" begins no phase."""
        if not self.marked:
            self._borders.append((phase, self._stamp()))
            return
        if self._mark is not None:
            synchronize(self._device)
        self._leave()
        if phase:
            self._mark = record_function(MARK + phase)
            self._mark.__enter__()

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Begin this phase, and end the current one at exit. After an exception the device is not used, because it may
        hang."""
        self.turn(phase)
        yield
        self.turn("")

    def _leave(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
        self._mark = None

    def times_s(self) -> dict[str, float]:
        """Seconds of each phase since `begin`; the device must have finished."""
        times = dict.fromkeys(self._names, 0.0)
        for (phase, start), (_, end) in itertools.pairwise(self._borders):
            if phase:
                times[phase] += start.elapsed_time(end) / 1e3 if self._on_cuda else end - start
        return times

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
        """Load the next batch to the device."""
        with self.phases.within("data"):
            return super().take()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Run the forward pass."""
        with self.phases.within("forward"):
            return super().loss(batch)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Run the backward pass."""
        with self.phases.within("backward"):
            return super().backward(loss)

    def update(self) -> None:
        """Run clipping and the optimizer."""
        with self.phases.within("update"):
            super().update()


def pair_times(
    plain: Callable[[], Any],
    bordered: BorderedStep | BorderedRequest,
    device: str,
    *,
    what: str,
    samples_of: Callable[[Any, bool], Mapping[str, float]],
    budget_s: float,
) -> dict[str, tuple[float, ...]]:
    """Times of pairs of a plain and a bordered call; each kind comes first in every other pair.

    Args:
        plain: the unmodified call.
        bordered: the same call with the times of its phases.
        device: torch device type.
        what: the call's name in the names of the samples ("step").
        samples_of: returns samples, given a call's result and whether it was a plain call.
        budget_s: time for pairs; at least `MIN_STEP_PAIRS` pairs are run.

    Returns:
        Samples in seconds, one a pair: `plain_WHAT_time_s` with `plain_WHAT_cpu_time_s`, `bordered_WHAT_time_s`,
        `phase_PHASE_s`, and `between_WHATs_s`, from the end of a call to the beginning of the next, in which its
        result is read and its times are stored. Then those of `samples_of`.
    """
    watch = Stopwatch(device)
    series: dict[str, list[float]] = {}
    begin, pair, ended_s = time.perf_counter(), 0, math.nan
    while pair < MIN_STEP_PAIRS or (pair < MAX_PAIRS and time.perf_counter() - begin < budget_s):
        for kind in ("plain", "bordered") if pair % 2 == 0 else ("bordered", "plain"):
            samples: dict[str, float] = {}
            if kind == "bordered":
                bordered.phases.begin()
            elif not math.isnan(ended_s):
                samples[f"between_{what}s_s"] = time.perf_counter() - ended_s
            result, lap = watch(plain if kind == "plain" else bordered)
            ended_s = time.perf_counter()
            samples |= samples_of(result, kind == "plain")
            samples |= {f"{kind}_{what}_time_s": lap.time_s, f"{kind}_{what}_cpu_time_s": lap.cpu_time_s}
            if kind == "bordered":
                samples |= {f"phase_{phase}_s": seconds for phase, seconds in bordered.phases.times_s().items()}
            for name, value in samples.items():
                series.setdefault(name, []).append(value)
        pair += 1
    return {name: tuple(values) for name, values in series.items()}


def record_profile(
    bordered: BorderedStep | BorderedRequest,
    device: str,
    folder: Path,
    *,
    trace: str = TRACE,
    phase_names: Sequence[str] = STEP_PHASES,
    weights: Mapping[tuple[int, int], str] | None = None,
) -> Activity:
    """Record operators and kernels of several steps or requests under the profiler; their trace is written to `folder`.

    A plain step before them determines how many steps fit into the budget, and allocates the optimizer's state. The
    first step under the profiler is not recorded, since the profiler starts in it; it belongs to the same session,
    since two sessions in quick succession can collide in CUPTI. A session without GPU kernels is repeated once.

    `phase_names` and `weights` are arguments of `lorameter.trial.profiling.activity.summarise_activity`.
    """
    cuda = [ProfilerActivity.CUDA] if device.startswith("cuda") else []
    watch = Stopwatch(device)
    for _ in range(2):
        bordered.phases.begin()
        alone_s = watch(bordered)[1].time_s
        steps = min(MAX_PROFILED, max(MIN_PROFILED, int(PROFILED_BUDGET_S / alone_s)))
        planned = schedule(wait=0, warmup=1, active=steps)
        times: list[float] = []
        with profile(activities=[ProfilerActivity.CPU, *cuda], schedule=planned, record_shapes=True) as recorded:
            for number in range(1 + steps):
                bordered.phases.begin(marked=True)
                times.append(watch(bordered)[1].time_s)
                if number < steps:  # the session must still be open when its results are read
                    recorded.step()
        recorded.export_chrome_trace(str(folder / trace))
        results = recorded.profiler.kineto_results if recorded.profiler is not None else None
        events = () if results is None else results.events()
        activity = summarise_activity(events, tuple(times[1:]), device, phase_names=phase_names, weights=weights)
        if not activity.missing:
            break
    return activity


def watch_gradients(model: torch.nn.Module, step: Callable[[], object]) -> dict[str, bool | None]:
    """Run the step and return the modules that it calls, by their names in transformers' model, and whether autograd
    computes the gradient of their first input (layers of the first block that take the embeddings have none); None if
    that input is not a tensor."""
    gradients: dict[str, bool | None] = {}
    with contextlib.ExitStack() as hooks:
        for name, part in peft_methods.unwrap(model).named_modules():

            def record(_: Any, args: tuple[Any, ...], name: str = name) -> None:
                gradients.setdefault(
                    name, args[0].requires_grad if args and isinstance(args[0], torch.Tensor) else None
                )

            hooks.callback(part.register_forward_pre_hook(record).remove)
        step()
    return gradients


# --- requests ---------------------------------------------------------------------------------------------------------


class BorderedRequest:
    """A request, as a user would make it, with the time of each of its phases.

    transformers' `generate` is one call from prompt to last token. Hooks on the model's forward passes divide it into
    the part before the first pass, the pass over the prompt (prefill), the single-token passes (decode), and the parts
    between passes on the host (choosing a token, returning it, preparing the next inputs).
    """

    def __init__(self, model: Any, ask: Callable[[], Request], device: str) -> None:
        """`model` is a PEFT model; `ask` makes a request of it."""
        self._model = peft_methods.unwrap(model)
        self._ask = ask
        self.phases = Phases(REQUEST_PHASES, device)

    def __call__(self) -> Request:
        """Make the request, with a border at each end of each forward pass."""
        passes = 0

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal passes
            self.phases.turn("decode" if passes else "prefill")
            if self.phases.marked and not passes:
                _mark_calls(find_cache(kwargs), "update", CACHE, parts)
            passes += 1

        with contextlib.ExitStack() as parts:
            parts.callback(self._model.register_forward_pre_hook(enter, with_kwargs=True).remove)
            parts.callback(self._model.register_forward_hook(lambda *_: self.phases.turn("choose")).remove)
            if self.phases.marked:
                _mark_calls(self._model.get_output_embeddings(), "forward", HEAD, parts)
            with self.phases.within("prepare"):
                return self._ask()


def _mark_calls(owner: Any, method: str, part: str, stack: contextlib.ExitStack) -> None:
    """Mark calls of a method for the profiler as a part of their phase, until the stack is closed; objects without the
    method are ignored."""
    call = getattr(owner, method, None)
    if call is None:
        return

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + part):
            return call(*args, **kwargs)

    setattr(owner, method, marked)
    stack.callback(delattr, owner, method)


def request_samples(request: Request, is_plain: bool) -> dict[str, float]:
    """Samples for `pair_times`: the token times of a plain request, by metric."""
    names = ("first_token_time_s", "time_per_output_token_s") if is_plain else ()
    return {name: getattr(request, name) for name in names}


def observe_request(model: Any, ask: Callable[[], Request]) -> RequestFacts:
    """Facts about one request, which is not timed."""
    base = peft_methods.unwrap(model)
    passes: list[tuple[int, int]] = []
    caches: list[Any] = []
    places: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        logits = getattr(output, "logits", None)
        passes.append((1 if tokens is None else int(tokens.shape[-1]), 1 if logits is None else int(logits.shape[-2])))
        if isinstance(output, dict) and (cache := find_cache(output)) is not None:
            caches[:] = [cache]
            places.append(tuple(tensor.data_ptr() for tensor in cached_tensors(cache)))

    with contextlib.ExitStack() as hooks:
        hooks.callback(base.register_forward_hook(note, with_kwargs=True).remove)
        ask()
    head = base.get_output_embeddings()
    moved = [before != after for before, after in itertools.pairwise(places)]
    return RequestFacts(
        prompt_rows=passes[0][0],
        logit_rows=passes[0][1],
        cache=type(caches[0]).__name__ if caches else "",
        cache_bytes=sum(storage_bytes(tensor) for cache in caches for tensor in cached_tensors(cache)),
        cache_moved=sum(moved) / max(1, len(moved)),
        head=next((f"{name}.weight" for name, one in base.named_modules() if one is head), ""),
        size=model_size(model),
    )


def model_size(model: Any) -> ModelSize:
    """The weights that a forward pass multiplies by and reads, counted from the modules of any model."""
    base = peft_methods.unwrap(model)
    own = list(peft_methods.own_parameters(model).values())
    head: Any = output_head(base)
    heads = [] if head is None else [head.weight]
    frozen = {kind: sum(map(storage_bytes, tensors)) for kind, tensors in resident_tensors(base, None).items()}
    return ModelSize(
        linear_elements=sum(outputs * inputs for module, (outputs, inputs) in _linears(model) if module is not head),
        linear_bytes=frozen["linear_weights"] + frozen["quantization_state"],
        head_elements=sum(weight.numel() for weight in heads),
        head_bytes=sum(weight.nbytes for weight in heads),
        adapter_elements=sum(parameter.numel() for parameter in own),
        adapter_bytes=sum(parameter.nbytes for parameter in own),
        norm_bytes=sum(size for kind, size in frozen.items() if kind.startswith("norms_")),
    )


def weights_by_shape(model: Any) -> dict[tuple[int, int], str]:
    """Names of the weights of a forward pass by output and input sizes; for several weights of one shape, the first
    name and the number of the others."""
    known = {module: name for name, module in peft_methods.unwrap(model).named_modules()}
    names: dict[tuple[int, int], list[str]] = {}
    for module, sizes in _linears(model):
        names.setdefault(sizes, []).append(f"{known[module].removesuffix('.base_layer')}.weight")
    return {
        sizes: found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} like it"
        for sizes, found in names.items()
    }


def _linears(model: Any) -> Iterator[tuple[torch.nn.Module, tuple[int, int]]]:
    """The linear layers of the base with their output and input sizes, quantised or not."""
    own = {id(parameter) for parameter in peft_methods.own_parameters(model).values()}
    for module in peft_methods.unwrap(model).modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in own:
            yield module, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield module, (int(module.nf), int(module.nx))
