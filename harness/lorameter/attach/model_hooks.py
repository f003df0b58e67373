"""What can be seen of a step where no Trainer says it: its batches, passes, loss, and the norm of its gradients.

Nothing is put on a model, an optimizer or a data loader, so that they can be pickled, scripted and freed as ever:
functions of torch are replaced for the whole process while a training is followed. torch.compile sees the training as
it is: where it traces a replaced function it finds the original call alone, and what the meter does around that call is
never compiled.

Batches are those of torch's DataLoader, with the wait for them. A backward pass is seen in `torch.autograd.backward`,
through which a tensor's own `backward` goes. The forward pass before it began where the step, the wait for its data, or
the pass or update before it had ended. The norm of the gradients is seen where they are clipped by it, in
`torch.nn.utils.clip_grad_norm_`, and a loss that a scaler multiplies in its `scale`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lorameter.attach.readings import Copied
from lorameter.attach.steps import Steps

Before = Callable[[tuple[Any, ...]], None]
"""Is given the positional arguments of a call before it."""
After = Callable[[tuple[Any, ...], Any, BaseException | None], None]
"""Is given the positional arguments, and what was returned or raised."""


class Patches:
    """Replaced functions, until they are taken off."""

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, Any, Any]] = []
        """The holder, the name, what was there, and what is there now."""
        self._on = [True]

    def put(self, holder: Any, name: str, *, before: Before | None = None, after: After | None = None) -> None:
        """Have a function of a module, or of a class, call these two around it."""
        original = vars(holder)[name]
        replaced = _around(original, before and uncompiled(before), after and uncompiled(after), self._on)
        self._put.append((holder, name, original, replaced))
        setattr(holder, name, replaced)

    def take_off(self) -> None:
        """Have everything as it was. Where ours was replaced since, it stays and does nothing."""
        self._on[:] = []
        self._on = [True]
        while self._put:
            holder, name, original, replaced = self._put.pop()
            if vars(holder).get(name) is replaced:
                setattr(holder, name, original)


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone, with everything that it calls. An optimizer has loaded Dynamo."""
    wrapped: Callable[..., Any] = torch.compiler.disable(lambda *args: call(*args))
    return wrapped


def _around(original: Any, before: Any, after: Any, on: list[bool]) -> Callable[..., Any]:
    compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not on:  # Dynamo takes the first of them for true, and sees nothing else
            return original(*args, **kwargs)
        if before is not None:
            before(args)
        if after is None:
            return original(*args, **kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            after(args, None, error)
            raise
        after(args, result, None)
        return result

    return replaced


def compiles_here() -> bool:
    """Whether this is called from a function that torch.compile was given, outside of its graphs."""
    with contextlib.suppress(Exception):  # of a version of torch that has no such function
        from torch._C._dynamo.eval_frame import get_eval_frame_callback

        return callable(get_eval_frame_callback())
    return False


MOST_AHEAD = 64
"""Batches of one loader that no backward pass has used yet; of more the oldest are forgotten."""


class ModelHooks:
    """Looks at the passes of one training. Takes nothing from them and gives nothing to them."""

    def __init__(self, steps: Steps, *, batches: bool) -> None:
        """It looks from here on.

        Args:
            steps: is informed of what is seen.
            batches: whether batches are counted here.
        """
        self._steps = steps
        self.within = True
        """Whether what happens is part of a step; batches may be loaded before it."""
        self.updates = False
        """Whether an optimizer updates."""
        self.passes_in_update = False
        """Whether passes were seen inside an update, which was given a closure."""
        self._loaders = Loaders()
        self._passes = 0
        """Backward passes under way; one that checkpointing begins inside another is a part of that."""
        self._losses: list[torch.Tensor] = []
        """That a scaler was given in this step."""
        self._roots: list[torch.Tensor] = []
        """That a backward pass began with."""
        self._patches = patches = Patches()
        patches.put(torch.autograd, "backward", before=self._begin_backward, after=self._end_backward)
        patches.put(torch.nn.utils, "clip_grad_norm_", after=self._clipped)
        patches.put(torch.amp.GradScaler, "scale", after=self._scaled)
        if batches:
            patches.put(_BaseDataLoaderIter, "__next__", before=self._wait, after=self._came)

    def _wait(self, args: tuple[Any, ...]) -> None:
        if self._is_for_training() and self.within:
            self._steps.during["data"].begin()

    def _came(self, args: tuple[Any, ...], batch: Any, error: BaseException | None) -> None:
        if not self._is_for_training():
            return
        if self.within:
            self._steps.during["data"].end()
        if error is None:
            self._loaders.put(args[0], self._steps.copy(batch))
        else:
            self._loaders.end(args[0])

    def _is_for_training(self) -> bool:
        """Whether what is loaded may be for a training: not where gradients are off, as in an evaluation."""
        return torch.is_grad_enabled() and self._steps.up

    def _begin_backward(self, args: tuple[Any, ...]) -> None:
        self._passes += 1
        if self._passes > 1 or not self._looks():
            return
        self.passes_in_update = self.passes_in_update or self.updates
        if args and isinstance(args[0], torch.Tensor) and args[0].numel() == 1:
            self._roots.append(args[0].detach())
        for batch in self._loaders.take():
            self._steps.count(batch)
        self._steps.begin_backward()

    def _end_backward(self, args: tuple[Any, ...], result: Any, error: BaseException | None) -> None:
        self._passes -= 1
        if self._passes == 0 and self._looks():
            self._steps.during["backward"].end()

    def _looks(self) -> bool:
        return self.within and self._steps.up

    def _clipped(self, args: tuple[Any, ...], norm: Any, error: BaseException | None) -> None:
        """A norm that lies on several ranks is left alone: reading it would have them wait for each other."""
        if type(norm) is torch.Tensor and self._looks():
            self._steps.gradient_norm(norm)

    def _scaled(self, args: tuple[Any, ...], scaled: Any, error: BaseException | None) -> None:
        if self._looks() and isinstance(args[1], torch.Tensor) and args[1].numel() == 1:
            self._losses.append(args[1].detach())

    def end_step(self) -> None:
        """The step is about to end. Its loss is what the gradients were taken of, in the sum of its passes, before a
        scaler multiplied it."""
        losses = self._losses or self._roots
        self._losses, self._roots = [], []
        for loss in losses:
            self._steps.loss(loss)
        for batch in self._loaders.end_step():
            self._steps.count(batch)

    def end(self) -> None:
        """It no longer looks."""
        self._patches.take_off()
        self._losses, self._roots = [], []


@dataclass(slots=True)
class _Loader:
    """An iterator of a DataLoader."""

    ahead: deque[Copied]
    """Batches that no pass has used yet."""
    early: bool
    """Whether it had loaded batches before it was seen."""
    loaded: int = 0
    """Batches that it has loaded in this step."""
    trains: bool = False
    """Whether any was used."""
    ended: bool = False


class Loaders:
    """Which of the loaded batches a step has used. A loader may be ahead of the training by a batch or more, so each
    backward pass uses the oldest batch of each loader."""

    def __init__(self) -> None:
        self._loaders: dict[int, _Loader] = {}
        """By the identity of their iterators."""

    def put(self, iterator: Any, batch: Copied) -> None:
        """It has loaded one."""
        key, loaded = id(iterator), getattr(iterator, "_num_yielded", 1)
        if loaded <= 1 or key not in self._loaders:
            self._loaders[key] = _Loader(deque([Copied()] * (loaded - 1), maxlen=MOST_AHEAD), early=loaded > 1)
        self._loaders[key].ahead.append(batch)
        self._loaders[key].loaded += 1

    def end(self, iterator: Any) -> None:
        """It has loaded all. A loader of which no pass has used any batch is that of an evaluation."""
        loader = self._loaders.get(id(iterator))
        if loader is not None and loader.trains:
            loader.ended = True
        else:
            self._loaders.pop(id(iterator), None)

    def take(self) -> list[Copied]:
        """What a pass uses, where that is known yet."""
        ready = [loader for loader in self._loaders.values() if loader.ahead]
        for loader in ready:
            loader.trains = True
        return [loader.ahead.popleft() for loader in ready if not loader.early]

    def end_step(self) -> list[Copied]:
        """What else the step has used: all but the newest batch of each loader, which may be loaded ahead. The first
        step that is seen has used as many as it has loaded, and so had the one before it, which was not."""
        found = []
        for loader in self._loaders.values():
            if loader.early and loader.trains:
                loader.early, batches = False, [*loader.ahead][loader.loaded :]
                found += batches[: loader.loaded]
                loader.ahead = deque(batches[loader.loaded :], maxlen=MOST_AHEAD)
            while len(loader.ahead) > 1:
                found.append(loader.ahead.popleft())
            loader.loaded = 0
        self._loaders = {key: one for key, one in self._loaders.items() if one.ahead or not one.ended}
        return found


def find_root(parameters: Iterable[torch.nn.Parameter]) -> torch.nn.Module | None:
    """The outermost module that holds the first parameter that trains; None where none is found.

    All objects that the collector knows are looked through, once: some tenths of a second before the first timed step.
    They are asked for their type and nothing else, since some are proxies that act when they are touched.
    """
    trained = next((one for one in parameters if one.requires_grad), None)
    if trained is None:
        return None
    holders = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.nn.Module) and any(parameter is trained for parameter in one.parameters())
    ]
    inner = {id(child) for holder in holders for child in holder.modules() if child is not holder}
    roots = [holder for holder in holders if id(holder) not in inner]
    return roots[0] if len(roots) == 1 else None
