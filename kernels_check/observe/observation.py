"""Observes steps of one model as they take place, leaves nothing behind, and holds what was observed for the judges.

Every hook is guarded and taken off again. Where code is compiled during a step, the hooks on modules are removed at
once, since the compiled code would keep them; what they had recorded is half a step then, and not used. What takes
several steps, such as whether an update is kept until the next, is judged over all that were observed one after the
other, unless something has changed the adapter in between.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.check import PathObservation
from kernels_check.observe.adapter import (
    AdapterLayer,
    adapter_layers,
    base_parameters,
    biases_of_adapters,
    token_parameters,
    trained_parameters,
)
from kernels_check.observe.base import Storage, wrapped_storage
from kernels_check.observe.calls import CallRecorder, Calls, LayerCall
from kernels_check.observe.digest import Digest, WeightBits, digest, take_census
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
from kernels_check.observe.layers import AttentionLayers, LayerProducts, attention_layers, fourbit_layers, products_of
from kernels_check.observe.learning import Gradients, GradientSeen, ParameterUpdates, Updates
from kernels_check.observe.loss import BackwardPasses, LossSeen, ModelCall, loss_of_step
from kernels_check.observe.modules import HookGuard, ModelTree, RandomState, is_checkpointing_enabled
from kernels_check.observe.padding import PaddingSeen, count_padding, isolation_by_inputs
from kernels_check.observe.parts import ParameterStatus, embedding_modules, fates_of, norm_modules, unmatched_names
from kernels_check.observe.profile import (
    AROUND,
    INSIDE,
    GroupSeen,
    OptimizerSeen,
    ProfilerRecording,
    StepProfile,
    class_names,
    groups_of,
    is_recording,
    operators_on,
    updated_by,
)
from kernels_check.observe.ranks import RankEvidence


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything seen over the watched calls of the step; each property reads the model at its first use, once."""

    model: nn.Module
    before: Digest
    """The base before the first call."""
    after: Digest
    """The base after the last."""
    profile: StepProfile
    calls: int
    optimizer_steps: int
    """By optimizers that hold parameters of the model."""
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
    """Calls of the adapter's layers in the last call, by the layer's name; compiled layers record none."""
    model_calls: tuple[ModelCall, ...] = ()
    """Calls of the model itself in the hooked call; none where it is compiled in place."""
    compilations: Compilations = field(default_factory=Compilations)
    """What torch.compile has on record after the last call."""
    final_tree: ModelTree | None = None
    """The model as the last call left it."""
    updated: tuple[GroupSeen, ...] = ()
    """Groups of the optimizers that stepped in the watched call."""
    other_optimizers: tuple[str, ...] = ()
    """Classes of optimizers that stepped in any of the calls and hold no parameter of the model: they are another
    model's, or hold copies of this one's, as master weights are."""
    ranks: tuple[RankEvidence, ...] = ()
    """What every rank shows of the step, where several train and a requirement asks."""

    @property
    def untouched(self) -> bool:
        """Whether the step was seen to leave the model alone: it called none of its modules and changed nothing."""
        called = self.modules.all or self.modules.unhooked or self.profile.compiled_regions
        return not (called or self.reached or self.changed)

    @cached_property
    def optimized(self) -> frozenset[int]:
        """Identities of the parameters that an optimizer which stepped was given."""
        return frozenset(identity for optimizer in self.optimizers for identity in optimizer.parameters)

    @property
    def checkpointing_enabled(self) -> bool:
        """Whether the model's flag for gradient checkpointing is on, which proves nothing."""
        return is_checkpointing_enabled(self.model)

    @cached_property
    def compiled_blocks(self) -> CompiledBlocks:
        """The blocks of the model by whether they ran in compiled code."""
        return compiled_blocks(self.tree, self.modules, self.profile.entered, self.profile.eager, self.gradients)

    @cached_property
    def recomputed_blocks(self) -> tuple[BlockRecomputed, ...]:
        """The blocks of the model that a gradient comes back to, with what was computed again."""
        return recomputed_blocks(self.tree, self.modules)

    @cached_property
    def blocks_without_gradient(self) -> tuple[str, ...]:
        """The blocks of the model that ran and that no gradient comes back to."""
        return ran_without_gradient(self.tree, self.modules, self.recomputed_blocks)

    @cached_property
    def updated_by_kind(self) -> list[Counter[str]]:
        """For each of the groups in ``updated``, how many parameters were updated by which kind of operator."""
        return updated_by(self.updated, self.profile.writes)

    @cached_property
    def update_operators(self) -> list[str]:
        """The operators that wrote any of those parameters."""
        return operators_on(self.updated, self.profile.writes)

    @cached_property
    def tree(self) -> ModelTree:
        """Modules and parameters."""
        return self.final_tree or ModelTree.of(self.model)

    @cached_property
    def adapter_layers(self) -> list[AdapterLayer]:
        """Places with an adapter that is in use."""
        return adapter_layers(self.tree)

    @cached_property
    def trained_parameters(self) -> dict[str, Tensor]:
        """Parameters of the adapter that have to learn, by name."""
        return trained_parameters(self.tree)

    @cached_property
    def token_parameters(self) -> frozenset[str]:
        """Parameters of the adapter that only some tokens of the vocabulary use, by name."""
        return token_parameters(self.tree)

    @cached_property
    def unmatched_names(self) -> list[str]:
        """Names that the adapter's configuration asks for and that matched nothing."""
        return unmatched_names(self.tree)

    @cached_property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are no adapter's, by name."""
        return base_parameters(self.tree)

    @cached_property
    def attention_layers(self) -> AttentionLayers:
        """The layers in which attention ran or should have."""
        return attention_layers(
            self.model, self.modules, self.profile.attention, self.profile.mixing, self.profile.reductions
        )

    @cached_property
    def base_products(self) -> LayerProducts:
        """The products of every base layer below an adapter, by the name of the layer that carries the adapter."""
        wrapped = [layer.name for layer in self.adapter_layers if layer.base is not None]
        layers = {name: (f"{name}.base_layer",) for name in wrapped}
        ran = {name: own if self.modules.ran(own[0]) else (name,) for name, own in layers.items()}
        return products_of(ran, self.model, self.modules, (*self.profile.fourbit, *self.profile.products))

    @cached_property
    def fourbit_products(self) -> LayerProducts:
        """The 4-bit products of every linear layer of the model with a 4-bit weight, by its name."""
        return products_of(fourbit_layers(self.tree), self.model, self.modules, self.profile.fourbit)

    @cached_property
    def storage(self) -> dict[str, Storage]:
        """How the base layer below each adapter keeps its weight, by the layer's name."""
        wrapped = (layer for layer in self.adapter_layers if layer.base is not None)
        return {layer.name: wrapped_storage(self.tree, layer.module) for layer in wrapped}

    @cached_property
    def census(self) -> WeightBits:
        """How many bytes of the whole base are kept in how many bits."""
        return take_census(self.tree)

    @cached_property
    def biases_of_adapters(self) -> Mapping[str, str]:
        """Biases of the base that train as a part of the adapter, by name, with the setting of PEFT."""
        return biases_of_adapters(self.tree)

    @cached_property
    def fused_kernel_sites(self) -> list[FusedKernelSite]:
        """Modules where fused kernels of other libraries may be bound, with the library that is."""
        return fused_kernel_sites(self.tree, self.modules, self.model_calls)

    @cached_property
    def loss(self) -> LossSeen:
        """Over which tokens the loss is, and how much they weigh."""
        return loss_of_step(self.model_calls)

    @cached_property
    def embeddings(self) -> list[ParameterStatus]:
        """The input and output embedding, with what became of their parameters."""
        return fates_of(embedding_modules(self.tree), self)

    @cached_property
    def norms(self) -> list[ParameterStatus]:
        """Every norm with parameters, with what became of them."""
        return fates_of(norm_modules(self.tree), self)

    @cached_property
    def isolation(self) -> PathObservation:
        """Whether packed records are isolated."""
        return isolation_by_inputs(self.model_calls, self.attention_layers.calls)

    @cached_property
    def padding(self) -> PaddingSeen | None:
        """Padding in the inputs of the model; None where no call of it was seen."""
        return count_padding(self.tree, self.model_calls)


MOST_CALLS = 8
"""Steps after which no other is waited for; a run whose optimizer steps in each takes two."""


class StepObserver:
    """Observes the steps of one model, each inside ``step``.

    Args:
        model: that the steps train; held weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model, lambda _: self.forget())
        self._series: _Series | None = None
        self.seen: Observation | None = None
        """What the last step has shown; to be taken away once it is judged."""
        self.compiled = False
        """Whether code was compiled in the last step, so that its modules were not observed to the end."""

    @property
    def fault(self) -> str | None:
        """The exception of a hook, after which nothing of the step is known."""
        return None if self._series is None else self._series.guard.fault

    @property
    def undecided(self) -> bool:
        """Whether a further step may show more than these did."""
        series = self._series
        return series is not None and series.begun < MOST_CALLS and series.updates.pending()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe until the end of the block.

        Raises:
            Exception: something of the model cannot be hooked or read; nothing is left in place then.
        """
        self.compiled, self.seen = False, None
        tree = self._read()
        series = self._continued(tree)
        recording = None if is_recording() else ProfilerRecording()
        recorder = CallRecorder(tree, series.guard, marked=recording is not None)
        with series.step(tree, recorder.backwards):
            with ExitStack() as stack:
                stack.enter_context(recorder.hooked())
                handler = import_module("torch._dynamo").callback_handler  # the optimizer's step loads it anyway
                started = series.guard(partial(self._on_compile, recorder))
                handler.register_start_callback(started)
                stack.callback(handler.remove_start_callback, started)
                random = RandomState()
                if recording is not None:
                    stack.enter_context(recording.opened())
                yield
            drew_random = random.advanced()
        missing = AROUND if recording is None else None if recording.lasted else INSIDE
        profile = recording.profile() if recording is not None and missing is None else StepProfile(missing=missing)
        self.seen = series.observe(tree.model, recorder, profile, drew_random=drew_random)

    @contextmanager
    def updates_only(self) -> Iterator[None]:
        """Observe what the updates of a step do, and nothing else; see ``step``."""
        tree = self._read()
        with self._continued(tree).step(tree):
            yield

    def forget(self) -> None:
        """Let the next step be the first."""
        self._series = self.seen = None

    def _read(self) -> ModelTree:
        model = self._reference()
        if model is None:
            raise RuntimeError("the model no longer exists")
        return ModelTree.of(model)

    def _continued(self, tree: ModelTree) -> _Series:
        """The series that this step continues, or a new one where something else changed the adapter since."""
        series = self._series
        if series is None or series.guard.fault is not None or not series.updates.continues(tree):
            series = self._series = _Series(tree)
        return series

    def _on_compile(self, recorder: CallRecorder, started: object) -> None:
        """Remove the hooks on modules where a compilation starts."""
        if not self.compiled:
            self.compiled = True
            recorder.break_off()


class _Series:
    """Observations of consecutive steps of one model, and the state that the next is compared with.

    Args:
        tree: of the model before the first.
    """

    def __init__(self, tree: ModelTree) -> None:
        self.guard = HookGuard()
        self.gradients = Gradients(self.guard)
        self.updates = Updates(tree, self.gradients)
        self.begun = 0
        """Steps so far."""
        self._before = digest(tree)
        self._others: dict[str, None] = {}
        """Classes of the optimizers that stepped and hold no parameter of the model."""
        self._stepped: list[GroupSeen] = []
        self._given: dict[int, frozenset[int]] = {}
        """Parameters with a gradient before an optimizer's step that has not ended, by the optimizer."""
        self._modes: dict[str, bool] = {}
        """When the first optimizer stepped, or at the end; for where no hook records them."""

    @contextmanager
    def step(self, tree: ModelTree, backwards: BackwardPasses | None = None) -> Iterator[None]:
        """Hook parameters and optimizers until the end of a step; ``backwards`` takes note of the updates, too."""
        own = frozenset(id(parameter) for _, parameter in tree.parameters)

        def is_own(optimizer: Any) -> bool:
            """Whether it holds a parameter of the model; torch calls the hooks for those of other models, too."""
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
            return not held.isdisjoint(own) or not held.isdisjoint(map(id, tree.model.parameters()))

        def begins(optimizer: Any, args: Any, kwargs: Any) -> Any:
            if not is_own(optimizer):
                return None
            self._modes = self._modes or _modes(tree)
            held = (value for group in optimizer.param_groups for value in group["params"])
            self._given[id(optimizer)] = frozenset(id(value) for value in held if value.grad is not None)
            if backwards is not None:
                backwards.update_begins()
            return self.updates.before(optimizer, args, kwargs)

        def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not is_own(optimizer):
                self._others[class_names(optimizer)[0]] = None
                return
            self.updates.after(optimizer)
            if backwards is not None:
                backwards.update_ends()
            self._stepped += groups_of(optimizer, self._given.pop(id(optimizer), ()))

        with ExitStack() as hooks:
            hooks.enter_context(self.gradients.watched(tree))
            hooks.push(register_optimizer_step_pre_hook(self.guard(begins)))
            hooks.push(register_optimizer_step_post_hook(self.guard(ends)))
            self.begun += 1
            self._stepped, self._modes = [], {}
            self.gradients.begin_call(tree)
            self.updates.begin_call()
            try:
                yield
            except BaseException as error:
                self.guard.fault = f"the step raised {type(error).__name__}"
                raise
        self.guard(self._end)(tree.model)

    def _end(self, model: nn.Module) -> None:
        self.gradients.end_call(model)
        self.updates.end_call()

    def observe(
        self, model: nn.Module, recorder: CallRecorder, profile: StepProfile, *, drew_random: bool
    ) -> Observation:
        """Everything that was observed, for the judges."""
        final, calls = ModelTree.of(model), recorder.calls()
        after, updates = digest(final), self.updates.by_name()
        before = {name: part.fingerprint for name, part in self._before.parts.items()}
        changed = {part.owner for name, part in after.parts.items() if before.get(name) != part.fingerprint}
        changed |= {name for name, one in updates.items() if one.moved or one.written}
        return Observation(
            model=final.model,
            final_tree=final,
            before=self._before,
            after=after,
            profile=profile,
            calls=self.begun,
            optimizer_steps=self.updates.steps,
            optimizers=tuple(self.updates.optimizers.values()),
            gradients=self.gradients.seen(final),
            changed=frozenset(name for name, value in final.parameters if value.requires_grad and name in changed),
            modules=calls,
            modes=calls.training() or self._modes or _modes(final),
            drew_random=drew_random,
            model_calls=tuple(recorder.model_calls),
            reached=self.gradients.reached(final),
            updates=updates,
            adapter_calls=recorder.layer_calls,
            compilations=read_compilations(),
            updated=tuple(self._stepped),
            other_optimizers=tuple(self._others),
        )


def _modes(tree: ModelTree) -> dict[str, bool]:
    return {name: module.training for name, module in tree.modules}
