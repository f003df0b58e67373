"""Gathers the evidence of all ranks about a watched step, for the ``ranks.*`` paths of ``watch``.

A gradient may take gigabytes, so gradients before and after the exchange are compared by their dot product with a
random vector of signs, which is the same on every rank. The product is linear, so the sum or mean over ranks carries
over to it, and it shows a wrong divisor or a missing exchange.

The ranks exchange their evidence after a watched step in a collective operation, so every rank must watch the same step
with the same requirements.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kernels_check.observe.digest import Fingerprinter
from kernels_check.observe.modules import HookGuard, hook_gradient, plain_parts
from kernels_check.observe.profile import optimized_by

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient of one trained parameter in one step, on one rank."""

    own: float
    """Its product with the vector of signs before the exchange."""
    exchanged: float
    """The same product at the update; for a sharded parameter, of the local part."""
    sharded: bool
    size: float
    """The norm of the rank's own gradient."""
    coarse: bool
    """Whether it is a 16-bit gradient, so that its mean is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvidence:
    """One rank's evidence about a watched step; every field is a JSON value."""

    rank: int
    problem: str | None = None
    """Why the rank could not observe the step."""
    flat: bool = False
    """Whether its parameters are flattened into parts without names, so that only updates can be counted."""
    undecided: bool = False
    """Whether its watch waits for a further step."""
    updates: int = 0
    """Updates by optimizers that hold parameters of the model, over the watched steps."""
    counted: int | None = None
    """Updates since the training began, by the optimizer's own counter; None if it has none."""
    base: Mapping[str, str] = field(default_factory=dict)
    """A hash of each part of the base that is unsharded on this rank, including the scales of quantised weights."""
    shards: int = 0
    """Number of base parameters that are sharded."""
    adapter: Mapping[str, str] = field(default_factory=dict)
    """A hash of each trained parameter after the step."""
    gradients: Mapping[str, Gradient] = field(default_factory=dict)


class RankObserver:
    """Observes the gradients that the optimizer of this rank receives in a step.

    Args:
        model: the trained model, referenced weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = weakref.ref(model)
        self._hooks, self._guard = ExitStack(), HookGuard()
        self._own: dict[str, Tensor] = {}
        """For each gradient before its exchange, its product with the vector of signs and its squared norm."""
        self._exchanged: dict[str, Gradient] = {}
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self) -> None:
        """Hook the trained parameters and the optimizers at the start of a step.

        During a forward pass, FSDP2 replaces the parameters of a sharded model, so these are hooked when a module is
        called.
        """
        model = self._model()
        trained = trained_parameters(model)
        self._own, self._exchanged, self._guard = {}, {}, HookGuard()
        self._hooks.push(register_optimizer_step_pre_hook(self._guard(self._before_update)))
        for name, parameter in trained.items():
            if not is_sharded(parameter):
                hook_gradient(self._hooks, parameter, self._arrival(name))
        if any(map(is_sharded, trained.values())):
            self._hook_modules(model)

    def end(self) -> None:
        """Remove every hook at the end of a step."""
        self._hooks.close()

    def exchange(
        self, observation: Observation | None, problem: str | None, *, undecided: bool
    ) -> tuple[RankEvidence, ...]:
        """Exchange the evidence of all ranks, in rank order; empty if only one process trains.

        Args:
            observation: the observed step of this rank.
            problem: why it proves nothing; given if there is no observation.
            undecided: whether this rank waits for a further step.
        """
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return ()
        own = RankEvidence(rank=distributed.get_rank(), problem=problem or self._guard.fault, undecided=undecided)
        if not any(gather(own.problem)) and observation is not None:
            try:
                own = self._evidence(own, observation)
            except Exception as error:
                own = replace(own, problem=f"{type(error).__name__}: {error}")
        return tuple(gather(own))

    def _evidence(self, own: RankEvidence, observation: Observation) -> RankEvidence:
        own = replace(own, updates=observation.optimizer_steps, counted=counted_updates(self._optimizers))
        flat = ("ds_id", "_fsdp_flattened", "_is_flat_param")
        if any(hasattr(parameter, name) for parameter in observation.model.parameters() for name in flat):
            return replace(own, flat=True)
        parts = {name: part for name, part in observation.after.parts.items() if part.kind != "cache"}
        shards = [
            name
            for name, part in parts.items()
            if part.owner in observation.after.sharded and part.kind in ("parameter", "merged")
        ]
        return replace(
            own,
            base={name: part.fingerprint for name, part in parts.items() if name not in shards},
            shards=len(shards),
            adapter=fingerprints(observation.model),
            gradients=self._exchanged,
        )

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook; at this point the gradients have been exchanged."""
        optimized = set(map(id, optimized_by(optimizer)))
        for name, parameter in trained_parameters(self._model()).items():
            if id(parameter) in optimized:
                self._optimizers.add(optimizer)
                if name not in self._exchanged:
                    self._exchanged[name] = self._gradient(name, parameter)

    def _arrival(self, name: str) -> Callable[[Tensor], None]:
        """A hook that reads a gradient before it is accumulated or exchanged."""

        def arrive(gradient: Tensor) -> None:
            exact = gradient.detach().double()
            signs = _make_signs(name, tuple(gradient.shape), gradient.device)
            self._own[name] = self._own.get(name, 0.0) + torch.stack([(exact * signs).sum(), exact.square().sum()])

        return self._guard(arrive)

    def _hook_modules(self, model: nn.Module) -> None:
        hooked: dict[int, Tensor] = {}
        names = dict(model.named_modules())

        def hook_parameters(prefix: str, module: nn.Module) -> None:
            for key, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in hooked and not is_sharded(parameter):
                    hooked[id(parameter)] = parameter
                    hook_gradient(self._hooks, parameter, self._arrival(f"{prefix}.{key}".removeprefix(".")))

        holders = {
            holder
            for name, module in names.items()
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            for holder in (name, name.rpartition(".")[0])  # a layer may directly use the weight of an inner module
        }
        for holder in holders:
            called = self._guard(lambda module, _, prefix=holder: hook_parameters(prefix, module))
            self._hooks.push(names[holder].register_forward_pre_hook(called))

    def _gradient(self, name: str, parameter: Any) -> Gradient:
        gradient, product = parameter.grad, 0.0
        if gradient is not None:
            signs = _make_signs(name, tuple(gradient.shape), gradient.device)
            if is_sharded(parameter):
                signs = _select_shard(gradient, signs)
                gradient = gradient.to_local()
            product = float((gradient.detach().double() * signs).sum())
        own, square = self._own.get(name, torch.zeros(2)).tolist()
        return Gradient(
            own=own,
            exchanged=product,
            sharded=is_sharded(parameter),
            size=square**0.5,
            coarse=parameter.dtype not in (torch.float32, torch.float64),
        )


def gather(data: Any) -> list[Any]:
    """Gather the data of every rank, in rank order; a collective operation."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, data)
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A hash of each trained parameter; sharded parameters are gathered, which is a collective operation."""
    take = Fingerprinter()
    with torch.no_grad():
        whole = {
            name: parameter.full_tensor() if is_sharded(parameter) else parameter.detach()  # type: ignore[attr-defined]
            for name, parameter in trained_parameters(model).items()
        }
        return {name: " ".join(take(part) for _, part in plain_parts(value)) for name, value in whole.items()}


def counted_updates(optimizers: Any) -> int | None:
    """The largest update count in the state of any parameter; None if the optimizers do not count."""
    states = [state for optimizer in optimizers for state in optimizer.state.values() if "step" in state]
    return max((int(state["step"]) for state in states), default=None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this rank holds a part."""
    return type(tensor).__name__ == "DTensor"


def _make_signs(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The vector of signs of a parameter in float64, the same on every rank."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1).to(device, torch.float64)


def _select_shard(gradient: Any, signs: Any) -> Any:
    """The part of `signs` for the local shard of a tensor. Raises ValueError for a mesh with several dimensions."""
    mesh, placement = gradient.device_mesh, gradient.placements[0]
    if mesh.ndim != 1:
        raise ValueError("gradients of a mesh with several dimensions are not compared")
    if not placement.is_shard():
        return signs.div(mesh.size())
    chunks, place = signs.chunk(mesh.size(), dim=placement.dim), mesh.get_local_rank()
    return chunks[place] if place < len(chunks) else signs.narrow(placement.dim, 0, 0)
