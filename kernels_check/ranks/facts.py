"""What one rank says of a few steps of a training of several: facts as data, to be judged with those of all others.

Every rank observes at the same time, since what it looks at are collective steps. What a watched step of any training
shows of its ranks is not repeated here (`observe.ranks`).
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
from kernels_check.observe.modules import RandomState, restored
from kernels_check.observe.ranks import is_sharded, trained_parameters
from kernels_check.ranks.activity import RankTime, share_of

REPEATS = 4
"""How often the same batch goes through forward and backward: weights gathered wrongly are right at first."""


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
            for parameter in trained_parameters(model).values():
                parameter.grad = None
        rewind()
        with _fed(model) as rows:
            gradients()
        base = {name: _bytes(parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad}
        four_bit = _four_bit(model)
        update()
        base_losses += [] if base_loss is None else [base_loss()]
        activity = share_of(step, meet)
        base_losses += [] if base_loss is None else [base_loss()]
    return RankFacts(
        rank=rank,
        ranks=ranks,
        rows=tuple(rows),
        whole=expected,
        base=base,
        four_bit=four_bit,
        repeated=tuple(repeated),
        base_losses=tuple(base_losses),
        activity=activity,
    )


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


def _bytes(parameter: Tensor) -> tuple[int, int]:
    here = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
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


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
