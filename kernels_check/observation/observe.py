"""Run the step at most three times and write down what happened.

With the profiler as instrument:

1. A bare call, with nothing attached to the model: it triggers compilation, kernel autotuning and lazy initialisation
   as training would, and moves lora_B off zero (before that the gradient of lora_A is exactly zero).
2. A call under the profiler, with hooks that note the call of every module (see ``calls``). Hooks come after the first
   call, and no compilation is started beside them, so that they are never traced into compiled code, which would keep
   them for good. A step that compiles anew in each call is profiled once more without them. Where the step runs a
   profiler of its own, which would end this one, the spy watches in its place.
3. A third call only if fewer than two optimizer steps were seen (a gradient scaler skips steps that overflow).

With the spy as instrument one call is enough where the run is warm: hooks and dispatch mode watch it from the start,
and no compilation is started in it. A second call follows where the first

- entered compiled code: nothing but a bare call then shows what training shows, and the first counts for nothing;
  the names of what it enters are recorded on the host, which touches no code;
- updated nothing (the second is watched in its place);
- left a gradient at zero, as that of lora_A is while lora_B is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.check import Evidence, Instrument
from kernels_check.observation import compilations
from kernels_check.observation.adapter_layers import LoraLayer, base_parameters, lora_layers
from kernels_check.observation.attention_layers import AttentionLayers, attention_layers
from kernels_check.observation.base_state import biases_asked_for
from kernels_check.observation.calls import CallRecorder, Calls
from kernels_check.observation.census import Census, take_census
from kernels_check.observation.compilations import Compilations, compiler_held
from kernels_check.observation.digest import Digest, digest
from kernels_check.observation.events import StepProfile
from kernels_check.observation.isolation import IsolationSeen, perturb_records
from kernels_check.observation.layer_products import LayerProducts, fourbit_layers, products_of
from kernels_check.observation.padding import PaddingSeen, count_padding
from kernels_check.observation.recording import entries, profiled
from kernels_check.observation.snapshot import Snapshot
from kernels_check.observation.spy import spied
from kernels_check.observation.storage import Storage, read_wrapped

MOST_CALLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSeen:
    """What reached one trainable parameter over the watched steps."""

    nonzero: bool
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSeen:
    """One optimizer that stepped, as it stood after its last watched step."""

    classes: tuple[str, ...]
    """Qualified names of its class and every base class, the class first."""
    learning_rates: tuple[float, ...]
    parameters: frozenset[int]
    """Identities of the parameters it updates."""
    state_bytes: int
    paged_bytes: int
    """Bytes of the state tensors that really live in paged (managed) memory."""
    claims_paged: bool
    """The optimizer's own flag, which stays true where nothing is paged."""
    fused_requested: bool | None
    on_cpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything seen over the watched calls of the step; the methods read the model as it is when they are called."""

    model: nn.Module
    before: Digest
    """The base before the first call."""
    after: Digest
    """The base after the last."""
    profile: StepProfile
    calls: int
    optimizer_steps: int
    optimizers: tuple[OptimizerSeen, ...]
    gradients: Mapping[str, GradientSeen]
    """Parameters that a gradient reached, by name."""
    changed: frozenset[str]
    """Trainable parameters that differ from before the first call."""
    modules: Calls
    """Calls of the model's modules in the watched call; those of compiled code call no hook."""
    modes: Mapping[str, bool | None]
    """``training`` of every module while the step ran; None where it changed."""
    drew_random: bool
    padding: PaddingSeen | None = None
    """Padding in the inputs of the hooked call; None where the model itself was not called with tokens."""
    compilations: Compilations = field(default_factory=Compilations)
    """What torch.compile has on record after the last call."""
    batch: Mapping[str, Any] | None = None
    """Packed inputs of the model, to be perturbed."""

    @property
    def blind(self) -> Mapping[Evidence, str]:
        """Evidence that the instrument could not collect in this step, with the reason."""
        compiled_in_place = "" in self.modules.unhooked  # it calls no hook of its own
        if self.profile.blind and self.padding is None and compiled_in_place:
            return {**self.profile.blind, "inputs": "the model is compiled in place and its inputs were not seen"}
        return self.profile.blind

    def lora_layers(self) -> list[LoraLayer]:
        """Layers with an adapter, the active where any is."""
        return lora_layers(self.model)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are no adapter's, by name."""
        return base_parameters(self.model)

    def attention_layers(self) -> AttentionLayers:
        """The layers in which attention ran or should have."""
        return attention_layers(self.model, self.modules, self.profile.attention, self.profile.mixing)

    def base_products(self) -> LayerProducts:
        """The products of every base layer below an adapter, by the name of the layer that carries the adapter."""
        layers = {layer.name: (f"{layer.name}.base_layer",) for layer in self.lora_layers()}
        ran = {name: own if self.modules.ran(own[0]) else (name,) for name, own in layers.items()}
        return products_of(ran, self.model, self.modules, (*self.profile.fourbit, *self.profile.products))

    def fourbit_products(self) -> LayerProducts:
        """The 4-bit products of every linear layer of the model with a 4-bit weight, by its name."""
        return products_of(fourbit_layers(self.model), self.model, self.modules, self.profile.fourbit)

    def storage(self) -> dict[str, Storage]:
        """How the base layer below each adapter keeps its weight, by the layer's name."""
        return {layer.name: read_wrapped(layer.module) for layer in self.lora_layers()}

    def census(self) -> Census:
        """How many bytes of the whole base are kept in how many bits."""
        return take_census(self.model)

    def biases_asked_for(self) -> str | None:
        """What PEFT was told of the biases of the base, where it was told to train them."""
        return biases_asked_for(self.model)

    def isolation(self) -> IsolationSeen:
        """Perturb the packed batch by forwards of the model's own, which are left no trace of."""
        if self.batch is None:
            raise ValueError("there is no packed batch to perturb")
        return perturb_records(self.model, self.batch)


@dataclass(slots=True)
class _Watcher:
    model: nn.Module
    snapshot: Snapshot
    optimizers: dict[int, Any] = field(default_factory=dict)
    seen: dict[int, OptimizerSeen] = field(default_factory=dict)
    steps: int = 0
    gradients: dict[str, GradientSeen] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    modes: dict[str, bool] = field(default_factory=dict)
    """Where no hook notes them."""
    modes_noted: bool = False
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Token tensors of each call of the model; by reference, so that nothing is computed while it is watched."""

    def before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook: the one moment at which gradients are complete and nothing has moved."""
        self.snapshot.watch(optimizer)
        self.optimizers[id(optimizer)] = optimizer
        self.note_modes()
        self.note_gradients()

    def after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook: the optimizer's state exists from here on."""
        self.seen[id(optimizer)] = _describe(optimizer)
        self.steps += 1

    def note_modes(self) -> None:
        """Record the train/eval modes once a call."""
        if not self.modes_noted:
            self.modes_noted = True
            self.modes = {name: module.training for name, module in self.model.named_modules()}

    def note_gradients(self) -> None:
        """Record which gradients are there, and whether they carry anything."""
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            before = self.gradients.get(name, GradientSeen(nonzero=False, finite=True))
            values = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
            self.gradients[name] = GradientSeen(
                nonzero=before.nonzero or bool(torch.count_nonzero(values)),
                finite=before.finite and bool(torch.isfinite(values).all()),
            )

    def forget(self) -> None:
        """Drop everything but the copies of what the optimizers held at first."""
        self.calls = Calls()
        for noted in (self.optimizers, self.seen, self.gradients, self.modes):
            noted.clear()
        self.steps = 0

    def note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward hook of the model itself."""
        named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        self.inputs.append({key: named.get(key) for key in ("input_ids", "attention_mask")})


def observe(
    model: nn.Module, step: Callable[[], object], snapshot: Snapshot, instrument: Instrument = "profile"
) -> Observation:
    """Call ``step`` one to three times; the caller restores ``snapshot`` afterwards."""
    before = digest(model)
    watcher = _Watcher(model, snapshot)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        watcher.modes_noted = False
        taken = watcher.steps
        step()
        if watcher.steps == taken:
            watcher.note_modes()
            watcher.note_gradients()

    @contextmanager
    def hooked(*, marked: bool = False) -> Iterator[CallRecorder]:
        watcher.inputs.clear()
        recorder = CallRecorder(model, marked=marked)
        with ExitStack() as hooks:  # takes every hook off, also if setting one or taking one off fails
            hooks.enter_context(recorder.hooked())
            if model._compiled_call_impl is None:  # compiled in place, it would be compiled again with the hook
                hooks.callback(model.register_forward_pre_hook(watcher.note_inputs, with_kwargs=True).remove)
            yield recorder
        watcher.calls = recorder.calls()

    with ExitStack() as hooks:
        hooks.callback(register_optimizer_step_pre_hook(watcher.before_update).remove)
        hooks.callback(register_optimizer_step_post_hook(watcher.after_update).remove)
        if instrument == "spy":
            profile = _spied(call, hooked, watcher)
        else:
            call()
            profile = _profiled(call, hooked, watcher)
            while watcher.steps < 2 and calls < MOST_CALLS:
                call()
    return Observation(
        model=model,
        before=before,
        after=digest(model),
        profile=profile,
        calls=calls,
        optimizer_steps=watcher.steps,
        optimizers=tuple(watcher.seen.values()),
        gradients=watcher.gradients,
        changed=snapshot.changed(),
        modules=watcher.calls,
        modes=watcher.calls.training() or watcher.modes,
        drew_random=snapshot.random.advanced(),
        padding=count_padding(model, watcher.inputs),
        compilations=compilations.read(),
    )


class _Hooked(Protocol):
    def __call__(self, *, marked: bool = False) -> AbstractContextManager[CallRecorder]: ...


def _profiled(call: Callable[[], None], hooked: _Hooked, watcher: _Watcher) -> StepProfile:
    with compiler_held(), hooked(marked=True):
        profile = profiled(call)
    if profile is None:
        with hooked() as recorder, spied(recorder) as spy:
            call()
        return spy.profile(watcher.model)
    if profile.compiler_lookups <= profile.compiled_regions:
        return profile
    bare = profiled(call)  # some code was not at hand: either it is compiled in each call, or never
    if bare is None or (bare.compiled_regions, bare.compiler_lookups) == _entered(profile):
        return profile
    watcher.calls = Calls()
    return bare


def _entered(profile: StepProfile) -> tuple[int, int]:
    return profile.compiled_regions, profile.compiler_lookups


def _spied(call: Callable[[], None], hooked: _Hooked, watcher: _Watcher) -> StepProfile:
    with hooked() as recorder, spied(recorder) as spy:
        call()
    if spy.compiled_calls:
        watcher.forget()
        with compiler_held(), hooked():
            found = entries(call)
        if found[1] > found[0]:
            watcher.forget()
            found = entries(call)
        regions, lookups = found
        return replace(spy.profile(watcher.model), compiled_regions=regions, compiler_lookups=lookups)
    if not watcher.steps:
        with hooked() as recorder, spied(recorder) as spy:
            call()
    elif any(not gradient.nonzero for gradient in watcher.gradients.values()):
        call()
    return spy.profile(watcher.model)


def _describe(optimizer: Any) -> OptimizerSeen:
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    # Quantisation maps are shared between the states of many parameters: count each tensor once.
    tensors = {id(value): value for state in optimizer.state.values() for value in _tensors(state)}.values()
    size = {id(value): value.numel() * value.element_size() for value in tensors}
    rates = []
    for group in optimizer.param_groups:
        with suppress(TypeError, ValueError):
            rates.append(float(group.get("lr", 1.0)))
    return OptimizerSeen(
        classes=tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__),
        learning_rates=tuple(rates),
        parameters=frozenset(map(id, parameters)),
        state_bytes=sum(size.values()),
        paged_bytes=sum(size[id(value)] for value in tensors if getattr(value, "is_paged", False) is True),
        claims_paged=bool(getattr(optimizer, "is_paged", False)),
        fused_requested=optimizer.defaults.get("fused"),
        on_cpu=all(value.device.type == "cpu" for value in parameters),
    )


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]
