"""Training runs drawn at random, to show that watching one leaves it exactly as it was.

Each is small and odd: several optimizers, groups that come and go, buffers that grow or are assigned anew, parameters
replaced, counters that enter the loss, accumulation, sparse gradients, second models, running averages, and a step that
may raise anywhere. Two runs of one seed are twins: what one is after it was watched, the other is without.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

WIDTH, ROWS, WORDS = 4, 3, 7


class PlannedError(RuntimeError):
    """What a step raises where that was planned."""


class OddModel(nn.Module):
    """A model whose state is in every place where a module can keep some."""

    calls = 0
    trail: Tensor

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, sparse=draw.random() < 0.3)
        self.body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(draw.randint(1, 3))))
        self.norm = nn.BatchNorm1d(WIDTH) if draw.random() < 0.5 else nn.LayerNorm(WIDTH)
        self.habits = {habit for habit in HABITS if draw.random() < 0.3}
        self.seen: list[float] = []
        self.notes: dict[str, Any] = {"scale": 1.0}
        self.register_buffer("trail", torch.zeros(1))
        for layer in self.body:
            layer.train(draw.random() < 0.8)
            layer.weight.requires_grad_(draw.random() < 0.8)

    def forward(self, words: Tensor) -> Tensor:
        """The loss; words are [rows]."""
        self.calls += 1
        hidden = self.norm(self.body(self.embed(words)))
        if "drop" in self.habits:
            hidden = dropout(hidden, 0.3, self.training)
        loss = hidden.pow(2).mean() * (1 + 0.01 * self.calls) * self.notes["scale"]
        self._change(loss.detach())
        total: Tensor = loss + 0.1 * self.trail.sum() + 0.01 * len(self.seen)
        return total

    def _change(self, loss: Tensor) -> None:
        if "grow" in self.habits:
            self.trail = torch.cat([self.trail, loss.reshape(1)])
        if "resize" in self.habits:
            self.trail.resize_(self.trail.numel() + 1)[-1] = loss
        if "write" in self.habits:
            self.trail.add_(loss)
        if "append" in self.habits:
            self.seen.append(float(loss))
        if "note" in self.habits:
            self.notes["scale"] *= 1.1
            self.notes[f"call {self.calls}"] = self.calls
        if "register" in self.habits:
            self.register_buffer(f"late{self.calls}", loss.clone())
        if "vanish" in self.habits and self.calls > 2 and "passing" in self._buffers:
            del self.passing
        elif "vanish" in self.habits:
            self.register_buffer("passing", loss.clone(), persistent=False)
        if "replace" in self.habits:
            with torch.no_grad():
                self.norm.bias = nn.Parameter(self.norm.bias * 0.9)
        if "modes" in self.habits:
            self.body.train(not self.body.training)
        if "freeze" in self.habits:
            self.body[0].bias.requires_grad_(not self.body[0].bias.requires_grad)


HABITS = "drop grow resize write append note register vanish replace modes freeze".split()


class Counting(torch.optim.SGD):
    """An optimizer whose rate depends on attributes of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.5)
        self.updates = 0
        self.past: list[int] = []
        self.noise = torch.Generator().manual_seed(5)

    def step(self, closure: Any = None) -> Any:
        """Update at a rate that shrinks with every update."""
        self.updates += 1
        self.past.append(self.updates)
        for group in self.param_groups:
            group["lr"] = 0.05 / len(self.past) * (1 + float(torch.rand((), generator=self.noise)))
        return super().step(closure)


DENSE: list[Callable[[Any], torch.optim.Optimizer]] = [
    Counting,
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), foreach=False),
    lambda parameters: torch.optim.RMSprop(parameters, lr=1e-2, momentum=0.5),
    lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=2),
]

TAKE_NO_OTHERS = (torch.optim.Adagrad, torch.optim.LBFGS)
"""They take no parameters later: the one has no state for them in torch 2.11, the other has one group only."""


class RandomRun:
    """One run of a seed.

    Args:
        seed: of everything about the run.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.model = OddModel(draw)
        self.second = OddModel(draw) if draw.random() < 0.4 else None
        self.second_steps = draw.random() < 0.5
        self.accumulate = draw.choice([1, 1, 2])
        self.to_none = draw.random() < 0.5
        self.zero_first = draw.random() < 0.5
        self.adds_group, self.drops_parameter = draw.random() < 0.2, draw.random() < 0.1
        self.words = [torch.randint(WORDS, (ROWS,)) for _ in range(3)]
        self.optimizers = [*self._optimizers(self.model, draw)]
        if self.second is not None and self.second_steps:
            self.optimizers += self._optimizers(self.second, draw)
        self.schedule: Any = None
        if draw.random() < 0.3:
            self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizers[0], 0.9)
        self.average = None
        if (
            draw.random() < 0.4
            and not self.model.habits & {"grow", "resize", "register", "vanish"}
            and not self.adds_group
        ):
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if draw.random() < 0.3:
            for parameter in self.model.norm.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.model.train(draw.random() < 0.9)
        self.fuse: int | None = None
        """Places of the step that are passed before it raises."""
        self.warm = draw.randint(0, 3)
        self.breaks_at = draw.randint(0, 12) if draw.random() < 0.35 else None

    @staticmethod
    def _optimizers(model: OddModel, draw: random.Random) -> Iterator[torch.optim.Optimizer]:
        kinds = DENSE[:-1] if "freeze" in model.habits else DENSE  # L-BFGS counts what trains once and for all
        sparse = [model.embed.weight]
        dense = [value for value in model.parameters() if value is not model.embed.weight]
        if not model.embed.sparse:
            yield draw.choice(kinds)([*sparse, *dense])
            return
        yield torch.optim.SparseAdam(sparse, lr=1e-2)
        cut = draw.randint(1, len(dense) - 1) if draw.random() < 0.5 else len(dense)
        yield draw.choice(kinds)(dense[:cut])
        if cut < len(dense):
            yield draw.choice(kinds)(dense[cut:])

    def step(self) -> float:
        """Forward, backward and an update; raises ``PlannedError`` where the fuse says so."""
        if self.zero_first:
            self._zero()
        self._pass()
        loss = self._loss()
        loss.backward()
        self._pass()
        if self.second is not None:
            self.second(self.words[0]).backward()
            self._pass()
        if self.model.calls % self.accumulate == 0:
            self._update()
        if not self.zero_first and self.model.calls % self.accumulate == 0:
            self._zero()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._pass()
        return float(loss.detach())

    def _loss(self) -> Tensor:
        loss: Tensor = self.model(self.words[self.model.calls % len(self.words)])
        return loss

    def _update(self) -> None:
        last = self.optimizers[-1]
        if self.adds_group and len(last.param_groups) == 1 and not isinstance(last, TAKE_NO_OTHERS):
            extra = nn.Parameter(torch.ones(2))
            extra.grad = torch.ones(2)
            self.model.extra = extra
            last.add_param_group({"params": [extra]})
        elif (
            self.drops_parameter and len(last.param_groups[0]["params"]) > 1 and not isinstance(last, torch.optim.LBFGS)
        ):
            last.param_groups[0]["params"].pop()
        for optimizer in self.optimizers:
            self._pass()
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(self._closure)
            else:
                optimizer.step()
            self._pass()
        if self.schedule is not None:
            self.schedule.step()

    def _closure(self) -> Tensor:
        self._pass()
        loss = self._loss()
        loss.backward()
        return loss

    def _zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.to_none)

    def _pass(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise PlannedError

    def describe(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as values that can be compared."""
        models = {"model": self.model, "second": self.second, "average": self.average}
        told: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
        for title, model in models.items():
            for name, module in model.named_modules() if model is not None else ():
                told[f"{title}.{name}"] = _value({key: one for key, one in vars(module).items() if key != "_modules"})
        for place, optimizer in enumerate(self.optimizers):
            told[f"optimizer {place}"] = _value(
                {
                    "state": [optimizer.state.get(one) for group in optimizer.param_groups for one in group["params"]],
                    "states": len(optimizer.state),
                    "groups": optimizer.param_groups,
                    "own": {key: one for key, one in vars(optimizer).items() if key in ("updates", "past", "noise")},
                }
            )
        if self.schedule is not None:
            told["schedule"] = _value(self.schedule.state_dict())
        return told


def check_restored(seed: int) -> str | None:
    """Watch a run of this seed and compare it with its twin; say what differs, or None.

    Args:
        seed: of the run.
    """
    from kernels_check import verify

    ends = []
    for watched in (False, True):
        run = RandomRun(seed)
        for _ in range(run.warm):
            run.step()
        identities = _identities(run)
        if watched:
            run.fuse = run.breaks_at
            raised = False
            try:
                verify(run.model, run.step, {})
            except PlannedError as error:
                raised = True
                if getattr(error, "__notes__", None):
                    return f"seed {seed}: {error.__notes__}"
            if not raised and run.fuse is not None and run.fuse < 0:
                return f"seed {seed}: what was planned to be raised was swallowed"
            run.fuse = None
            if _identities(run) != identities:
                return f"seed {seed}: other objects than before"
        ends.append((run.describe(), [run.step() for _ in range(3)]))
    (before, losses), (before_twin, losses_twin) = ends
    for key in {*before, *before_twin}:
        if before.get(key) != before_twin.get(key):
            return f"seed {seed}: {key}: {_difference(before.get(key), before_twin.get(key))}"
    if losses != losses_twin:
        return f"seed {seed}: losses {losses} without, {losses_twin} with"
    return None


def _difference(one: Any, other: Any, path: str = "") -> str:
    """The first place where two described values differ."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for place, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            if ours != theirs:
                return _difference(ours, theirs, f"{path}[{ours[0] if isinstance(ours, tuple) else place}]")
    return f"{path} is {str(other)[:200]} instead of {str(one)[:200]}"


def _identities(run: RandomRun) -> list[Any]:
    kept = [(name, id(value), id(value.grad)) for name, value in run.model.named_parameters()]
    groups = [id(one) for optimizer in run.optimizers for group in optimizer.param_groups for one in group["params"]]
    return [kept, [id(value) for value in run.model.buffers()], groups]


def _value(one: Any) -> Any:
    """A value that equals another to the bit, gradients and all."""
    if isinstance(one, Tensor):
        grad = _value(one.grad) if one.is_leaf else None
        layout, dense = str(one.layout), one.detach().to_dense().contiguous()
        raw = dense.reshape(-1).view(torch.uint8).clone().numpy().tobytes()
        return (layout, str(one.dtype), tuple(one.shape), one.requires_grad, raw, grad)
    if isinstance(one, dict):
        return [(str(key), _value(item)) for key, item in one.items()]
    if isinstance(one, (list, tuple)):
        return [_value(item) for item in one]
    if isinstance(one, set):
        return sorted(map(str, one))
    if isinstance(one, torch.Generator):
        return one.get_state().tolist()
    return one if isinstance(one, (int, float, str, type(None))) else type(one).__name__
