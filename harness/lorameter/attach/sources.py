"""Sources of steps other than a Trainer, and the choice of the measured training: the first of the process.

A script may build two trainers, contain its own meter while it is wrapped, or fork. Every source of steps registers its
training here. A fork of the process is not measured, and of two processes of one script only one is measured (the
observer ensures this when it writes).

The steps of a loop are those that it marks (`for batch in steps(loader)`), else the intervals between updates of an
optimizer. In that case the training is detected at the first update, so the first step is not measured. The optimizer
of that update delimits the steps from then on; another optimizer that updates within them, as in adversarial training
or inside a wrapping optimizer, is part of the step. The training has ended when its optimizer has been freed, or no
longer updates while another one does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import pkgutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lorameter.attach.launch import DEFAULT_OBSERVER, ENV_OBSERVER
from lorameter.attach.observer import ErrorGuard, Source, TrainingInfo, TrainingObserver, print_notice
from lorameter.attach.steps import Steps, compiles_here, patch, uncompiled


class Attachment:
    """The measured training of one process. Not thread-safe."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._source: object = None
        self.steps: Steps | None = None
        self._reported = False
        """Whether another training was reported."""

    @property
    def occupied(self) -> bool:
        """Whether no new training can be measured: one is running, or this is a fork."""
        return self._pid is not None and not (self.steps is not None and self.steps.ended and self._pid == os.getpid())

    def begin(
        self,
        source: object,
        kind: Source,
        model: Any,
        *,
        parameters: Sequence[torch.nn.Parameter] = (),
        options: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> Steps | None:
        """Begin to measure a training.

        Args:
            source: the source of its steps; if its training has begun and not ended, this is the same training.
            kind: kind of the source.
            model: the trained model; None if unknown.
            parameters: those that an optimizer trains, from which the model is found.
            options: arguments of an observer that writes a run (`lorameter.attach.writer.Writer`).
            facts: further fields of the training (`TrainingInfo`).

        Returns:
            The object to which the source reports its steps; None if another training is or was measured.
        """
        if self._source is source and self.steps is not None and not self.steps.ended:
            self.steps.restart()
            return self.steps
        if self._pid is not None:
            self.report_another(kind)
            return None
        writes = (os.environ.get(ENV_OBSERVER) or DEFAULT_OBSERVER) == DEFAULT_OBSERVER
        rank, ranks = find_rank()
        if rank and not writes:
            return None  # the observer uses the steps of rank 0
        self._pid, self._source = os.getpid(), source
        observer = make_observer(**(options or {}))
        model = find_root(parameters) if parameters else model
        trainable, total = count_parameters(model)
        known = [*model.parameters()] if isinstance(model, torch.nn.Module) else [*parameters]
        training = TrainingInfo(
            source=kind,
            model=weakref.ref(model) if isinstance(model, torch.nn.Module) else None,
            device=str(find_device(known)),
            trainable_parameters=sum(one.numel() for one in parameters) if model is None and parameters else trainable,
            total_parameters=total,
            rank=rank,
            ranks=ranks,
            **facts,
        )
        self.steps = Steps(observer, training)
        atexit.register(self._end_with_process)
        if writes:  # if trainings take turns instead, their parent process detects the end of each process
            # Some scripts call os._exit, which skips exit handlers, since a library would abort at a normal exit.
            patch(os, "_exit", before=lambda args: self._end_with_process())
        self.steps.begin()
        return self.steps

    def report_another(self, source: Source) -> None:
        """Report once that another training is not measured, and end the first training."""
        if self._reported or self.steps is None or self._pid != os.getpid():
            return
        self._reported = True
        print_notice(f"another training of this script (seen by its {source}) is not measured: only the first is")
        self.steps.end(None, seen=False)

    def _end_with_process(self) -> None:
        """End the measurement because the process ends before the training has ended: an error occurred, or the script
        abandoned the training."""
        if self.steps is not None and self._pid == os.getpid():
            error = getattr(sys, "last_value", None)  # the exception that the interpreter has just printed
            self.steps.end(error, seen=False)


@functools.cache  # one per process, however many modules call this
def this_process() -> Attachment:
    """The attachment of this process; a fork has that of its parent process, and is not measured."""
    return Attachment()


def make_observer(**options: Any) -> TrainingObserver:
    """The observer named in the environment as `package.module:callable`; else one that writes a run, with these
    options.

    Raises:
        ImportError: the module does not exist.
        AttributeError: the module has no such name.
    """
    name = os.environ.get(ENV_OBSERVER)
    observer: TrainingObserver = (
        pkgutil.resolve_name(name)() if name else pkgutil.resolve_name(DEFAULT_OBSERVER)(**options)
    )
    return observer


def find_device(parameters: Sequence[torch.nn.Parameter]) -> torch.device:
    """The device of the first trainable parameter, else of the first parameter; without parameters, the GPU if the
    process has initialised CUDA."""
    first = next((one for one in parameters if one.requires_grad), next(iter(parameters), None))
    if first is not None:
        return first.device
    return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")


def find_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torch.distributed, else from the launcher's environment."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def count_parameters(model: Any) -> tuple[int | None, int | None]:
    """The numbers of trainable and of all parameters; a packed 4-bit weight counts with its unpacked elements. None if
    the object is not a model.

    PEFT and transformers have their own counts, since a packed weight has half as many elements as the unpacked weight.
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


MAX_OTHERS = 100
"""Updates of another optimizer since the last update of the first, after which the first training counts as ended: in
no step with several optimizers does one of them update so often."""


class OptimizerSource:
    """Observes the steps of the first optimizer that updates, without keeping references to its training. The hook of a
    process (`hook/sitecustomize.py`) calls `end_update` after the update of every optimizer."""

    def __init__(self) -> None:
        self._steps: Steps | None = None
        self._optimizer: Callable[[], Any] = lambda: None
        self._call_patch = contextlib.ExitStack()
        """The patch of the module call, which stays until the model is called in a step that must be watched."""
        self._others: Counter[int] = Counter()
        """Updates of each other optimizer since the last update of the first."""
        self._over = compiles_here()
        """Whether nothing is measured: no training was begun, or it has ended."""
        if self._over:
            print_notice(
                "this training is not measured: torch.compile compiles its whole step, with the optimizer's update"
            )
        self._end_uncompiled = uncompiled(self._end_update)

    @property
    def end_update(self) -> Callable[[Any], None]:
        """The function to call after each update; torch.compile does not trace it."""
        return self._end_uncompiled if compiles_here() else self._end_update

    def _end_update(self, optimizer: Any) -> None:
        if self._over:
            return
        if self._steps is None:
            if not this_process().occupied:
                self._begin(optimizer)
        elif optimizer is self._optimizer():
            self._others.clear()
            self._call_patch.close()
            self._steps.end_step()
            self._watch_next(self._steps)
        else:
            self._others[id(optimizer)] += 1
            if self._optimizer() is None or self._others[id(optimizer)] >= MAX_OTHERS:
                self._over = True
                self._call_patch.close()
                this_process().report_another("optimizer")

    def _begin(self, optimizer: Any) -> None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        self._steps = ErrorGuard().run(this_process().begin, self, "optimizer", None, parameters=parameters)
        self._over = self._steps is None
        if self._steps is not None:
            self._optimizer = weakref.ref(optimizer)
            weakref.finalize(optimizer, self._stop).atexit = False  # at interpreter shutdown, modules are gone
            self._watch_next(self._steps)

    def _watch_next(self, steps: Steps) -> None:
        """Open a watched step only at the model's next call, which does not come after the last step."""
        model = steps.training.module
        if model is None or not steps.watch_is_due:
            return
        trained, parts = model.training, frozenset(map(id, model.modules()))

        def call(args: tuple[Any, ...]) -> None:
            called = steps.training.module if id(args[0]) in parts and torch.is_grad_enabled() else None
            if called is not None and called.training == trained:
                self._call_patch.close()
                steps.open_step()

        self._call_patch.callback(patch(torch.nn.Module, "__call__", before=call))

    def _stop(self) -> None:
        """Stop watching the training. Its steps are reported and its hooks are removed later, at the next update or at
        the end of the process, because this may be called anywhere, for example by the garbage collector."""
        self._call_patch.close()
        if self._steps is not None:
            self._steps.is_observing = False
            self._steps.abandon_step()


def find_root(parameters: Iterable[torch.nn.Parameter]) -> torch.nn.Module | None:
    """The outermost module that holds the first trainable parameter; None unless there is exactly one.

    Searches all objects of the garbage collector once, which takes some tenths of a second before the first timed step.
    Only their type is read, since some are proxies with side effects on access.
    """
    trained = next((one for one in parameters if one.requires_grad), None)
    holders = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.nn.Module) and any(parameter is trained for parameter in one.parameters())
    ]
    inner = {id(child) for holder in holders for child in holder.modules() if child is not holder}
    roots = [holder for holder in holders if id(holder) not in inner]
    return roots[0] if len(roots) == 1 else None
