"""What one rank says of a few steps of a training of several: facts as data, to be judged with those of all others.

Every rank observes at the same time, since what it looks at are collective steps. Nothing here exchanges anything of
its own but the whole of a sharded tensor. A gradient before and after its exchange would be gigabytes, so both are
compared by their product with a random vector of signs, the same on every rank: what is linear in gradients (a sum, a
mean) is linear in these numbers, and a wrong divisor or a missing exchange cannot hide in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.base import quant_state
from kernels_check.observe.hooks import RandomState, restored
from kernels_check.ranks.activity import RankTime, share_of

REPEATS = 4
"""How often the same batch goes through forward and backward: weights gathered wrongly are right at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient of one trained parameter in one step, as one rank has it."""

    own: float
    """Its product with the vector of signs before the exchange."""
    exchanged: float
    """The same after it; of a shard the part that lies here."""
    sharded: bool
    size: float
    """The norm of the rank's own gradient."""
    coarse: bool
    """Whether it is of 16 bits, so that a mean of it is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank found; every field is a JSON value."""

    rank: int
    ranks: int
    rows: tuple[str, ...] = ()
    """Digests of the sequences that its model was given in a step."""
    whole: tuple[str, ...] = ()
    """Digests of those that all ranks together were to be given."""
    base: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of each frozen parameter the bytes that lie here, and those of the whole."""
    four_bit: dict[str, int] = field(default_factory=dict)
    """Of each 4-bit weight how many weights it has: its whole must take half a byte for each."""
    adapter: dict[str, str] = field(default_factory=dict)
    """A digest of each trained parameter after an update."""
    gradients: dict[str, Gradient] = field(default_factory=dict)
    repeated: tuple[float, ...] = ()
    """Losses of the same batch with the same random numbers, between which nothing is updated."""
    base_losses: tuple[float, ...] = ()
    """Of one batch by the base alone: before the ranks shared it, as it is found, and after each of some steps."""
    activity: RankTime | None = None
    """How a profiled step was spent."""


def observe_rank(
    model: nn.Module,
    gradients: Callable[[], Tensor],
    update: Callable[[], object],
    rewind: Callable[[], object],
    meet: Callable[[], object],
    base_loss: Callable[[], float] | None,
    *,
    before: float,
    whole: Iterable[Tensor],
    rank: int,
    ranks: int,
) -> RankFacts:
    """Take steps with all other ranks, and leave everything as it was found but for the stream of data.

    Args:
        model: that is trained, as PEFT returned it; it may be wrapped or sharded.
        gradients: does the forward and backward passes of a step, and returns this rank's part of the loss.
        update: clips, lets the optimizer step, and drops the gradients.
        rewind: has the next call of `gradients` take the batch that the first one takes.
        meet: waits until every rank is there.
        base_loss: the loss of a batch that is always the same, without the adapter and without a gradient; None where
            parts of the base train.
        before: the same before the model was shared among ranks, as it was loaded.
        whole: the token ids of each sequence of that batch on all ranks together, shape (tokens,).
        rank: of this process.
        ranks: how many there are.

    Raises:
        Exception: whatever a step raises, after everything has been restored.
    """
    expected = tuple(map(_digest, whole))

    def step() -> None:
        gradients()
        update()

    with restored(model):
        base_losses = [] if base_loss is None else [before, base_loss()]
        random, repeated = RandomState(), []
        for _ in range(REPEATS):
            rewind()
            random.restore()
            repeated.append(float(gradients()))
            for _, parameter in _trained(model):
                parameter.grad = None
        rewind()
        with _fed(model) as rows, _own_gradients(model) as own:
            gradients()
        exchanged = {name: own.exchanged(name, parameter, rank, ranks) for name, parameter in _trained(model)}
        base = {name: _bytes(parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad}
        four_bit = _four_bit(model)
        update()
        base_losses += [] if base_loss is None else [base_loss()]
        adapter = {name: _digest(_whole(parameter)) for name, parameter in _trained(model)}
        activity = share_of(step, meet)
        base_losses += [] if base_loss is None else [base_loss()]
    return RankFacts(
        rank=rank,
        ranks=ranks,
        rows=tuple(rows),
        whole=expected,
        base=base,
        four_bit=four_bit,
        adapter=adapter,
        gradients=exchanged,
        repeated=tuple(repeated),
        base_losses=tuple(base_losses),
        activity=activity,
    )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def _fed(model: nn.Module) -> Iterator[list[str]]:
    """Digests of the sequences that the first module with token ids is given, in their order."""
    rows: list[str] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            rows.extend(_digest(row) for row in ids.detach())

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


class _Own:
    """The gradients that this rank makes, before they are exchanged."""

    def __init__(self) -> None:
        self.products: dict[str, float] = {}
        self.squares: dict[str, float] = {}

    def arrive(self, name: str, gradient: Tensor) -> None:
        signs = _signs(name, tuple(gradient.shape), gradient.device)
        self.products[name] = self.products.get(name, 0.0) + float((gradient.detach().double() * signs).sum())
        self.squares[name] = self.squares.get(name, 0.0) + float(gradient.detach().double().square().sum())

    def exchanged(self, name: str, parameter: nn.Parameter, rank: int, ranks: int) -> Gradient:
        gradient, product = parameter.grad, 0.0
        sharded = _is_sharded(parameter)
        if gradient is not None:
            signs = _signs(name, tuple(gradient.shape), gradient.device)
            if sharded:
                signs = _shard_of(gradient, signs, rank, ranks)
                gradient = gradient._local_tensor  # type: ignore[attr-defined]
            product = float((gradient.detach().double() * signs).sum())
        return Gradient(
            own=self.products.get(name, 0.0),
            exchanged=product,
            sharded=sharded,
            size=self.squares.get(name, 0.0) ** 0.5,
            coarse=parameter.dtype not in (torch.float32, torch.float64),
        )


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[_Own]:
    """Hook every trained parameter as it is when its module is called: FSDP2 puts another in its place for a forward.

    The hook sees a gradient before anything is added to it or exchanged.
    """
    own, names, hooks = _Own(), dict(model.named_modules()), []
    seen: dict[int, Tensor] = {}

    def hook(prefix: str) -> Callable[[nn.Module, Any], None]:
        def look(module: nn.Module, _: Any) -> None:
            for key, parameter in module.named_parameters(recurse=True):
                if parameter.requires_grad and id(parameter) not in seen and not _is_sharded(parameter):
                    seen[id(parameter)] = parameter
                    name = f"{prefix}.{key}".removeprefix(".")
                    hooks.append(parameter.register_hook(lambda gradient, name=name: own.arrive(name, gradient)))

        return look

    for prefix, module in names.items():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            for holder in {prefix, prefix.rpartition(".")[0]}:
                hooks.append(names[holder].register_forward_pre_hook(hook(holder)))
    try:
        yield own
    finally:
        for one in hooks:
            one.remove()


def _signs(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The vector of signs of a parameter, the same wherever it is asked for; float64."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1).to(device, torch.float64)


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


def _shard_of(gradient: Tensor, signs: Tensor, rank: int, ranks: int) -> Tensor:
    """The part of `signs` that belongs to what lies here of a sharded tensor."""
    placement = gradient.placements[0]  # type: ignore[attr-defined]
    if not placement.is_shard():
        return signs
    chunks = signs.chunk(ranks, dim=placement.dim)
    return chunks[rank] if rank < len(chunks) else signs.narrow(placement.dim, 0, 0)


def _bytes(parameter: Tensor) -> tuple[int, int]:
    here = parameter._local_tensor if _is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    return here.numel() * here.element_size(), parameter.numel() * parameter.element_size()


def _four_bit(model: nn.Module) -> dict[str, int]:
    """How many weights each 4-bit weight has, by its name; of one that FSDP2 has sharded the layer knows it."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "_parameters", {}).get("weight")
        state = None if weight is None else quant_state(module, weight)
        if state is not None:
            found[f"{name}.weight"] = int(torch.Size(state.shape).numel())
    return found


def _whole(parameter: Tensor) -> Tensor:
    """All of a parameter; of a sharded one by a collective that every rank comes to in the same order."""
    with torch.no_grad():
        return parameter.full_tensor() if _is_sharded(parameter) else parameter.detach()  # type: ignore[attr-defined]


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
