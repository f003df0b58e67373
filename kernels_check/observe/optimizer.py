"""Which optimizers stepped, by which operators, and what became of embeddings and norms.

Each operator that writes inside an optimizer's step is kept with the tensors that it wrote, and each parameter that
had a gradient is asked which of them wrote it. What clips gradients or counts steps writes no parameter. The backward
pass of a closure is left out.

A value that differs is no proof of training: weight decay moves what has a gradient of zero. So embeddings and norms
need a gradient, and what is used in their place (a copy that PEFT trains, the factors of an adapter, single tokens)
is judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from kernels_check.observe.adapter import AdapterLayer, adapter_layers, adapters_of, token_parameters
from kernels_check.observe.modules import ModelTree, every_parameter
from kernels_check.observe.operators import BACKWARD_ROOT, DISPATCH_MODE, OPTIMIZER_ROOT

if TYPE_CHECKING:
    from kernels_check.observe.learning import GradientSeen, ParameterUpdates


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


def describe(optimizer: Any) -> OptimizerSeen:
    """Read an optimizer as it is now."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    # Quantisation maps are shared between the states of many parameters: count each tensor once.
    tensors = {id(value): value for state in optimizer.state.values() for value in _tensors(state)}.values()
    size = {id(value): value.numel() * value.element_size() for value in tensors}
    return OptimizerSeen(
        classes=class_names(optimizer),
        learning_rates=tuple(rate_of(group) for group in optimizer.param_groups),
        parameters=frozenset(map(id, parameters)),
        state_bytes=sum(size.values()),
        paged_bytes=sum(size[id(value)] for value in tensors if getattr(value, "is_paged", False) is True),
        claims_paged=bool(getattr(optimizer, "is_paged", False)),
        fused_requested=optimizer.defaults.get("fused"),
        on_cpu=all(value.device.type == "cpu" for value in parameters),
    )


def class_names(optimizer: Any) -> tuple[str, ...]:
    """Qualified names of its class and every base class, the class first."""
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__)


def rate_of(group: Any) -> float:
    """Learning rate of one group; an optimizer that finds it by itself says none, which counts as one."""
    try:
        return abs(float(group.get("lr", 1.0)))
    except (TypeError, ValueError, RuntimeError):
        return 1.0


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]


LIBRARY_UPDATE = "bitsandbytes::optimizer"
KINDS = (("aten::_fused_", "fused"), ("aten::_foreach_", "foreach"), (LIBRARY_UPDATE, "bitsandbytes"))
UNSEEN = "unseen"

Identity = tuple[int, int]
"""Addresses of a tensor and of its storage; 0 for what has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One operator inside an optimizer's step that wrote tensors."""

    op: str
    tensors: tuple[Identity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSeen:
    """One group of an optimizer that stepped in the watched call."""

    optimizer: str
    """Class of the optimizer, by its short name."""
    index: int
    has_fused: bool
    """Whether its class takes a switch ``fused`` at all."""
    built_with: bool
    """Whether it was built with that switch on, whatever the group says now."""
    parameters: tuple[Identity, ...]
    """Those that had a gradient."""


def writes(name: str) -> bool:
    """Whether an operator of this name writes its first argument, or is a library's update."""
    return (name.startswith("aten::") and name.endswith("_")) or name.startswith(LIBRARY_UPDATE)


def identity(tensor: Tensor) -> Identity:
    """Of a tensor in this process."""
    storage = 0
    with suppress(RuntimeError):  # a sparse or opaque tensor has no storage; it is known by its address alone
        storage = tensor.untyped_storage().data_ptr()
    return int(tensor._cdata), storage


def write(name: str, arguments: Sequence[Any]) -> Write:
    """The write of an operator that ``writes``, from its arguments."""
    given = arguments if name.startswith(LIBRARY_UPDATE) else arguments[:1]
    return Write(op=name, tensors=tuple(identity(one) for one in _updates_tensors(given)))


def recorded_writes(roots: Iterable[Any], mark: str) -> Iterator[Write]:
    """The writes of a profile, from the roots of its tree of events.

    Args:
        roots: as ``experimental_event_tree`` gives them.
        mark: how the record of a module's call begins: there is no update in one.
    """
    for event in roots:
        if event.name.startswith(OPTIMIZER_ROOT):
            yield from _inside(event, mark)
        elif _is_range(event, mark):
            yield from recorded_writes(event.children, mark)


def is_hidden_by_a_mode(roots: Iterable[Any], mark: str) -> bool:
    """Whether a profile shows nothing inside an optimizer's step, since a dispatch mode was active around it.

    The operator that opens the step's range is given to the mode as any other, and the record of that ends the range.

    Args:
        roots: as for ``recorded_writes``.
        mark: likewise.
    """
    for event in roots:
        given = event.name == DISPATCH_MODE
        if given and any(one.name.startswith(OPTIMIZER_ROOT) for one in event.children):
            return True
        if (given or _is_range(event, mark)) and is_hidden_by_a_mode(event.children, mark):
            return True
    return False


def groups_of(optimizer: Any, before: Collection[int] = ()) -> tuple[GroupSeen, ...]:
    """The groups of an optimizer, right after its step.

    Args:
        optimizer: it.
        before: identities of the parameters that had a gradient before the step.
    """
    return tuple(
        GroupSeen(
            optimizer=type(optimizer).__name__,
            index=index,
            has_fused="fused" in optimizer.defaults,
            built_with=bool(optimizer.defaults.get("fused")),
            parameters=tuple(
                identity(value) for value in group["params"] if value.grad is not None or id(value) in before
            ),
        )
        for index, group in enumerate(optimizer.param_groups)
    )


def with_gradient(optimizer: Any) -> frozenset[int]:
    """Identities of an optimizer's parameters that have a gradient now."""
    return frozenset(
        id(value) for group in optimizer.param_groups for value in group["params"] if value.grad is not None
    )


def updated_by(groups: Sequence[GroupSeen], written: Iterable[Write]) -> list[Counter[str]]:
    """For each group, how many of its parameters were updated by each kind; ``unseen`` where none is known."""
    kinds: dict[int, set[str]] = {}
    for one in written:
        kind = next((kind for prefix, kind in KINDS if one.op.startswith(prefix)), "loop")
        for address, storage in one.tensors:
            kinds.setdefault(address, set()).add(kind)
            if storage:
                kinds.setdefault(-storage, set()).add(kind)
    alone = Counter(storage for _, storage in {one for group in groups for one in group.parameters})
    counts, counted = [], set[Identity]()
    for group in groups:  # an optimizer that wraps another has the same parameters
        own = [one for one in group.parameters if one not in counted]
        counts.append(Counter(_kind(kinds, address, at if alone[at] == 1 else 0) for address, at in own))
        counted.update(own)
    return counts


def operators_on(groups: Iterable[GroupSeen], written: Iterable[Write]) -> list[str]:
    """The operators that wrote any parameter of the groups, once for each call."""
    addresses = {address for group in groups for one in group.parameters for address in one if address}
    return [one.op for one in written if any(not addresses.isdisjoint(tensor) for tensor in one.tensors)]


def _kind(kinds: Mapping[int, set[str]], address: int, storage: int) -> str:
    found = kinds.get(address) or (kinds.get(-storage, set()) if storage else set())
    return next((kind for kind in ("fused", "bitsandbytes", "foreach", "loop") if kind in found), UNSEEN)


def _inside(root: Any, mark: str) -> Iterator[Write]:
    for event in root.children:
        if _is_range(event, mark):
            yield from _inside(event, mark)
        elif writes(event.name):
            inputs = getattr(event.extra_fields, "inputs", ())
            given = inputs if event.name.startswith(LIBRARY_UPDATE) else inputs[:1]
            yield Write(op=event.name, tensors=tuple(_recorded(given)))


def _is_range(event: Any, mark: str) -> bool:
    """Whether it is a range that a program opened, and not an operator, a backward pass or the call of a module."""
    scope = getattr(event.extra_fields, "scope", None)
    return getattr(scope, "name", "") == "USER_SCOPE" and not event.name.startswith((mark, BACKWARD_ROOT))


def _recorded(inputs: Iterable[Any]) -> Iterator[Identity]:
    for one in inputs:
        if isinstance(one, list | tuple):
            yield from _recorded(one)
        elif hasattr(one, "impl_ptr"):
            yield int(one.impl_ptr or 0), int(one.storage_data_ptr or 0)


def _updates_tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _updates_tensors(one)


Fate = Literal[
    "updated",
    "frozen",
    "without gradient",
    "gradient zero",
    "moved without a gradient",
    "changed, no gradient seen",
    "none of its tokens in the batches",
    "not given to an optimizer",
    "given a rate of 0",
    "undone after an update",
    "unchanged",
]
_OPEN: frozenset[Fate] = frozenset({"gradient zero", "moved without a gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterStatus:
    """One embedding or norm, and what became of each of its parameters, by name."""

    name: str
    fates: Mapping[str, Fate]
    tokens: tuple[int, int] | None = None
    """How many tokens train alone, of how many; None where the whole vocabulary does."""

    @property
    def updated(self) -> bool:
        """Whether all of them were updated."""
        return all(fate == "updated" for fate in self.fates.values())

    @property
    def open(self) -> bool:
        """Whether a further step may show more: a gradient is zero as long as the other factor is."""
        return not _OPEN.isdisjoint(self.fates.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModule:
    """The parameters that train in place of one embedding or norm."""

    values: list[Tensor]
    tokens: tuple[int, int] | None = None
    """As in ``ParameterStatus``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSeen:
    """What the steps have shown of parameters, by name."""

    changed: Set[str]
    """Those that differ from before the first call."""
    gradients: Mapping[str, GradientSeen]
    """Those that a gradient reached."""
    updates: Mapping[str, ParameterUpdates]
    """Those of an adapter."""
    optimizers: tuple[OptimizerSeen, ...]
    """All that stepped."""


def embedding_modules(tree: ModelTree) -> dict[str, TrainedModule]:
    """What trains in place of the input and the output embedding, by the name of the module; tied ones once."""
    found: set[int] = set()
    for _, module in tree.modules:
        for ask in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(Exception):  # a model that has none, or says so by an error
                found.add(id(getattr(module, ask)()))
    return _places(tree, lambda module: id(module) in found)


def norm_modules(tree: ModelTree) -> dict[str, TrainedModule]:
    """What trains in place of every norm that has parameters, by the name of the module.

    A norm is recognised by the names of its classes: those of libraries and of users derive from one that is called so.
    A head that normalises its weight first is called so, too, and is a linear layer.
    """
    return _places(
        tree,
        lambda module: bool(module._parameters) and not isinstance(module, nn.Linear) and _is_norm(type(module)),
    )


def fates_of(places: Mapping[str, TrainedModule], tree: ModelTree, evidence: TrainingSeen) -> list[ParameterStatus]:
    """What became of the parameters in some places.

    Args:
        places: as ``embedding_modules`` or ``norm_modules`` give them.
        tree: the model.
        evidence: what the steps have shown of them.
    """
    names = {id(value): name for name, value in tree.parameters}
    rates: dict[int, float] = {}
    for optimizer in evidence.optimizers:
        rate = max(optimizer.learning_rates, default=0.0)
        rates |= {key: max(rate, rates.get(key, 0.0)) for key in optimizer.parameters}
    rare = token_parameters(tree)

    def fate(value: Tensor) -> Fate:
        name = names.get(id(value), "")
        if not value.requires_grad:
            return "frozen"
        ungiven = _without_gradient(name, evidence, rare)
        return ungiven or _updated(name, evidence, rates.get(id(value)))

    return [
        ParameterStatus(
            name=name, fates={names.get(id(value), "?"): fate(value) for value in place.values}, tokens=place.tokens
        )
        for name, place in places.items()
    ]


def _without_gradient(name: str, evidence: TrainingSeen, rare: Set[str]) -> Fate | None:
    """What became of a parameter that no gradient reached, or only ones of zero; None of any other."""
    gradient = evidence.gradients.get(name)
    if gradient is None:
        return "changed, no gradient seen" if name in evidence.changed else "without gradient"
    if gradient.nonzero:
        return None
    if name in rare:
        return "none of its tokens in the batches"
    return "moved without a gradient" if name in evidence.changed else "gradient zero"


def _updated(name: str, evidence: TrainingSeen, rate: float | None) -> Fate:
    """What became of a parameter that a gradient reached."""
    known = evidence.updates.get(name)
    if known is not None and known.updates and known.unreadable is None:
        if known.lost:
            return "undone after an update"
        if known.rate and not known.fed:
            return "moved without a gradient" if known.moved else "gradient zero"
        if known.learnt or known.faint:
            return "updated"
        if known.stuck:
            return "unchanged"
    if name in evidence.changed:
        return "updated"
    if rate is None:
        return "not given to an optimizer"
    return "unchanged" if rate else "given a rate of 0"


def _is_norm(kind: type) -> bool:
    return any("norm" in one.__name__.lower() for one in kind.__mro__)


def _places(tree: ModelTree, is_one: Callable[[nn.Module], bool]) -> dict[str, TrainedModule]:
    """Parameters of the modules in question, each once, by the name of the place."""
    layers = {layer.name: layer for layer in adapter_layers(tree)}
    own = adapters_of(tree)
    places_of: dict[str, tuple[list[AdapterLayer], nn.Module]] = {}
    for name, module in tree.modules:
        if not own[name] and is_one(module):
            place, acting = _acting(name, layers)
            places_of.setdefault(place, (acting, module))
    seen = {id(value) for acting, _ in places_of.values() for layer in acting for value in _base_weights(layer)}
    places: dict[str, TrainedModule] = {}
    for name, (acting, module) in places_of.items():
        weights = [value for layer in acting for _, value in layer.weights()]
        values = weights if acting else list(module.parameters(False))
        fresh = {id(value): value for value in values if id(value) not in seen}
        seen.update(fresh)
        if fresh:
            places[name] = TrainedModule(values=list(fresh.values()), tokens=_tokens(acting))
    return places


def _acting(name: str, layers: Mapping[str, AdapterLayer]) -> tuple[str, list[AdapterLayer]]:
    """The name of a place, and the layers of an adapter that act there: one around the module, else those inside."""
    around = next((one for one in _around(name) if one in layers), None)
    if around is not None:
        return around, [layers[around]]
    return name, [layer for inside, layer in layers.items() if inside.startswith(f"{name}.")]


def _around(name: str) -> Iterator[str]:
    """The module itself, and the wrapper that replaces it."""
    yield name
    holder, _, attribute = name.rpartition(".")
    if attribute in ("original_module", "base_layer"):
        yield holder


def _base_weights(layer: AdapterLayer) -> Iterator[Tensor]:
    """The weights that the layer adds to, which may be those of another place, too."""
    if isinstance(layer.base, nn.Module):
        yield from every_parameter(layer.base)


def _tokens(acting: list[AdapterLayer]) -> tuple[int, int] | None:
    """How many tokens train, of how many, where only some do."""
    for layer in acting:
        indices: Any = getattr(layer.module, "token_indices", None)
        weight = getattr(layer.base, "weight", None)
        if isinstance(indices, dict) and isinstance(weight, Tensor):
            return len({index for name in layer.held for index in indices.get(name, ())}), weight.shape[0]
    return None
