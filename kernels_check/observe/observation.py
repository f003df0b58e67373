"""Observes steps of one model, and holds the observations for the judges.

Every hook is guarded and removed afterwards. If code is compiled during a step, the hooks on modules are removed at
once, since the compiled code would keep them; their records then cover only a part of the step and are not used.
Properties that need several steps, such as whether an update persists until the next step, are judged over all
consecutive observed steps, unless something has changed the adapter in between.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from typing import Any, TypeVar

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.check import PathObservation
from kernels_check.observe import adapter, parts
from kernels_check.observe import digest as digests
from kernels_check.observe.base import Storage, wrapped_storage
from kernels_check.observe.calls import CallRecorder, Calls, LayerCall
from kernels_check.observe.digest import Digest, DigestDifference, hash_base
from kernels_check.observe.execution import (
    BlockRecomputed,
    Compilations,
    CompiledBlocks,
    FusedKernelSite,
    compiled_blocks,
    fused_kernel_sites,
    ran_without_gradient,
    read_compilations,
    recomputed_blocks,
)
from kernels_check.observe.isolation import probe_calls
from kernels_check.observe.layers import (
    AttentionLayers,
    LayerProducts,
    attention_layers,
    fourbit_layers,
    match_products,
)
from kernels_check.observe.learning import GradientRecord, Gradients, ParameterUpdates, Updates
from kernels_check.observe.loss import BackwardPasses, LossRecord, ModelCall, loss_of_step
from kernels_check.observe.modules import HookGuard, ModelTree, RandomState, is_checkpointing_enabled, training_modes
from kernels_check.observe.padding import PaddingRecord, count_padding, packed_or_all
from kernels_check.observe.parts import (
    ParameterStatus,
    embedding_modules,
    norm_modules,
    parameter_statuses,
)
from kernels_check.observe.profile import (
    GroupRecord,
    OptimizerRecord,
    ProfilerRecording,
    StepProfile,
    class_names,
    describe_groups,
    operators_on,
    optimized_by,
    updated_by,
)
from kernels_check.observe.ranks import RankEvidence

_T = TypeVar("_T")


def _read_tree(read: Callable[[ModelTree], _T]) -> cached_property[_T]:
    """A property of an observation: what ``read`` finds in the model after the last call."""
    return cached_property(lambda observation: read(observation.tree))


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything observed over the watched calls; each property reads the model at its first use and is cached."""

    model: nn.Module
    before: Digest
    """The base before the first call."""
    after: Digest
    """The base after the last call."""
    change: DigestDifference = field(default_factory=DigestDifference)
    """The parts of the base that differed from ``before`` when any of the calls began or ended."""
    profile: StepProfile
    calls: int
    optimizer_steps: int
    """Steps of optimizers that hold parameters of the model."""
    optimizers: tuple[OptimizerRecord, ...]
    gradients: Mapping[str, GradientRecord]
    """Parameters that a gradient reached in the watched calls, by name; earlier gradients do not count."""
    changed: frozenset[str]
    """Trainable parameters whose value differs from that before the first call."""
    modules: Calls
    """Calls of the model's modules in the watched call; compiled code calls no hooks."""
    modes: Mapping[str, bool | None]
    """``training`` of every module while the step ran; None if it changed."""
    drew_random: bool
    reached: frozenset[str] = frozenset()
    """Parameters that a gradient reached in the call that counts."""
    updates: Mapping[str, ParameterUpdates] = field(default_factory=dict)
    """The updates of each adapter parameter that must learn, by name."""
    adapter_calls: Mapping[str, Sequence[LayerCall]] = field(default_factory=dict)
    """Calls of the adapter's layers in the last call, by the layer's name; compiled layers record none."""
    model_calls: tuple[ModelCall, ...] = ()
    """Calls of the model itself in the hooked call; empty if it is compiled in place."""
    compilations: Compilations = field(default_factory=Compilations)
    """The compiler's records after the last call."""
    final_tree: ModelTree | None = None
    """The model after the last call."""
    updated: tuple[GroupRecord, ...] = ()
    """Groups of the optimizers that stepped in the watched call."""
    other_optimizers: tuple[str, ...] = ()
    """Classes of optimizers that stepped in any of the calls and hold no parameter of the model: they belong to another
    model, or hold copies of this model's parameters, such as master weights."""
    ranks: tuple[RankEvidence, ...] = ()
    """Evidence of every rank about the step, if several train and a requirement needs it."""

    @property
    def untouched(self) -> bool:
        """Whether the step did not use the model: it called none of its modules and changed nothing."""
        called = (self.modules.all, self.modules.unhooked, self.profile.compiled_regions)
        return not any((*called, self.reached, self.changed))

    @cached_property
    def optimized(self) -> frozenset[int]:
        """Ids of the parameters of the optimizers that stepped."""
        return frozenset(identity for optimizer in self.optimizers for identity in optimizer.parameters)

    @property
    def checkpointing_enabled(self) -> bool:
        """Whether the model's flag for gradient checkpointing is on, which alone proves nothing."""
        return is_checkpointing_enabled(self.model)

    @cached_property
    def compiled_blocks(self) -> CompiledBlocks:
        """The blocks of the model, by whether they ran in compiled code."""
        return compiled_blocks(self.tree, self.modules, self.profile.entered, self.profile.eager, self.gradients)

    @cached_property
    def recomputed_blocks(self) -> tuple[BlockRecomputed, ...]:
        """The blocks of the model that receive a gradient, with their recomputed operations."""
        return recomputed_blocks(self.tree, self.modules)

    @cached_property
    def blocks_without_gradient(self) -> tuple[str, ...]:
        """The blocks of the model that ran and receive no gradient."""
        return ran_without_gradient(self.tree, self.modules, self.recomputed_blocks)

    @cached_property
    def updated_by_kind(self) -> list[Counter[str]]:
        """For each group in ``updated``, the number of parameters updated by each kind of operator."""
        return updated_by(self.updated, self.profile.writes)

    @cached_property
    def update_operators(self) -> list[str]:
        """The operators that wrote any of these parameters."""
        return operators_on(self.updated, self.profile.writes)

    @cached_property
    def tree(self) -> ModelTree:
        """Modules and parameters."""
        return self.final_tree or ModelTree(self.model)

    adapter_layers = _read_tree(adapter.adapter_layers)
    """Modules with an active adapter."""

    trained_parameters = _read_tree(adapter.trained_parameters)
    """Parameters of the adapter that must learn, by name."""

    @cached_property
    def reached_outside(self) -> frozenset[str]:
        """Parameters that a gradient reached although none came back through a call of their layers, by name."""
        names, through = {id(value): name for name, value in self.tree.parameters}, dict[str, bool]()
        for layer in self.adapter_layers if self.profile.evaluated else ():
            own = [self.modules.all[number] for number in self.modules.by_name.get(layer.name, ())]
            used = not own or any(self.profile.reached(call.nodes) for call in own)
            for name in (names.get(id(value), "") for _, value in layer.weights()):
                through[name] = used or through.get(name, False)
        return frozenset(name for name in self.reached if not through.get(name, True))

    token_parameters = _read_tree(adapter.token_parameters)
    """Parameters of the adapter that only some vocabulary tokens use, by name."""

    unmatched_names = _read_tree(parts.unmatched_names)
    """Names in the adapter's configuration that matched nothing."""

    base_parameters = _read_tree(adapter.base_parameters)
    """Parameters that belong to no adapter, by name."""

    @cached_property
    def attention_layers(self) -> AttentionLayers:
        """The layers in which attention ran or should have run."""
        return attention_layers(self.tree, self.modules, self.profile)

    @cached_property
    def base_products(self) -> LayerProducts:
        """The products of every base layer with an adapter, by the name of the layer that carries the adapter."""
        own = {layer.name: f"{layer.name}.base_layer" for layer in self.adapter_layers if layer.base is not None}
        ran = {name: base if self.modules.ran(base) else name for name, base in own.items()}
        return match_products(ran, self.modules, (*self.profile.fourbit, *self.profile.products))

    @cached_property
    def fourbit_products(self) -> LayerProducts:
        """The 4-bit products of every linear layer with a 4-bit weight, by layer name."""
        return match_products(fourbit_layers(self.tree), self.modules, self.profile.fourbit)

    @cached_property
    def idle_fourbit(self) -> list[str]:
        """Layers with an adapter that ran and whose 4-bit weight took part in no product; none if code was compiled."""
        own = fourbit_layers(self.tree)
        around = {name: name for name in self.storage if f"{name}.base_layer" in own}
        found = match_products(around, self.modules, self.profile.fourbit)
        hidden = self.profile.missing is not None or self.profile.compiler_lookups or self.profile.compiled_regions
        return [] if hidden else [name for name in found.without if name not in found.by_layer]

    @cached_property
    def storage(self) -> dict[str, Storage]:
        """The weight storage of the base layer under each adapter, by layer name."""
        wrapped = (layer for layer in self.adapter_layers if layer.base is not None)
        return {layer.name: wrapped_storage(self.tree, layer.module) for layer in wrapped}

    census = _read_tree(digests.count_bytes)
    """The bytes of the whole base, by number of bits."""

    biases_of_adapters = _read_tree(adapter.biases_of_adapters)
    """Biases of the base that train as a part of the adapter, by name, with PEFT's setting."""

    @cached_property
    def fused_kernel_sites(self) -> list[FusedKernelSite]:
        """Modules where fused kernels of other libraries may be bound, each with the library that is bound."""
        return fused_kernel_sites(self.tree, self.modules, self.model_calls)

    @cached_property
    def loss(self) -> LossRecord:
        """The tokens in the loss, and their weights."""
        return loss_of_step(self.model_calls)

    @cached_property
    def embeddings(self) -> list[ParameterStatus]:
        """The input and output embedding, with the fates of their parameters."""
        return parameter_statuses(embedding_modules(self.tree), self)

    @cached_property
    def norms(self) -> list[ParameterStatus]:
        """Every norm with parameters, with the fates of its parameters."""
        return parameter_statuses(norm_modules(self.tree), self)

    @cached_property
    def isolation(self) -> PathObservation:
        """Whether packed records are isolated from each other, by forward passes of the step's own calls."""
        return probe_calls(self.model, packed_or_all(self.model_calls))

    @cached_property
    def padding(self) -> PaddingRecord | None:
        """Padding in the inputs of the model; None if no call of the model was observed."""
        return count_padding(self.tree, self.model_calls)


MAX_CALLS = 8
"""Maximum number of observed steps; a run whose optimizer steps every time takes two."""


class StepObserver:
    """Observes the steps of one model, each inside ``step``.

    Args:
        model: the trained model, referenced weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model, lambda _: self.forget())
        self._series: _Series | None = None
        self.observation: Observation | None = None
        """The observation of the last step; the caller removes it after judging."""
        self.compiled = False
        """Whether code was compiled in the last step, so that its modules were not observed to its end."""

    @property
    def fault(self) -> str | None:
        """The exception of a hook; after it nothing is known about the step."""
        return None if self._series is None else self._series.guard.fault

    @property
    def undecided(self) -> bool:
        """Whether a further step may be conclusive."""
        series = self._series
        return series is not None and series.begun < MAX_CALLS and series.updates.pending()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe until the end of the block.

        Raises:
            Exception: the model cannot be hooked or read; all hooks are removed then.
        """
        self.compiled, self.observation = False, None
        tree, series = self._continue_series()
        series.compare_base(tree)
        recording = ProfilerRecording()
        recorder = CallRecorder(tree, series.guard, marked=recording.missing is None)
        with series.step(tree, recorder.backwards):
            with ExitStack() as stack:
                stack.enter_context(recorder.hooked())
                handler = import_module("torch._dynamo").callback_handler  # the optimizer's step loads it anyway
                started = series.guard(partial(self._on_compile, recorder))
                handler.register_start_callback(started)
                stack.callback(handler.remove_start_callback, started)
                random = RandomState()
                stack.enter_context(recording.opened())
                yield
            drew_random = random.advanced()
        self.observation = series.observe(tree.model, recorder, recording.profile(), drew_random=drew_random)

    @contextmanager
    def updates_only(self) -> Iterator[None]:
        """Observe only the updates of a step; see ``step``."""
        tree, series = self._continue_series()
        with series.step(tree, BackwardPasses(tree)):
            yield

    def forget(self) -> None:
        """Start a new series with the next step."""
        self._series = self.observation = None

    def _continue_series(self) -> tuple[ModelTree, _Series]:
        """The model, and the series that this step continues: a new one if other code changed the adapter since."""
        model, series = self._reference(), self._series
        if model is None:
            raise RuntimeError("the model no longer exists")
        tree = ModelTree(model)
        if series is None or series.guard.fault is not None or not series.updates.continues(tree):
            series = self._series = _Series(tree)
        return tree, series

    def _on_compile(self, recorder: CallRecorder, started: object) -> None:
        """Remove the hooks on modules when a compilation starts."""
        if not self.compiled:
            self.compiled = True
            recorder.remove_step_hooks()


class _Series:
    """Observations of consecutive steps of one model, and the state with which the next step is compared.

    Args:
        tree: tree of the model before the first step.
    """

    def __init__(self, tree: ModelTree) -> None:
        self.guard = HookGuard()
        self.gradients = Gradients(self.guard)
        self.updates = Updates(tree, self.gradients)
        self.begun = 0
        """Number of steps that have begun."""
        self._before = hash_base(tree)
        self._change = DigestDifference()
        self._others: dict[str, None] = {}
        """Classes of optimizers that stepped and hold no parameter of the model."""
        self._stepped: list[GroupRecord] = []
        self._given: dict[int, frozenset[int]] = {}
        """Parameters that had a gradient before the current optimizer step, by optimizer."""
        self._modes: dict[str, bool] = {}
        """The modes at the first optimizer step, or at the end; used if no hook records them."""

    @contextmanager
    def step(self, tree: ModelTree, backwards: BackwardPasses) -> Iterator[None]:
        """Hook parameters and optimizers until the end of a step; ``backwards`` also records the updates."""
        own = frozenset(id(parameter) for _, parameter in tree.parameters)

        def is_own(optimizer: Any) -> bool:
            """Whether the optimizer holds a parameter of the model; torch also calls the hooks for other optimizers."""
            optimized = {id(value) for value in optimized_by(optimizer)}
            return not optimized.isdisjoint(own) or not optimized.isdisjoint(map(id, tree.model.parameters()))

        def begins(optimizer: Any, args: Any, kwargs: Any) -> Any:
            if not is_own(optimizer):
                return None
            self._modes = self._modes or training_modes(tree)
            parameters = optimized_by(optimizer)
            self._given[id(optimizer)] = frozenset(id(value) for value in parameters if value.grad is not None)
            backwards.update_begins()
            return self.updates.before(optimizer, args, kwargs)

        def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not is_own(optimizer):
                self._others[class_names(optimizer)[0]] = None
                return
            self.updates.after(optimizer)
            backwards.update_ends()
            self._stepped += describe_groups(optimizer, self._given.pop(id(optimizer), ()))

        with ExitStack() as hooks:
            hooks.enter_context(self.gradients.watched(tree))
            hooks.push(register_optimizer_step_pre_hook(self.guard(begins)))
            hooks.push(register_optimizer_step_post_hook(self.guard(ends)))
            self.begun += 1
            self._stepped, self._modes = [], {}
            self.updates.begin_call()
            try:
                yield
            except BaseException as error:
                self.guard.fault = f"the step raised {type(error).__name__}"
                raise
        self.guard(self.gradients.end_call)(tree.model)
        self.guard(self.updates.end_call)()

    def compare_base(self, tree: ModelTree) -> Digest:
        """Add the parts of the base that differ now from those before the first step."""
        now = self._before if not self.begun else hash_base(tree)
        self._change |= now.since(self._before)
        return now

    def observe(
        self, model: nn.Module, recorder: CallRecorder, profile: StepProfile, *, drew_random: bool
    ) -> Observation:
        """All observations, for the judges."""
        final, calls = ModelTree(model), recorder.calls()
        after, updates = self.compare_base(final), self.updates.by_name()
        changed = {after.parts[name].owner for name in after.changed_parts(self._before) if name in after.parts}
        changed |= {name for name, one in updates.items() if one.moved or one.written}
        return Observation(
            model=final.model,
            final_tree=final,
            before=self._before,
            after=after,
            change=self._change,
            profile=profile,
            calls=self.begun,
            optimizer_steps=self.updates.steps,
            optimizers=tuple(self.updates.optimizers.values()),
            gradients=self.gradients.seen(final),
            changed=frozenset(name for name, value in final.parameters if value.requires_grad and name in changed),
            modules=calls,
            modes=calls.training() or self._modes or training_modes(final),
            drew_random=drew_random,
            model_calls=tuple(recorder.model_calls),
            reached=frozenset(name for name, value in final.parameters if id(value) in self.gradients.arrived),
            updates=updates,
            adapter_calls=recorder.layer_calls,
            compilations=read_compilations(),
            updated=tuple(self._stepped),
            other_optimizers=tuple(self._others),
        )
