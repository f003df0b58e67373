"""Turns the events of a training into readings of steps and reports them to the observer.

The source of the training (a Trainer callback, an optimizer) calls a method for each event: a batch was loaded, a part
begins, the step has ended. A step is timed from the observer's return to the step's end on the device, with one
synchronisation. Step times exclude the observer's work, evaluation and saving.

Between two steps a line of Python takes ten times as long as in a loop, since its code is not in the CPU's caches. So
the end of a step only copies batches, reads the loss and stores the values, with few calls. Everything else is computed
when the steps are reported to the observer, every second or at the next other event.

Nothing is attached to the model, the optimizer, the data loader or the Trainer, so they can still be pickled, scripted
and freed. Instead, functions of torch and transformers are replaced for the whole process while a training is measured.
torch.compile traces the unchanged training: in a replaced function it finds only the original call, and the meter's
code around that call is never compiled. Backward passes are observed in `torch.autograd.backward`, which
`Tensor.backward` calls. The forward pass before it began at the start of the step, or at the end of the preceding data
wait, backward pass or update. The gradient norm is the result of `torch.nn.utils.clip_grad_norm_` or of accelerate's
function of this name, which the Trainer calls, and the loss under a gradient scaler is the argument of its `scale`.

On a CPU the time of a part is read from the host's clock. On a GPU the host runs ahead of the device, and synchronising
at each border would change the step, so CUDA events mark the borders and are read after the step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lorameter.attach.batches import BatchParts, Loaders, copy_batch, total_tokens
from lorameter.attach.observer import (
    ErrorGuard,
    NotMeasuredError,
    ObserverReply,
    Phase,
    StepReading,
    TrainingInfo,
    TrainingObserver,
    UnendedError,
)
from lorameter.records.units import format_count

Part = Literal["data", "forward", "backward", "optimizer"]
BorderKind = Literal["begin", "end", "backward"]
"""A part begins or ends, or a backward pass begins, and the time since the previous border was a forward pass."""
Border = tuple[Part | None, BorderKind, float, Any]
"""The part (None: the step itself), the kind, the host's clock, and on a GPU an event."""


Before = Callable[[tuple[Any, ...]], None]
"""Called before a call, with its positional arguments."""
After = Callable[[tuple[Any, ...], Any, BaseException | None], None]
"""Called after a call, with its positional arguments and its result or exception."""


FETCH = "get_batch_samples"
"""The Trainer method that fetches the batches of a step, before the Trainer reports the start of the step. Without it
(before transformers 4.46), the wait for data and the tokens are unknown."""


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a function and all that it calls from torch.compile. Importing an optimizer has already loaded Dynamo."""
    wrapped: Callable[..., Any] = torch.compiler.disable(lambda *args: call(*args))
    return wrapped


def compiles_here() -> bool:
    """Whether the caller runs in a function given to torch.compile, outside of its graphs."""
    return callable(get_eval_frame_callback())


def patch(holder: Any, name: str, *, before: Before | None = None, after: After | None = None) -> Callable[[], None]:
    """Replace a function of a module or class so that it calls these two before and after.

    Returns:
        A function that restores the original. If other code has replaced the function since, the replacement stays and
        only calls the original.
    """
    original, compiling = vars(holder)[name], torch.compiler.is_dynamo_compiling
    plain = before, after
    # A disabled function takes several times as long to call.
    disabled = before and uncompiled(before), after and uncompiled(after)
    active = [True]

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not active:  # Dynamo takes the first for true, and traces nothing else
            return original(*args, **kwargs)
        call_before, call_after = disabled if callable(get_eval_frame_callback()) else plain
        if call_before is not None:
            call_before(args)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            if call_after is not None:
                call_after(args, None, error)
            raise
        if call_after is not None:
            call_after(args, result, None)
        return result

    def restore() -> None:
        active.clear()
        if vars(holder).get(name) is replacement:
            setattr(holder, name, original)

    setattr(holder, name, replacement)
    return restore


class Steps:
    """Reports one training to one observer. Every call is guarded: an error of the meter never reaches the training."""

    def __init__(self, observer: TrainingObserver, training: TrainingInfo) -> None:
        self.observer = observer
        self.training = training
        self._cuda = training.device if training.device.startswith("cuda") else None
        self._guard = ErrorGuard(self._report_failure)
        self._number = 0
        self._next = ObserverReply()
        self._unreported: list[Callable[[], StepReading]] = []
        self._reported_s = -math.inf
        self._phase: Phase = "train"
        self._watch: Any = None
        """The watch of the current step; consecutive steps share it."""
        self._open = False
        self.ended = False
        self.is_observing = True
        """Whether events belong to a step, unlike between two epochs of a loop."""
        self._passes = 0
        """Depth of nested backward passes; checkpointing starts one inside another."""
        self._loaders = Loaders() if training.source == "optimizer" else None
        self._hooks = contextlib.ExitStack()
        """Removes all hooks and restores all replaced functions."""
        self._norm: torch.Tensor | None = None
        """Norm of the gradients of the current update; later steps do not change it."""
        self._start_step()

    @property
    def is_measuring(self) -> bool:
        """Whether the training is being measured: it has not ended, and the meter has not failed."""
        return self._guard.is_working and not self.ended

    def begin(self) -> None:
        """Begin to measure, before the first step."""
        self._guard.run(self._begin)

    def _begin(self) -> None:
        self._next = self.observer.begin(self.training)
        self.add_hooks()
        self._start_step()

    def add_hooks(self) -> None:
        """Observe the parts of each step from now on."""
        hooks = self._hooks
        hooks.callback(patch(torch.autograd, "backward", before=self._begin_backward, after=self._end_backward))
        hooks.callback(patch(torch.nn.utils, "clip_grad_norm_", after=self._store_norm))
        if accelerate := sys.modules.get("accelerate"):
            hooks.callback(patch(accelerate.Accelerator, "clip_grad_norm_", after=self._store_norm))
        hooks.callback(patch(torch.amp.GradScaler, "scale", after=self._store_loss))
        hooks.callback(register_optimizer_step_pre_hook(self._make_update_hook("begin")).remove)
        hooks.callback(register_optimizer_step_post_hook(self._make_update_hook("end")).remove)
        if self.training.source == "optimizer":
            hooks.callback(patch(_BaseDataLoaderIter, "__next__", before=self._begin_load, after=self._end_load))
        if self.training.source == "trainer":
            from transformers import Trainer

            if FETCH in vars(Trainer):
                hooks.callback(patch(Trainer, FETCH, before=self._begin_fetch, after=self._end_fetch))

    def remove_hooks(self) -> None:
        """Remove all hooks and restore all replaced functions."""
        self._hooks.close()
        self.abandon_step()

    def batch(self, batch: Any) -> None:
        """Store the batch of the step, before it is moved or changed."""
        if self._active:
            self._batches.append(self._guard.run(copy_batch, batch) or BatchParts())

    def mark(self, part: Part, kind: BorderKind) -> None:
        """Mark that a part of the step begins or ends. With a part, all parts inside it end; the end of a part that did
        not begin is ignored."""
        if self._active:
            self._borders.append((part, kind, time.perf_counter(), self._cuda and self._stamp()))

    def _make_update_hook(self, kind: BorderKind) -> Callable[..., None]:
        """A hook on all optimizers; it does nothing inside a compiled update."""
        mark: Callable[[], None] = functools.partial(self.mark, "optimizer", kind)
        disabled, compiling = uncompiled(mark), torch.compiler.is_dynamo_compiling

        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not compiling():
                (disabled if callable(get_eval_frame_callback()) else mark)()

        return hook

    @property
    def _active(self) -> bool:
        return self.is_observing and self._guard.is_working and not self.ended

    def _begin_backward(self, args: tuple[Any, ...]) -> None:
        self._passes += 1
        if self._passes == 1 and self._active:
            if args and _is_scalar(args[0]):
                self._roots.append(args[0].detach())
            if self._loaders is not None:
                self._batches += self._loaders.take()
            self.mark("backward", "backward")

    def _end_backward(self, args: tuple[Any, ...], result: Any, error: BaseException | None) -> None:
        self._passes -= 1
        if self._passes == 0:
            self.mark("backward", "end")

    def _store_norm(self, args: tuple[Any, ...], norm: Any, error: BaseException | None) -> None:
        """A norm that is sharded over ranks is not read: that would synchronise the ranks."""
        if type(norm) is torch.Tensor and self._active:
            self._norm = norm.detach()

    def _store_loss(self, args: tuple[Any, ...], scaled: Any, error: BaseException | None) -> None:
        if self._active and _is_scalar(args[1]):
            self._scaled.append(args[1].detach())

    def _begin_load(self, args: tuple[Any, ...]) -> None:
        self.mark("data", "begin")

    def _end_load(self, args: tuple[Any, ...], batch: Any, error: BaseException | None) -> None:
        self.mark("data", "end")
        # A batch loaded without gradients is of an evaluation.
        if self._loaders is not None and self._active and torch.is_grad_enabled():
            if error is None:
                self._loaders.put(args[0], self._guard.run(copy_batch, batch) or BatchParts())
            else:
                self._loaders.end(args[0])

    def _begin_fetch(self, args: tuple[Any, ...]) -> None:
        self.phase("train")
        self.mark("data", "begin")

    def _end_fetch(self, args: tuple[Any, ...], fetched: Any, error: BaseException | None) -> None:
        self.mark("data", "end")
        for batch in fetched[0] if isinstance(fetched, tuple) and isinstance(fetched[0], list) else ():
            self.batch(batch)

    def _stamp(self) -> Any:
        """A CUDA event recorded now."""
        return self._guard.run(_record_event)

    @property
    def watch_is_due(self) -> bool:
        """Whether a requested check has not begun yet."""
        return self._next.watch is not None and self.is_measuring and not self._open

    def open_step(self) -> None:
        """Begin the work of a step, after its data is loaded; a requested check watches from here."""
        if self.watch_is_due:
            self._guard.run(self._open_watch)

    def _open_watch(self) -> None:
        self._watch = self._watch or make_watch(self.training.module, self._next.watch or {})
        if self._watch is not None:
            self._open = True
            self._watch.__enter__()

    def _close_watch(self) -> tuple[Any, ...] | None:
        """The checks of this step; None if it was not watched."""
        if not self._open:
            self._watch = None
            return None
        self._open = False
        self._watch.__exit__(None, None, None)
        return tuple(self._watch.checks)

    def abandon_step(self) -> None:
        """Abandon the current step, and remove the hooks of its check from the model."""
        if self._open:
            error = NotMeasuredError("the step was abandoned")
            watch, self._watch, self._open = self._watch, None, False
            self._guard.run(watch.__exit__, NotMeasuredError, error, None)

    def restart(self) -> None:
        """Exclude the time until now from all steps: the clock of the next step starts now."""
        self.abandon_step()
        self._start_step()

    def end_step(self) -> None:
        """End the step; this waits until the observer returns."""
        if self.is_measuring:
            self._guard.run(self._end_step)

    def _end_step(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        ended_s, cpu_s = time.perf_counter(), time.process_time() - self._begun_cpu_s
        checks = self._close_watch()
        if self._loaders is not None:
            self._batches += self._loaders.end_step()
        self._number += 1
        losses = self._scaled or self._roots
        loss = sum(map(float, losses)) if losses else None  # read now: a script may modify the tensor later
        dtype = losses[-1].dtype if losses else None
        self._unreported.append(
            functools.partial(
                read_step,
                number=self._number,
                wall_s=ended_s - self._begun_s,
                cpu_s=cpu_s,
                borders=self._borders,
                batches=self._batches,
                loss=loss,
                loss_dtype=dtype,
                gradient_norm=self._norm,
                checks=checks,
            )
        )
        if checks is not None or ended_s - self._reported_s >= self._next.flush_interval_s:
            self._report()
        self._start_step()

    def _report(self) -> None:
        unreported, self._unreported = self._unreported, []
        for read in unreported:
            self._next = self.observer.step(read())
        self._reported_s = time.perf_counter()

    def _start_step(self) -> None:
        self._batches: list[BatchParts] = []
        self._roots: list[torch.Tensor] = []
        """Losses from which the backward passes of this step started."""
        self._scaled: list[torch.Tensor] = []
        """Losses passed to a gradient scaler in this step."""
        self._norm = None
        self._begun_cpu_s = time.process_time()
        self._begun_s = time.perf_counter()
        self._borders: list[Border] = [(None, "begin", self._begun_s, self._cuda and self._stamp())]

    def phase(self, phase: Phase) -> None:
        """Enter a phase of the training; when it trains again, the clock of the next step starts."""
        if phase != self._phase and self.is_measuring:
            self._guard.run(self._enter, phase)

    def _enter(self, phase: Phase) -> None:
        self._report()
        self._phase = phase
        self.observer.phase(phase)
        if phase == "train":
            self._start_step()

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """End the measurement because the source has `seen` the end of the training, or because its process ends."""
        if not self.ended:
            self.remove_hooks()
            self.ended = True
            if error is None and not seen and self.training.source == "trainer":  # a loop may have reached its own end
                error = UnendedError("the Trainer did not reach the end of its training")
            self._guard.run(self._end, error, seen)

    def _end(self, error: BaseException | None, seen: bool) -> None:
        self._report()
        self.observer.end(error, seen=seen)

    def _report_failure(self, error: Exception) -> None:
        """Report to the observer that the meter failed before the training ended; the training continues."""
        with contextlib.suppress(Exception):
            self._close_watch()
        with contextlib.suppress(Exception):  # the observer itself may have failed
            self._report()
        steps = format_count(self._number, "step")
        failure = NotMeasuredError(f"the meter failed after {steps}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.observer.end(failure)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def make_watch(model: Any, requirements: Mapping[str, Any]) -> Any:
    """A watch of kernels_check; None if there is no model.

    Paths about several ranks are left out, and count as not met if they are required: all ranks would have to watch the
    same step, and the ranks of a script end their warm-up independently.
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
    batches: Sequence[BatchParts],
    loss: float | None,
    loss_dtype: torch.dtype | None,
    gradient_norm: torch.Tensor | None,
    checks: tuple[Any, ...] | None,
) -> StepReading:
    """The reading of a step. Waits for the device."""
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
    """Seconds of each observed part, and of the rest of the step (None). The time of a nested part does not count for
    the outer part. The device must have finished the step."""
    found: dict[Part | None, float] = {}
    under_way: list[Part | None] = []
    """Innermost part last."""
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
