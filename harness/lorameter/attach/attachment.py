"""Which training of a process is followed: the first that begins, until it ends; and what that training is.

A script may build two trainers, carry a meter of its own while it is wrapped, or fork. Whatever begins a training asks
here first. The process is the one that begins; a fork of it is not followed, and two processes of one script are never
both followed (each observer sees to that where it writes).
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorameter.attach.environment import DEFAULT_FOLLOWER, ENV_FOLLOWER
from lorameter.attach.observer import ErrorGuard, NotFollowedError, Source, TrainingInfo, TrainingObserver, say, weakly
from lorameter.attach.steps import Steps


class Attachment:
    """The training of one process that is followed. Not shared between threads."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._source: object = None
        self._follower: TrainingObserver | None = None
        self.steps: Steps | None = None
        self._reported = False
        """Whether another training was reported."""

    @property
    def occupied(self) -> bool:
        """Whether whatever trains now is not to be followed: a training is under way, or this is a fork."""
        return self._pid is not None and not (self.steps is not None and self.steps.ended and self._pid == os.getpid())

    def begin(
        self,
        source: object,
        training: TrainingInfo,
        device: torch.device,
        make: Callable[[], TrainingObserver] | None = None,
    ) -> Steps | None:
        """Follow a training from here on.

        Args:
            source: who sees its steps; of one that has begun and not ended it is the same training.
            training: as it is before its first step.
            device: that it computes on.
            make: makes its follower; None: the one that the environment names.

        Returns:
            What the source tells of the steps; None where another training is followed, or was.
        """
        if self._pid == os.getpid() and self._source is source and self.steps is not None and self.steps.up:
            self.steps.restart()
            return self.steps
        if self._pid is not None:
            self.report_another(training.source)
            return None
        if training.rank and os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER) != DEFAULT_FOLLOWER:
            return None  # it follows what rank 0 shows
        self._pid, self._source = os.getpid(), source
        shield = ErrorGuard()
        follower = shield.run(make or named_follower)
        if follower is None:
            return None
        self._follower = follower
        self.steps = Steps(follower, training, device, shield)
        atexit.register(self._end_with_process)
        if os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER) == DEFAULT_FOLLOWER:
            self._see_exit()  # the parent of trainings in turns sees by itself that a process is gone
        self.steps.begin()
        return self.steps

    def report_another(self, source: Source) -> None:
        """Another training has begun. It is not followed, and who follows the first learns of it, once."""
        if self._reported or self._follower is None or self._pid != os.getpid():
            return
        self._reported = True
        say(f"another training of this script (seen by its {source}) is not followed: the first one is")
        ErrorGuard().run(self._follower.begin, TrainingInfo(source=source))

    def _end_with_process(self) -> None:
        """The process ends and the training has not: by an error, or because the script has let it go."""
        if self.steps is None or self._pid != os.getpid():
            return
        error = getattr(sys, "last_value", None)  # what the interpreter has just printed
        self.steps.end(error if isinstance(error, BaseException) else self._source_end(), seen=False)

    def _see_exit(self) -> None:
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

    def _source_end(self) -> BaseException | None:
        """The error of a training that did not end; None of a source that sees no end."""
        unended: Any = getattr(self._source, "unended", None)
        return None if unended is None else unended()


class UnendedError(NotFollowedError):
    """The process has ended, and its training had not."""


@functools.cache  # of the process: what it follows is one thing, however many modules ask
def this_process() -> Attachment:
    """The attachment of this process; a fork has that of the process it was forked from, and is not followed."""
    return Attachment()


def follow(
    source: object,
    kind: Source,
    model: Any,
    make: Callable[[], TrainingObserver] | None,
    *,
    parameters: Sequence[torch.nn.Parameter] = (),
    **facts: Any,
) -> Steps | None:
    """Follow the training of a model, as `Attachment.begin` does; of one that is not seen these `parameters` train."""
    rank, ranks = rank_of()
    trainable, total = count_parameters(model)
    if model is None and parameters:
        trainable = sum(one.numel() for one in parameters)
    training = TrainingInfo(
        source=kind,
        model=weakly(model),
        trainable_parameters=trainable,
        total_parameters=total,
        rank=rank,
        ranks=ranks,
        **facts,
    )
    device = parameters[0].device if parameters else device_of(model)
    return this_process().begin(source, training, device, make)


def named_follower() -> TrainingObserver:
    """The follower that the environment names; else a run is written.

    Raises:
        ImportError: there is no such module.
        AttributeError: it has no such name.
    """
    module, _, name = os.environ.get(ENV_FOLLOWER, DEFAULT_FOLLOWER).partition(":")
    make: Callable[[], TrainingObserver] = getattr(importlib.import_module(module), name)
    return make()


def device_of(model: Any) -> torch.device:
    """The device of the first parameter that trains, else of the first; the CPU where there is none."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    first = next(trained, parameters[0] if parameters else None)
    return torch.device("cpu") if first is None else first.device


def rank_of() -> tuple[int, int]:
    """This process's rank and how many there are, from torch.distributed, else as a launcher left them."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def count_parameters(model: Any) -> tuple[int | None, int | None]:
    """Parameters that train, and all; weights of 4 bits count as what they stand for. None of what is no model.

    PEFT and transformers count their own, since a packed weight has half as many elements as the weight it holds.
    """
    if not isinstance(model, torch.nn.Module):
        return None, None
    by_peft: Any = getattr(model, "get_nb_trainable_parameters", None)
    if callable(by_peft):
        trainable, total = by_peft()
        return int(trainable), int(total)
    by_transformers: Any = getattr(model, "num_parameters", None)
    if callable(by_transformers):
        return int(by_transformers(only_trainable=True)), int(by_transformers())
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters)
