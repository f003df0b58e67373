"""Where steps are seen without a Trainer, and which training of a process is followed: the first, until it ends.

A script may build two trainers, carry a meter of its own while it is wrapped, or fork. Every source of steps registers
its training here. A fork of the process is not followed, and of two processes of one script one is (each observer
ensures that where it writes).

The steps of a loop are those that it names (`for batch in steps(loader)`), else the stretches between two updates of an
optimizer. There the training is known once the first update is done, so the first step is not seen. The optimizer that
did it marks the steps from then on; another one that updates within them, as in adversarial training or inside an
optimizer that wraps it, is part of the step. The training has ended when its optimizer has been freed, or updates no
more while another one does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lorameter.attach.launch import DEFAULT_FOLLOWER, ENV_FOLLOWER
from lorameter.attach.observer import (
    ErrorGuard,
    NotFollowedError,
    Source,
    TrainingInfo,
    TrainingObserver,
    say,
    weakly,
)
from lorameter.attach.steps import Patches, Steps, compiles_here, uncompiled

MakeObserver = Callable[[], TrainingObserver]


class UnendedError(NotFollowedError):
    """A training has not come to its end."""


class Attachment:
    """The training of one process that is followed. Not thread-safe."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._source: object = None
        self.steps: Steps | None = None
        self._reported = False
        """Whether another training was reported."""

    @property
    def occupied(self) -> bool:
        """Whether no new training is followed: one is under way, or this is a fork."""
        return self._pid is not None and not (self.steps is not None and self.steps.ended and self._pid == os.getpid())

    def begin(
        self,
        source: object,
        kind: Source,
        model: Any,
        make: MakeObserver | None = None,
        *,
        parameters: Sequence[torch.nn.Parameter] = (),
        **facts: Any,
    ) -> Steps | None:
        """Follow a training from here on.

        Args:
            source: who sees its steps; of one that has begun and not ended it is the same training.
            kind: of source.
            model: that trains; None where it is not seen.
            make: makes the observer; None: the one that the environment names.
            parameters: that train, where the model is not seen.
            facts: further fields of the training (`TrainingInfo`).

        Returns:
            What the source informs of the steps; None where another training is followed, or was.
        """
        if self._pid == os.getpid() and self._source is source and self.steps is not None and self.steps.up:
            self.steps.restart()
            return self.steps
        if self._pid is not None:
            self.report_another(kind)
            return None
        writes = os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER) == DEFAULT_FOLLOWER
        rank, ranks = rank_of()
        if rank and not writes:
            return None  # it follows what rank 0 shows
        self._pid, self._source, guard = os.getpid(), source, ErrorGuard()
        observer = guard.run(make or named_observer)
        if observer is None:
            return None
        trainable, total = count_parameters(model)
        known = [*model.parameters()] if isinstance(model, torch.nn.Module) else [*parameters]
        training = TrainingInfo(
            source=kind,
            model=weakly(model),
            trainable_parameters=sum(one.numel() for one in parameters) if model is None and parameters else trainable,
            total_parameters=total,
            rank=rank,
            ranks=ranks,
            **facts,
        )
        self.steps = Steps(observer, training, device_of(known), guard)
        atexit.register(self._end_with_process)
        if writes:
            self._end_before_exit()  # the parent of trainings in turns sees by itself that a process is gone
        self.steps.begin()
        return self.steps

    def report_another(self, source: Source) -> None:
        """Another training has begun. It is not followed: the observer learns of it once, and the first has ended."""
        if self._reported or self.steps is None or self._pid != os.getpid():
            return
        self._reported = True
        say(f"another training of this script (seen by its {source}) is not followed: the first one is")
        ErrorGuard().run(self.steps.observer.begin, TrainingInfo(source=source))
        self.steps.end(_unended(self.steps), seen=False)

    def _end_with_process(self) -> None:
        """The process ends and the training has not: by an error, or because the script has let it go."""
        if self.steps is not None and self._pid == os.getpid():
            error = getattr(sys, "last_value", None)  # what the interpreter has just printed
            self.steps.end(error if isinstance(error, BaseException) else _unended(self.steps), seen=False)

    def _end_before_exit(self) -> None:
        """`os._exit` leaves out what is registered for the end of a process. Scripts call it where a library would
        abort there, and their training is as whole as any."""
        module: Any = os
        leave = module._exit

        @functools.wraps(leave)
        def end_and_leave(status: int) -> None:
            try:
                self._end_with_process()
            finally:
                leave(status)

        module._exit = end_and_leave


def _unended(steps: Steps) -> BaseException | None:
    """The error of a Trainer that did not come to its end; a loop may have come to its own."""
    by_trainer = steps.training.source == "trainer"
    return UnendedError("the Trainer did not come to the end of its training") if by_trainer else None


@functools.cache  # of the process: what it follows is one thing, however many modules ask
def this_process() -> Attachment:
    """The attachment of this process; a fork has that of the process it was forked from, and is not followed."""
    return Attachment()


def named_observer() -> TrainingObserver:
    """The observer that the environment names as `package.module:callable`; else a run is written.

    Raises:
        ImportError: there is no such module.
        AttributeError: it has no such name.
    """
    module, _, name = os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER).partition(":")
    make: MakeObserver = getattr(importlib.import_module(module), name)
    return make()


def device_of(parameters: Sequence[torch.nn.Parameter]) -> torch.device:
    """The device of the first parameter that trains, else of the first; the CPU where there is none."""
    first = next((one for one in parameters if one.requires_grad), next(iter(parameters), None))
    return torch.device("cpu") if first is None else first.device


def device_in_use() -> str:
    """Where a training whose model is not seen computes: on the GPU if the process has initialised CUDA."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"


def rank_of() -> tuple[int, int]:
    """This process's rank and how many there are, from torch.distributed, else as a launcher left them."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def count_parameters(model: Any) -> tuple[int | None, int | None]:
    """Parameters that train, and all; a packed 4-bit weight counts as the elements that it holds. None for anything but
    a model.

    PEFT and transformers count their own, since a packed weight has half as many elements as the weight it holds.
    """
    if not isinstance(model, torch.nn.Module):
        return None, None
    found: Any = model
    if callable(getattr(model, "get_nb_trainable_parameters", None)):
        trainable, total = found.get_nb_trainable_parameters()
        return int(trainable), int(total)
    if callable(getattr(model, "num_parameters", None)):
        return int(found.num_parameters(only_trainable=True)), int(found.num_parameters())
    parameters = list(model.parameters())
    return sum(one.numel() for one in parameters if one.requires_grad), sum(one.numel() for one in parameters)


MOST_OTHERS = 100
"""Updates of another optimizer without one of the first, after which the first training is over: no step of several
optimizers has so many of one."""


class OptimizerSource:
    """Sees the steps of the first optimizer that updates, and holds nothing of its training. The hook of a process
    (`hook/sitecustomize.py`) calls it before and after the update of every optimizer."""

    def __init__(self, make: MakeObserver | None = None) -> None:
        self._make = make
        self._steps: Steps | None = None
        self._optimizer: Callable[[], Any] = lambda: None
        self._calls = Patches()
        """The call of a module, until one of the model is called in a step that is to be watched."""
        self._others: Counter[int] = Counter()
        """Updates of each other optimizer since the last one of the first."""
        self._over = compiles_here()
        """Whether nothing is followed: no training was begun, or it has ended."""
        if self._over:
            say("this training is not followed: torch.compile compiles its whole step, with the optimizer's update")
        self.begin_update = uncompiled(self._begin_update)
        """An update begins."""
        self.end_update = uncompiled(self._end_update)
        """An update of this optimizer has ended."""

    def _begin_update(self) -> None:
        if self._steps is not None:
            if self._steps.passes_in_update:
                self._steps.open_step()
            self._steps.begin_update()

    def _end_update(self, optimizer: Any) -> None:
        if self._over:
            return
        if self._steps is None:
            if not this_process().occupied:
                self._begin(optimizer)
            return
        self._steps.end_update()
        if optimizer is self._optimizer():
            self._others.clear()
            self._calls.remove()
            self._steps.end_step()
            self._watch_next(self._steps)
            return
        self._others[id(optimizer)] += 1
        if self._optimizer() is None or self._others[id(optimizer)] >= MOST_OTHERS:
            self.end(seen=False)
            this_process().report_another("optimizer")

    def _begin(self, optimizer: Any) -> None:
        self._steps = ErrorGuard().run(self._follow, optimizer)
        if self._steps is None:
            self._over = True
            return
        self._optimizer = weakref.ref(optimizer)
        weakref.finalize(optimizer, self._remove_hooks).atexit = False  # while the interpreter ends, modules are gone
        self._steps.restart()
        self._watch_next(self._steps)

    def _follow(self, optimizer: Any) -> Steps | None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        return this_process().begin(self, "optimizer", find_root(parameters), self._make, parameters=parameters)

    def _watch_next(self, steps: Steps) -> None:
        """A step that is to be watched is opened when a module of the model is called: after the last step none is.
        Where the closure of an update calls the model, the step is opened before the update."""
        model = steps.training.module
        if model is None or steps.passes_in_update or not steps.watch_is_due:
            return
        trained, parts = model.training, frozenset(map(id, model.modules()))

        def call(args: tuple[Any, ...]) -> None:
            called = steps.training.module if id(args[0]) in parts and torch.is_grad_enabled() else None
            if called is not None and called.training == trained:
                self._calls.remove()
                steps.open_step()

        self._calls.add(torch.nn.Module, "__call__", before=call)

    def _remove_hooks(self) -> None:
        """Stop watching the training. Its steps are written later, by the next update or at the end of the process:
        this may be called anywhere, as by the garbage collector."""
        self._calls.remove()
        if self._steps is not None:
            self._steps.remove_hooks()

    def end(self, *, seen: bool = True) -> None:
        """Stop following the training."""
        self._over = True
        self._remove_hooks()
        if self._steps is not None:
            self._steps.end(None, seen=seen)


def find_root(parameters: Iterable[torch.nn.Parameter]) -> torch.nn.Module | None:
    """The outermost module that holds the first parameter that trains; None where none is found.

    All objects that the collector knows are searched, once: some tenths of a second before the first timed step.
    Only their type is read, since some are proxies that act on any access.
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
