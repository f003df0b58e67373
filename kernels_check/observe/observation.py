"""What was seen of a step, for the judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from kernels_check.observe.adapter import (
    AdapterLayer,
    adapter_layers,
    base_parameters,
    biases_of_adapters,
    token_parameters,
    trained_parameters,
)
from kernels_check.observe.base import Storage, read_wrapped, storage_in
from kernels_check.observe.calls import Calls
from kernels_check.observe.compile import (
    BlockRecomputed,
    Compilations,
    CompiledBlocks,
    compiled_blocks,
    ran_without_gradient,
    recomputed_blocks,
)
from kernels_check.observe.digest import Digest, WeightBits, take_census
from kernels_check.observe.fused_kernels import FusedKernelSite, swapped_places
from kernels_check.observe.inputs import ModelCall, PaddingSeen, count_padding
from kernels_check.observe.isolation import IsolationResult, isolation_by_inputs
from kernels_check.observe.layers import AttentionLayers, LayerProducts, attention_layers, fourbit_layers, products_of
from kernels_check.observe.learning import GradientSeen, ParameterUpdates
from kernels_check.observe.loss import LossSeen, loss_of_step
from kernels_check.observe.modules import ModelTree
from kernels_check.observe.optimizer import (
    GroupSeen,
    OptimizerSeen,
    ParameterStatus,
    TrainedModule,
    TrainingSeen,
    embedding_modules,
    fates_of,
    norm_modules,
    operators_on,
    updated_by,
)
from kernels_check.observe.profile import StepProfile
from kernels_check.observe.ranks import RankEvidence
from kernels_check.observe.targets import LayerCall, layers_left_to_experts, unmatched_names

_T = TypeVar("_T")


def _once(read: Callable[[Observation], _T]) -> Callable[[Observation], _T]:
    """A reading of the model that is taken when it is first asked for, and kept: a dozen judges ask for the same."""

    @wraps(read)
    def kept(seen: Observation) -> _T:
        if read.__name__ not in seen.readings:
            seen.readings[read.__name__] = read(seen)
        found: _T = seen.readings[read.__name__]
        return found

    return kept


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything seen over the watched calls of the step; the methods read the model as it is when first asked."""

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
    """Calls of the adapter's layers in the call that counts, by the layer's name; what is compiled notes none."""
    model_calls: tuple[ModelCall, ...] = ()
    """Calls of the model itself in the hooked call; none where it is compiled in place."""
    compilations: Compilations = field(default_factory=Compilations)
    """What torch.compile has on record after the last call."""
    isolate: Callable[[Observation], IsolationResult] | None = None
    """Changes the records of packed calls; without, they are judged by what the model was given."""
    left: ModelTree | None = None
    """The model as the last call left it; None where it has been restored since."""
    updated: tuple[GroupSeen, ...] = ()
    """Groups of the optimizers that stepped in the watched call."""
    other_optimizers: tuple[str, ...] = ()
    """Classes of optimizers that stepped in any of the calls and hold no parameter of the model: they are another
    model's, or hold copies of this one's, as master weights are."""
    ranks: tuple[RankEvidence, ...] = ()
    """What every rank shows of the step, where several train and a requirement asks."""
    readings: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What the methods have read of the model, by their names; a copy with another field reads anew."""

    @_once
    def compiled_blocks(self) -> CompiledBlocks:
        """The blocks of the model by whether they ran in compiled code."""
        seen = self.profile.compiler
        return compiled_blocks(self.model, self.modules, seen.entered, seen.eager, self.gradients)

    @_once
    def recomputed_blocks(self) -> tuple[BlockRecomputed, ...]:
        """The blocks of the model that a gradient comes back to, with what was computed again."""
        return recomputed_blocks(self.model, self.modules)

    @_once
    def blocks_without_gradient(self) -> tuple[str, ...]:
        """The blocks of the model that ran and that no gradient comes back to."""
        return ran_without_gradient(self.model, self.modules, self.recomputed_blocks())

    @_once
    def updated_by_kind(self) -> list[Counter[str]]:
        """For each of the groups in ``updated``, how many parameters were updated by which kind of operator."""
        return updated_by(self.updated, self.profile.writes)

    @_once
    def update_operators(self) -> list[str]:
        """The operators that wrote any of those parameters."""
        return operators_on(self.updated, self.profile.writes)

    @_once
    def tree(self) -> ModelTree:
        """Modules and parameters."""
        return self.left or ModelTree.of(self.model)

    @_once
    def adapter_layers(self) -> list[AdapterLayer]:
        """Places with an adapter that is in use."""
        return adapter_layers(self.tree())

    @_once
    def trained_parameters(self) -> dict[str, Tensor]:
        """Parameters of the adapter that have to learn, by name."""
        return trained_parameters(self.tree())

    @_once
    def token_parameters(self) -> frozenset[str]:
        """Parameters of the adapter that only some tokens of the vocabulary use, by name."""
        return token_parameters(self.tree())

    @_once
    def unmatched_names(self) -> list[str]:
        """Names that the adapter's configuration asks for and that matched nothing."""
        return unmatched_names(self.tree())

    @_once
    def layers_left_to_experts(self) -> list[str]:
        """Layers without an adapter of a name that PEFT has made a parameter of experts of."""
        return layers_left_to_experts(self.tree())

    @_once
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are no adapter's, by name."""
        return base_parameters(self.tree())

    @_once
    def attention_layers(self) -> AttentionLayers:
        """The layers in which attention ran or should have."""
        return attention_layers(
            self.model, self.modules, self.profile.attention, self.profile.mixing, self.profile.reductions
        )

    @_once
    def base_products(self) -> LayerProducts:
        """The products of every base layer below an adapter, by the name of the layer that carries the adapter."""
        wrapped = [layer.name for layer in self.adapter_layers() if layer.base is not None]
        layers = {name: (f"{name}.base_layer",) for name in wrapped}
        ran = {name: own if self.modules.ran(own[0]) else (name,) for name, own in layers.items()}
        return products_of(ran, self.model, self.modules, (*self.profile.fourbit, *self.profile.products))

    @_once
    def fourbit_products(self) -> LayerProducts:
        """The 4-bit products of every linear layer of the model with a 4-bit weight, by its name."""
        return products_of(fourbit_layers(self.tree()), self.model, self.modules, self.profile.fourbit)

    @_once
    def storage(self) -> dict[str, Storage]:
        """How the base layer below each adapter keeps its weight, by the layer's name."""
        read = partial(storage_in, self.tree())
        wrapped = (layer for layer in self.adapter_layers() if layer.base is not None)
        return {layer.name: read_wrapped(layer.module, read) for layer in wrapped}

    @_once
    def census(self) -> WeightBits:
        """How many bytes of the whole base are kept in how many bits."""
        return take_census(self.tree())

    @_once
    def biases_of_adapters(self) -> Mapping[str, str]:
        """Biases of the base that train as a part of the adapter, by name, with what PEFT was asked."""
        return biases_of_adapters(self.tree())

    @_once
    def swapped(self) -> list[FusedKernelSite]:
        """Where fused kernels of other libraries may be bound, and what is bound there."""
        return swapped_places(self.tree(), self.modules, self.model_calls)

    @_once
    def loss(self) -> LossSeen:
        """Over which tokens the loss is, and how much they weigh."""
        return loss_of_step(self.model_calls)

    @_once
    def embeddings(self) -> list[ParameterStatus]:
        """The input and output embedding, with what became of their parameters."""
        return self._fates(embedding_modules(self.tree()))

    @_once
    def norms(self) -> list[ParameterStatus]:
        """Every norm with parameters, with what became of them."""
        return self._fates(norm_modules(self.tree()))

    def _fates(self, places: Mapping[str, TrainedModule]) -> list[ParameterStatus]:
        shown = TrainingSeen(
            changed=self.changed, gradients=self.gradients, updates=self.updates, optimizers=self.optimizers
        )
        return fates_of(places, self.tree(), shown)

    def isolation(self) -> IsolationResult:
        """Whether packed records are isolated."""
        if self.isolate is not None:
            return self.isolate(self)
        return isolation_by_inputs(self.model, self.model_calls, self.attention_layers().calls)

    @_once
    def padding(self) -> PaddingSeen | None:
        """Padding in the inputs of the model; None where no call of it was seen."""
        return count_padding(self.model, self.model_calls)
