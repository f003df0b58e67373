"""Turns the events of a training's source into readings of steps, which are reported to the observer.

The source calls a method for each event (a batch came, a part begins, the step is over). The clock of a step runs from
the observer's return to the step's end on the device, which is waited for once. What the observer does at the end of a
step, and evaluation and saving, are in no step's time.

Between two steps each line of Python costs ten times what it costs in a loop, since its code is in no cache. So a step
that has ended is noted and no more: batches are copied, the loss is read, and all else is computed when the observer is
informed, every second or as soon as anything else happens.

Nothing is put on a model, an optimizer or a data loader, so that they can be pickled, scripted and freed as ever:
functions of torch are replaced for the whole process while a training is followed. torch.compile sees the training as
it is: where it traces a replaced function it finds the original call alone, and what the meter does around that call is
never compiled. A backward pass is seen in `torch.autograd.backward`, through which a tensor's own `backward` goes; the
forward pass before it began where the step, the wait for its data, or the pass or update before it had ended. The norm
of the gradients is what `torch.nn.utils.clip_grad_norm_` returns, and a loss that a scaler multiplies is seen in its
`scale`.

On a CPU a part's time is what the clock says. On a GPU the host runs ahead of the device, and waiting for it at each
border would change the step; so events stamp the borders, and are read once the step has ended.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lorameter.attach.batches import Copied, Loaders, copy_batch, total_tokens
from lorameter.attach.observer import (
    ErrorGuard,
    NotFollowedError,
    ObserverReply,
    Phase,
    StepReading,
    TrainingInfo,
    TrainingObserver,
)
from lorameter.records.units import format_count

Part = Literal["data", "forward", "backward", "optimizer"]
Border = tuple[Part | None, Literal["begin", "end", "backward"], float, Any]
"""The part (None: the step itself), whether it begins or ends, the host's clock, and on a GPU an event. At a border of
the kind "backward" a backward pass begins, and the time since the border before it was a forward pass."""


Before = Callable[[tuple[Any, ...]], None]
"""Is given the positional arguments of a call before it."""
After = Callable[[tuple[Any, ...], Any, BaseException | None], None]
"""Is given the positional arguments, and what was returned or raised."""


def _nothing(*args: Any) -> None:
    """In place of a function that is not given."""


class Patches:
    """Replaced functions, until they are removed."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        """The holder, the name, the original and its replacement."""
        self._on = [True]

    def add(self, holder: Any, name: str, *, before: Before = _nothing, after: After = _nothing) -> None:
        """Have a function of a module, or of a class, call these two around it."""
        original = vars(holder)[name]
        replacement = _around(original, before, after, self._on)
        self._replaced.append((holder, name, original, replacement))
        setattr(holder, name, replacement)

    def remove(self) -> None:
        """Restore the originals. Where a replacement was replaced since, it stays and does nothing."""
        self._on[:] = []
        self._on = [True]
        while self._replaced:
            holder, name, original, replacement = self._replaced.pop()
            if vars(holder).get(name) is replacement:
                setattr(holder, name, original)


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone, with everything that it calls. An optimizer has loaded Dynamo."""
    wrapped: Callable[..., Any] = torch.compiler.disable(lambda *args: call(*args))
    return wrapped


def compiles_here() -> bool:
    """Whether this is called from a function that torch.compile was given, outside of its graphs."""
    return callable(get_eval_frame_callback())


def _around(original: Any, before: Before, after: After, on: list[bool]) -> Callable[..., Any]:
    compiling = torch.compiler.is_compiling
    plain = before, after
    disabled = uncompiled(before), uncompiled(after)  # which takes several times as long to call

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not on:  # Dynamo takes the first of them for true, and sees nothing else
            return original(*args, **kwargs)
        call_before, call_after = disabled if compiles_here() else plain
        call_before(args)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            call_after(args, None, error)
            raise
        call_after(args, result, None)
        return result

    return replacement


class Steps:
    """Informs one observer of one training. Every call is guarded: it raises no error of the meter's."""

    def __init__(
        self, observer: TrainingObserver, training: TrainingInfo, device: torch.device, guard: ErrorGuard
    ) -> None:
        self.observer = observer
        self.training = training
        self._cuda = device if device.type == "cuda" else None
        self._guard = guard
        guard.on_error = self._failed
        self._number = 0
        self._next = ObserverReply()
        self._noted: list[tuple[Any, ...]] = []
        """Arguments of `read_step` for steps that were not reported yet."""
        self._reported_s = -math.inf
        self._phase: Phase = "train"
        self._watch: Any = None
        """The watch of the present step; consecutive steps share it."""
        self._open = False
        self.ended = False
        """Whether the training has ended."""
        self.within = True
        """Whether what happens is part of a step."""
        self.passes_in_update = False
        """Whether a backward pass ran inside an update, as in the closure of LBFGS."""
        self._updating = False
        self._passes = 0
        """Backward passes under way; one that checkpointing begins inside another is a part of that."""
        self._loaders = Loaders()
        self._patches = Patches()
        self._handles: list[Any] = []
        self._norm: torch.Tensor | None = None
        """Norm of the gradients that the step updates by; no later step changes it."""
        self._start_step()

    @property
    def up(self) -> bool:
        """Whether the training is followed: it has not ended, and the meter has not failed."""
        return self._guard.up and not self.ended

    def begin(self) -> None:
        """The training is before its first step."""
        self._guard.run(self._begin)

    def _begin(self) -> None:
        self._next = self.observer.begin(self.training)
        self.add_hooks()
        self._start_step()

    def add_hooks(self) -> None:
        """See from here on what happens inside the steps."""
        add = self._patches.add
        add(torch.autograd, "backward", before=self._begin_backward, after=self._end_backward)
        add(torch.nn.utils, "clip_grad_norm_", after=self._keep_norm)
        add(torch.amp.GradScaler, "scale", after=self._keep_loss)
        if self.training.source == "optimizer":  # which sees the updates, and not the batches
            add(_BaseDataLoaderIter, "__next__", before=self._wait, after=self._load)
        else:
            self._handles = [
                register_optimizer_step_pre_hook(_update_hook(self.begin_update)),
                register_optimizer_step_post_hook(_update_hook(self.end_update)),
            ]

    def remove_hooks(self) -> None:
        """Stop watching the training, and restore all that was replaced."""
        self._patches.remove()
        while self._handles:
            self._handles.pop().remove()
        self.break_off()

    def batch(self, batch: Any) -> None:
        """The step computes this batch, before it is moved or changed."""
        self._batches.append(self._guard.run(copy_batch, batch) or Copied())

    def begin_part(self, part: Part) -> None:
        """A part of the step begins."""
        self._borders.append((part, "begin", time.perf_counter(), self._stamp()))

    def end_part(self, part: Part) -> None:
        """A part of the step has ended, with all that is inside it; ignored where it did not begin."""
        self._borders.append((part, "end", time.perf_counter(), self._stamp()))

    @property
    def _active(self) -> bool:
        return self.within and self.up

    def begin_update(self) -> None:
        """An optimizer's update begins."""
        if self._active:
            self._updating = True
            self.begin_part("optimizer")

    def end_update(self) -> None:
        """It has ended."""
        if self._active:
            self._updating = False
            self.end_part("optimizer")

    def _begin_backward(self, args: tuple[Any, ...]) -> None:
        self._passes += 1
        if self._passes > 1 or not self._active:
            return
        self.passes_in_update = self.passes_in_update or self._updating
        if args and _is_scalar(args[0]):
            self._roots.append(args[0].detach())
        self._batches += self._loaders.take()
        self._borders.append(("backward", "backward", time.perf_counter(), self._stamp()))

    def _end_backward(self, args: tuple[Any, ...], result: Any, error: BaseException | None) -> None:
        self._passes -= 1
        if self._passes == 0 and self._active:
            self.end_part("backward")

    def _keep_norm(self, args: tuple[Any, ...], norm: Any, error: BaseException | None) -> None:
        """A norm that lies on several ranks is left alone: reading it would have them wait for each other."""
        if type(norm) is torch.Tensor and self._active:
            self._norm = norm.detach()

    def _keep_loss(self, args: tuple[Any, ...], scaled: Any, error: BaseException | None) -> None:
        if self._active and _is_scalar(args[1]):
            self._scaled.append(args[1].detach())

    @property
    def _loads(self) -> bool:
        """Whether a loaded batch may be for the training: not where gradients are off, as in an evaluation."""
        return torch.is_grad_enabled() and self._active

    def _wait(self, args: tuple[Any, ...]) -> None:
        if self._loads:
            self.begin_part("data")

    def _load(self, args: tuple[Any, ...], batch: Any, error: BaseException | None) -> None:
        if not self._loads:
            return
        self.end_part("data")
        if error is None:
            self._loaders.put(args[0], self._guard.run(copy_batch, batch) or Copied())
        else:
            self._loaders.end(args[0])

    def _stamp(self) -> Any:
        """An event of the device, here and now; None on a CPU."""
        return None if self._cuda is None else self._guard.run(_record_event)

    @property
    def watch_is_due(self) -> bool:
        """Whether a check was requested that has not begun."""
        return self.up and self._next.watch is not None and not self._open

    def open_step(self) -> None:
        """The step's work begins, its data is there; where a check was requested, it watches from here."""
        if self.watch_is_due:
            self._guard.run(self._open_watch)

    def _open_watch(self) -> None:
        self._watch = self._watch or make_watch(self.training.module, self._next.watch or {})
        if self._watch is not None:
            self._open = True
            self._watch.__enter__()

    def _close_watch(self) -> tuple[Any, ...] | None:
        """The checks of this step; None where it was not watched."""
        if not self._open:
            self._watch = None
            return None
        self._open = False
        self._watch.__exit__(None, None, None)
        return tuple(self._watch.checks)

    def break_off(self) -> None:
        """The step under way will not be ended. No hook of a check stays on the model."""
        if self._open:
            error = NotFollowedError("the step was broken off")
            watch, self._watch, self._open = self._watch, None, False
            self._guard.run(watch.__exit__, NotFollowedError, error, None)

    def restart(self) -> None:
        """The time until now belongs to no step: the clock of the next one starts."""
        self.break_off()
        self._start_step()

    def end_step(self) -> None:
        """The step is over; this may wait as long as the observer does."""
        if self.up:
            self._guard.run(self._end_step)
        else:
            self._start_step()

    def _end_step(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        ended_s, cpu_s = time.perf_counter(), time.process_time() - self._begun_cpu_s
        checks = self._close_watch()
        self._batches += self._loaders.end_step()
        self._number += 1
        losses = self._scaled or self._roots
        loss = sum(map(float, losses)) if losses else None  # read now: a script may add to the tensor later
        dtype = losses[-1].dtype if losses else None
        wall_s = ended_s - self._begun_s
        self._noted.append((self._number, wall_s, cpu_s, self._borders, self._batches, loss, dtype, self._norm, checks))
        if checks is not None or ended_s - self._reported_s >= self._next.flush_interval_s:
            self._report()
        self._start_step()

    def _report(self) -> None:
        noted, self._noted = self._noted, []
        for one in noted:
            self._next = self.observer.step(read_step(*one))
        self._reported_s = time.perf_counter()

    def _start_step(self) -> None:
        self._batches: list[Copied] = []
        self._roots: list[torch.Tensor] = []
        """Losses that the backward passes of this step began with."""
        self._scaled: list[torch.Tensor] = []
        """Losses that a scaler was given in this step."""
        self._norm = None
        self._begun_cpu_s = time.process_time()
        self._begun_s = time.perf_counter()
        self._borders: list[Border] = [(None, "begin", self._begun_s, self._stamp())]

    def phase(self, phase: Phase) -> None:
        """From here on the training does this; when it trains again, the clock of the next step starts."""
        if phase != self._phase and self.up:
            self._guard.run(self._enter, phase)

    def _enter(self, phase: Phase) -> None:
        self._report()
        self._phase = phase
        self.observer.phase(phase)
        if phase == "train":
            self._start_step()

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """The training has ended, as its source has `seen`, or its process has; later calls do nothing."""
        if not self.ended:
            self.remove_hooks()
            self.ended = True
            self._guard.run(self._end, error, seen)

    def _end(self, error: BaseException | None, seen: bool) -> None:
        self._report()
        self.observer.end(error, seen=seen)

    def _failed(self, error: Exception) -> None:
        """The meter has failed: the observer learns that it saw no whole training, and the training continues."""
        with contextlib.suppress(Exception):
            self._close_watch()
        with contextlib.suppress(Exception):  # it may be what has failed
            self._report()
        steps = format_count(self._number, "step")
        failure = NotFollowedError(f"the meter failed after {steps}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.observer.end(failure)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _update_hook(call: Callable[[], None]) -> Callable[..., None]:
    """A hook of torch's for all optimizers; in an update that is compiled it is nothing."""
    disabled, compiling = uncompiled(call), torch.compiler.is_compiling

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not compiling():
            (disabled if compiles_here() else call)()

    return hook


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def make_watch(model: Any, requirements: Mapping[str, Any]) -> Any:
    """A watch of kernels_check; None where there is no model.

    Paths about several ranks are left out, so that one that is required is not met: for them all ranks would have to
    watch the same step, and the ranks of a script end their warm-up by themselves.
    """
    from kernels_check import watch

    if not isinstance(model, torch.nn.Module):
        return None
    return watch(model, {path: value for path, value in requirements.items() if not path.startswith("ranks.")})


def read_step(
    number: int,
    wall_s: float,
    cpu_s: float,
    borders: Sequence[Border],
    batches: Sequence[Copied],
    loss: float | None,
    loss_dtype: torch.dtype | None,
    gradient_norm: torch.Tensor | None,
    checks: tuple[Any, ...] | None,
) -> StepReading:
    """What a step showed. Waits for the device."""
    parts = sum_parts(borders)
    return StepReading(
        number=number,
        step_time_s=wall_s,
        cpu_time_s=cpu_s,
        data_time_s=parts.get("data"),
        forward_time_s=parts.get("forward"),
        backward_time_s=parts.get("backward"),
        optimizer_time_s=parts.get("optimizer"),
        loss=loss,
        loss_dtype=None if loss_dtype is None else str(loss_dtype).removeprefix("torch."),
        gradient_norm=None if gradient_norm is None else float(gradient_norm),
        checks=checks,
        **total_tokens(batches)._asdict(),
    )


def sum_parts(borders: Iterable[Border]) -> dict[Part | None, float]:
    """Seconds of each part that was seen, and of the rest of the step (None). The time of a part inside another is not
    counted for the outer one. The device must have ended its work."""
    found: dict[Part | None, float] = {}
    under_way: list[Part | None] = []
    """The innermost last."""
    since_s = 0.0
    since_event: Any = None
    for part, kind, at_s, event in borders:
        if under_way:
            current = "forward" if kind == "backward" else under_way[-1]
            on_host = current == "data" or event is None or since_event is None
            spent = at_s - since_s if on_host else since_event.elapsed_time(event) / 1e3
            found[current] = found.get(current, 0.0) + spent
        if kind != "end":
            under_way.append(part)
        elif part in under_way:
            while under_way.pop() != part:
                pass
        since_s, since_event = at_s, event
    return found
