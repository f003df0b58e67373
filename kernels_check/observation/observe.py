"""Run the step a few times and write down what happened.

With the profiler as instrument:

1. A bare call, with nothing attached to the model: it triggers compilation, kernel autotuning and lazy initialisation
   as training would, and moves lora_B off zero (before that the gradient of lora_A is exactly zero).
2. A call under the profiler, with hooks that note the call of every module (see ``calls``). Hooks come after the first
   call, and no compilation is started beside them, so that they are never traced into compiled code, which would keep
   them for good. A step that compiles anew in each call is profiled once more without them. Where the step runs a
   profiler of its own, which would end this one, the spy watches in its place.
3. Further calls, bare and at most ``MOST_CALLS`` in all, only while another may show what these did not: an update (a
   gradient scaler skips steps that overflow, accumulation steps in every second call), one with a learning rate above
   zero (a warm-up may begin at zero), or one of a factor that had no gradient while its partner was zero.

With the spy as instrument hooks and dispatch mode watch the first call, and no compilation is started in it. The second
is bare, for what becomes of the first update, but where the first

- entered compiled code: nothing but a bare call then shows what training shows, and the first counts for nothing;
  the names of what it enters are recorded on the host, which touches no code;
- updated nothing (the second is watched in its place).

Further calls follow as with the profiler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.check import Instrument
from kernels_check.observation import compilations
from kernels_check.observation.adapter_calls import AdapterCalls
from kernels_check.observation.adapter_updates import Updates
from kernels_check.observation.calls import CallRecorder, Calls
from kernels_check.observation.digest import digest
from kernels_check.observation.garbage import uncollected
from kernels_check.observation.gradients import Gradients
from kernels_check.observation.inputs import InputLog
from kernels_check.observation.instruments import watch_by_profile, watch_by_spy
from kernels_check.observation.module_tree import ModelTree, named_modules
from kernels_check.observation.observation import Observation
from kernels_check.observation.snapshot import Snapshot
from kernels_check.observation.spy import unseen
from kernels_check.observation.updates import GroupSeen, groups_of, with_gradient

MOST_CALLS = 8
"""Of which a run whose optimizer steps in each call takes two."""


@dataclass(slots=True)
class _Watcher:
    model: nn.Module
    snapshot: Snapshot
    gradients: Gradients
    updates: Updates
    adapter: AdapterCalls
    steps_elsewhere: int = 0
    stepped: list[GroupSeen] = field(default_factory=list)
    updated: tuple[GroupSeen, ...] = ()
    """Those of the watched call."""
    given: dict[int, frozenset[int]] = field(default_factory=dict)
    """Parameters with a gradient before a step that has not ended, by its optimizer."""
    thread: int = 0
    calls: Calls = field(default_factory=Calls)
    modes: dict[str, bool] = field(default_factory=dict)
    """Where no hook notes them."""
    modes_noted: bool = False
    inputs: InputLog = field(default_factory=InputLog)

    def before_update(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Global optimizer hook."""
        with unseen():
            self.snapshot.watch(optimizer)
            self.note_modes()
            self.given[id(optimizer)] = with_gradient(optimizer)
            return self.updates.before(optimizer, args, kwargs)

    def after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook."""
        with unseen():
            self.updates.after(optimizer, args, kwargs)
        self.stepped += groups_of(optimizer, self.given.pop(id(optimizer), ()))
        self.steps_elsewhere += threading.get_ident() != self.thread

    def begin(self) -> None:
        """A call of the step begins."""
        self.thread = threading.get_ident()
        self.steps_elsewhere = 0
        self.stepped.clear()
        self.modes_noted = False

    def keep(self) -> None:
        """Take the last call for the watched one."""
        self.updated = tuple(self.stepped)

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.updates.steps

    def drop_calls(self) -> None:
        """What the hooks have noted is not what the call that counts shows."""
        self.calls = Calls()
        self.adapter.forget()

    def note_modes(self) -> None:
        """Record the train/eval modes once a call."""
        if not self.modes_noted:
            self.modes_noted = True
            self.modes = {name: module.training for name, module in named_modules(self.model)}

    def forget(self) -> None:
        """Drop everything but the copies of what the optimizers held at first."""
        self.calls = Calls()
        self.modes.clear()
        for watch in (self.gradients, self.updates, self.adapter):
            watch.forget()


def observe(
    model: nn.Module, step: Callable[[], object], snapshot: Snapshot, instrument: Instrument = "profile"
) -> Observation:
    """Call ``step`` a few times; the caller restores ``snapshot`` afterwards."""
    with uncollected():
        found = ModelTree.of(model)  # what a step makes of it is read anew
        before = digest(found)
    gradients = Gradients(model)
    updates = Updates(gradients)
    watcher = _Watcher(model, snapshot, gradients, updates, AdapterCalls(model))
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        watcher.begin()
        gradients.begin_call()
        updates.begin_call()
        step()
        gradients.end_call()
        updates.end_call()
        watcher.note_modes()

    @contextmanager
    def hooked(*, marked: bool = False) -> Iterator[CallRecorder]:
        recorder = CallRecorder(model, marked=marked)
        with ExitStack() as hooks:  # takes every hook off, also if setting one or taking one off fails
            with uncollected():
                hooks.enter_context(recorder.hooked())
                watcher.inputs.attach(model, hooks)
                hooks.enter_context(watcher.adapter.watched(None if calls else found))
            yield recorder
        watcher.calls = recorder.calls()
        watcher.keep()

    with ExitStack() as hooks:
        with uncollected():
            updates.begin(found)
            hooks.enter_context(gradients.watched(found))
        hooks.push(register_optimizer_step_pre_hook(watcher.before_update))
        hooks.push(register_optimizer_step_post_hook(watcher.after_update))
        if instrument == "spy":
            profile = watch_by_spy(call, hooked, watcher)
        else:
            call()
            profile = watch_by_profile(call, hooked, watcher)
        reached = gradients.reached()
        while calls < MOST_CALLS and updates.pending():
            call()
    with uncollected():
        left = ModelTree.of(model)
        after = digest(left, before)
    return Observation(
        model=model,
        left=left,
        before=before,
        after=after,
        profile=profile,
        calls=calls,
        optimizer_steps=updates.steps,
        optimizers=tuple(updates.optimizers.values()),
        gradients=gradients.seen(),
        changed=snapshot.changed(),
        modules=watcher.calls,
        modes=watcher.calls.training() or watcher.modes,
        drew_random=snapshot.random.advanced(),
        model_calls=tuple(watcher.inputs.calls),
        reached=reached,
        updates=updates.parameters,
        adapter_calls=watcher.adapter.layers,
        compilations=compilations.read(),
        updated=watcher.updated,
    )
