"""Run the step a few times and write down what happened.

With the profiler as instrument:

1. A bare call, with nothing attached to the model: it triggers compilation, kernel autotuning and lazy initialisation
   as training would, and moves lora_B off zero (before that the gradient of lora_A is exactly zero).
2. A call under the profiler, with hooks that note the call of every module (see ``calls``). Hooks come after the first
   call, and no compilation is started beside them, so that they are never traced into compiled code, which would keep
   them for good. A step that compiles anew in each call is profiled once more without them. Where the step runs a
   profiler of its own, which would end this one, the spy watches in its place.
3. Further calls, bare and at most ``MOST_CALLS`` in all, only while another may show what these did not: an update (a
   gradient scaler skips steps that overflow, accumulation steps in every second call), one with a learning rate above
   zero (a warm-up may begin at zero), or one of a factor that had no gradient while its partner was zero.

With the spy as instrument hooks and dispatch mode watch the first call, and no compilation is started in it. The second
is bare, for what becomes of the first update, but where the first

- entered compiled code: nothing but a bare call then shows what training shows, and the first counts for nothing;
  the names of what it enters are recorded on the host, which touches no code;
- updated nothing (the second is watched in its place).

Further calls follow as with the profiler.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.check import Evidence, Instrument
from kernels_check.observation import compilations
from kernels_check.observation.adapter_calls import AdapterCalls, LayerCall
from kernels_check.observation.adapter_kinds import AdapterLayer
from kernels_check.observation.adapter_layers import (
    adapter_layers,
    base_parameters,
    token_parameters,
    trained_parameters,
)
from kernels_check.observation.adapter_targets import unmatched_names
from kernels_check.observation.attention_layers import AttentionLayers, attention_layers
from kernels_check.observation.calls import CallRecorder, Calls
from kernels_check.observation.compilations import Compilations
from kernels_check.observation.compiled_blocks import CompiledBlocks, compiled_blocks
from kernels_check.observation.events import StepProfile
from kernels_check.observation.gradients import Gradients, GradientSeen
from kernels_check.observation.inputs import InputLog, ModelCall
from kernels_check.observation.instruments import watch_by_profile, watch_by_spy
from kernels_check.observation.isolation import IsolationSeen
from kernels_check.observation.layer_products import LayerProducts, fourbit_layers, products_of
from kernels_check.observation.optimizers import OptimizerSeen
from kernels_check.observation.packed_step import isolation_of_step
from kernels_check.observation.padding import PaddingSeen, count_padding
from kernels_check.observation.recomputed_blocks import BlockRecomputed, ran_without_gradient, recomputed_blocks
from kernels_check.observation.snapshot import Snapshot
from kernels_check.observation.storage import Digest, Storage, digest, read_storage
from kernels_check.observation.updates import ParameterUpdates, Updates
from kernels_check.observation.writes import GroupSeen, groups_of, operators_on, updated_by, with_gradient

MOST_CALLS = 8
"""Of which a run whose optimizer steps in each call takes two."""


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
    """Parameters that a gradient reached in the watched calls, by name; what lay there before does not count."""
    changed: frozenset[str]
    """Trainable parameters that differ from before the first call."""
    modules: Calls
    """Calls of the model's modules in the watched call; those of compiled code call no hook."""
    modes: Mapping[str, bool | None]
    """``training`` of every module while the step ran; None where it changed."""
    drew_random: bool
    reached: frozenset[str] = frozenset()
    """Parameters that a gradient reached in the call that counts."""
    updates: Mapping[str, ParameterUpdates] = field(default_factory=dict)
    """What became of each parameter of the adapter that has to learn, by name."""
    adapter_calls: Mapping[str, Sequence[LayerCall]] = field(default_factory=dict)
    """Calls of the adapter's layers in the call that counts, by the layer's name; what is compiled notes none."""
    model_calls: tuple[ModelCall, ...] = ()
    """Calls of the model itself in the hooked call; none where it is compiled in place."""
    compilations: Compilations = field(default_factory=Compilations)
    """What torch.compile has on record after the last call."""
    batch: Mapping[str, Any] | None = None
    """Packed inputs of the model, to be perturbed."""
    updated: tuple[GroupSeen, ...] = ()
    """Groups of the optimizers that stepped in the watched call."""

    @property
    def blind(self) -> Mapping[Evidence, str]:
        """Evidence that the instrument could not collect in this step, with the reason."""
        compiled_in_place = "" in self.modules.unhooked  # it calls no hook of its own
        if self.profile.blind and not self.model_calls and compiled_in_place:
            return {**self.profile.blind, "inputs": "the model is compiled in place and its inputs were not seen"}
        return self.profile.blind

    @property
    def untold(self) -> Mapping[Evidence, str]:
        """Evidence that should have been there in this step and was not, with the reason."""
        return self.profile.untold

    def compiled_blocks(self) -> CompiledBlocks:
        """The blocks of the model by whether they ran in compiled code."""
        seen = self.profile.compiler
        return compiled_blocks(self.model, self.modules, seen.entered, seen.eager, self.gradients)

    def recomputed_blocks(self) -> tuple[BlockRecomputed, ...]:
        """The blocks of the model that a gradient comes back to, with what was computed again."""
        return recomputed_blocks(self.model, self.modules)

    def blocks_without_gradient(self) -> tuple[str, ...]:
        """The blocks of the model that ran and that no gradient comes back to."""
        return ran_without_gradient(self.model, self.modules)

    def updated_by_kind(self) -> list[Counter[str]]:
        """For each of the groups in ``updated``, how many parameters were updated by which kind of operator."""
        return updated_by(self.updated, self.profile.writes)

    def update_operators(self) -> list[str]:
        """The operators that wrote any of those parameters."""
        return operators_on(self.updated, self.profile.writes)

    def lora_layers(self) -> list[AdapterLayer]:
        """Places with an adapter that is in use."""
        return adapter_layers(self.model)

    def trained_parameters(self) -> dict[str, Tensor]:
        """Parameters of the adapter that have to learn, by name."""
        return trained_parameters(self.model, self.lora_layers())

    def token_parameters(self) -> frozenset[str]:
        """Parameters of the adapter that only some tokens of the vocabulary use, by name."""
        return token_parameters(self.model)

    def unmatched_names(self) -> list[str]:
        """Names that the adapter's configuration asks for and that matched nothing."""
        return unmatched_names(self.model)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are no adapter's, by name."""
        return base_parameters(self.model)

    def attention_layers(self) -> AttentionLayers:
        """The layers in which attention ran or should have."""
        return attention_layers(self.model, self.modules, self.profile.attention, self.profile.mixing)

    def base_products(self) -> LayerProducts:
        """The products of every base layer below an adapter, by the name of the layer that carries the adapter."""
        layers = {layer.name: (f"{layer.name}.base_layer",) for layer in self.lora_layers() if layer.base is not None}
        ran = {name: own if self.modules.ran(own[0]) else (name,) for name, own in layers.items()}
        return products_of(ran, self.model, self.modules, (*self.profile.fourbit, *self.profile.products))

    def fourbit_products(self) -> LayerProducts:
        """The 4-bit products of every linear layer of the model with a 4-bit weight, by its name."""
        return products_of(fourbit_layers(self.model), self.model, self.modules, self.profile.fourbit)

    def storage(self) -> dict[str, Storage]:
        """How the base layer below each adapter keeps its weight, by the layer's name."""
        return {layer.name: read_storage(layer.base) for layer in self.lora_layers() if layer.base is not None}

    def isolation(self) -> IsolationSeen:
        """Perturb the step's own packed calls, and the batch where there is one, by forwards that leave no trace."""
        return isolation_of_step(self.model, self.model_calls, self.batch)

    def padding(self) -> PaddingSeen | None:
        """Padding in the inputs of the model; None where no call of it was seen."""
        return count_padding(self.model, self.model_calls)


@dataclass(slots=True)
class _Watcher:
    model: nn.Module
    snapshot: Snapshot
    gradients: Gradients
    updates: Updates
    adapter: AdapterCalls
    reached: frozenset[str] = frozenset()
    steps_elsewhere: int = 0
    stepped: list[GroupSeen] = field(default_factory=list)
    updated: tuple[GroupSeen, ...] = ()
    """Those of the watched call."""
    given: dict[int, frozenset[int]] = field(default_factory=dict)
    """Parameters with a gradient before a step that has not ended, by its optimizer."""
    thread: int = 0
    calls: Calls = field(default_factory=Calls)
    modes: dict[str, bool] = field(default_factory=dict)
    """Where no hook notes them."""
    modes_noted: bool = False
    inputs: InputLog = field(default_factory=InputLog)

    def before_update(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Global optimizer hook."""
        self.snapshot.watch(optimizer)
        self.note_modes()
        self.given[id(optimizer)] = with_gradient(optimizer)
        return self.updates.before(optimizer, args, kwargs)

    def after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook."""
        self.updates.after(optimizer, args, kwargs)
        self.stepped += groups_of(optimizer, self.given.pop(id(optimizer), ()))
        self.steps_elsewhere += threading.get_ident() != self.thread

    def begin(self) -> None:
        """A call of the step begins."""
        self.thread = threading.get_ident()
        self.steps_elsewhere = 0
        self.stepped.clear()
        self.modes_noted = False

    def keep(self) -> None:
        """Take the last call for the watched one."""
        self.updated = tuple(self.stepped)

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.updates.steps

    def drop_calls(self) -> None:
        """What the hooks have noted is not what the call that counts shows."""
        self.calls = Calls()
        self.adapter.forget()

    def note_modes(self) -> None:
        """Record the train/eval modes once a call."""
        if not self.modes_noted:
            self.modes_noted = True
            self.modes = {name: module.training for name, module in self.model.named_modules()}

    def forget(self) -> None:
        """Drop everything but the copies of what the optimizers held at first."""
        self.calls = Calls()
        self.modes.clear()
        for watch in (self.gradients, self.updates, self.adapter):
            watch.forget()


def observe(
    model: nn.Module, step: Callable[[], object], snapshot: Snapshot, instrument: Instrument = "profile"
) -> Observation:
    """Call ``step`` a few times; the caller restores ``snapshot`` afterwards."""
    before = digest(model)
    gradients = Gradients(model)
    updates = Updates(model, gradients)
    watcher = _Watcher(model, snapshot, gradients, updates, AdapterCalls(model))
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        watcher.begin()
        gradients.begin_call()
        updates.begin_call()
        step()
        gradients.end_call()
        updates.end_call()
        watcher.note_modes()
        watcher.reached = gradients.reached()

    @contextmanager
    def hooked(*, marked: bool = False) -> Iterator[CallRecorder]:
        recorder = CallRecorder(model, marked=marked)
        with ExitStack() as hooks:  # takes every hook off, also if setting one or taking one off fails
            hooks.enter_context(recorder.hooked())
            watcher.inputs.attach(model, hooks)
            hooks.enter_context(watcher.adapter.watched())
            yield recorder
        watcher.calls = recorder.calls()
        watcher.keep()

    with ExitStack() as hooks:
        updates.begin()
        hooks.enter_context(gradients.watched())
        hooks.callback(register_optimizer_step_pre_hook(watcher.before_update).remove)
        hooks.callback(register_optimizer_step_post_hook(watcher.after_update).remove)
        if instrument == "spy":
            profile = watch_by_spy(call, hooked, watcher)
        else:
            call()
            profile = watch_by_profile(call, hooked, watcher)
        reached = watcher.reached
        while calls < MOST_CALLS and updates.pending():
            call()
    return Observation(
        model=model,
        before=before,
        after=digest(model),
        profile=profile,
        calls=calls,
        optimizer_steps=updates.steps,
        optimizers=tuple(updates.optimizers.values()),
        gradients=gradients.seen(),
        changed=snapshot.changed(),
        modules=watcher.calls,
        modes=watcher.calls.training() or watcher.modes,
        drew_random=snapshot.random.advanced(),
        model_calls=tuple(watcher.inputs.calls),
        reached=reached,
        updates=updates.parameters,
        adapter_calls=watcher.adapter.layers,
        compilations=compilations.read(),
        updated=watcher.updated,
    )
