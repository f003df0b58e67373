"""Whoever looks on while a step runs: all hooks that are no instrument's, and what they have noted.

Two kinds of steps are looked at: one that the check calls, several times, and puts back (see ``observe``), and one that
takes place by itself (see ``natural``). What is hooked and how it is read is the same for both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.observe import compilations
from kernels_check.observe.adapter_calls import AdapterCalls
from kernels_check.observe.adapter_updates import Updates
from kernels_check.observe.calls import CallRecorder, Calls
from kernels_check.observe.digest import Digest
from kernels_check.observe.dispatch_recorder import unseen
from kernels_check.observe.events import StepProfile
from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.gradients import Gradients
from kernels_check.observe.inputs import InputLog
from kernels_check.observe.module_tree import ModelTree, every_parameter, named_modules
from kernels_check.observe.observation import Observation
from kernels_check.observe.optimizers import class_names
from kernels_check.observe.safe_hooks import Shielding, unshielded
from kernels_check.observe.updates import GroupSeen, groups_of, with_gradient


@dataclass(slots=True)
class StepObserver:
    """Looks on over some calls of a step of one model."""

    model: nn.Module
    before_first_update: Callable[[Any], None] = field(default=lambda optimizer: None)
    """Told of each optimizer right before it steps."""
    shield: Shielding = unshielded
    """What hooks are wrapped in."""
    gradients: Gradients = field(init=False)
    updates: Updates = field(init=False)
    adapter: AdapterCalls = field(init=False)
    others: list[str] = field(default_factory=list)
    """Classes of the optimizers that stepped and hold no parameter of the model."""
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
    inputs: InputLog = field(init=False)
    begun: int = 0
    """Calls so far."""

    def __post_init__(self) -> None:
        self.gradients = Gradients(self.model, self.shield)
        self.updates = Updates(self.gradients)
        self.adapter = AdapterCalls(self.model, self.shield)
        self.inputs = InputLog(self.shield)

    @contextmanager
    def told_of_updates(self, tree: ModelTree) -> Iterator[None]:
        """Hook parameters and optimizers; all hooks are off afterwards.

        Args:
            tree: of the model as it is.
        """
        with ExitStack() as hooks:
            with gc_paused():
                hooks.enter_context(self.gradients.watched(tree))
            hooks.push(register_optimizer_step_pre_hook(self.shield(self._before_update)))
            hooks.push(register_optimizer_step_post_hook(self.shield(self._after_update)))
            yield

    @contextmanager
    def hooked(self, *, marked: bool = False, tree: ModelTree | None = None) -> Iterator[CallRecorder]:
        """Hook every module for one call; takes every hook off, also if setting one or taking one off fails.

        Args:
            marked: whether a profiler's records name the calls, too.
            tree: of the model as it is, where that was read already.
        """
        recorder = CallRecorder(self.model, marked=marked, shield=self.shield)
        with ExitStack() as hooks:
            with gc_paused():
                hooks.enter_context(recorder.hooked())
                self.inputs.attach(self.model, hooks, recorder.current)
                hooks.enter_context(self.adapter.watched(tree, recorder))
            yield recorder
        self.calls = recorder.calls()
        self.adapter.drop(self.calls.failed)
        self.inputs.drop(self.calls.failed)
        self.keep()

    def begin_call(self) -> None:
        """A call of the step begins, in this thread."""
        self.begun += 1
        self.thread = threading.get_ident()
        self.steps_elsewhere = 0
        self.stepped.clear()
        self.modes_noted = False
        self.gradients.begin_call()
        self.updates.begin_call()

    def end_call(self) -> None:
        """It has ended."""
        self.gradients.end_call()
        self.updates.end_call()
        self.note_modes()

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
        self.others.clear()
        for watch in (self.gradients, self.updates, self.adapter):
            watch.forget()

    def observation(
        self,
        profile: StepProfile,
        *,
        before: Digest,
        after: Digest,
        left: ModelTree,
        reached: Set[str],
        changed: frozenset[str],
        drew_random: bool,
        undone: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Observation:
        """All that was seen, for the judges; see ``Observation`` for what is given."""
        return Observation(
            model=self.model,
            left=left,
            before=before,
            after=after,
            profile=profile,
            calls=self.begun,
            optimizer_steps=self.updates.steps,
            optimizers=tuple(self.updates.optimizers.values()),
            gradients=self.gradients.seen(),
            changed=changed,
            modules=self.calls,
            modes=self.calls.training() or self.modes,
            drew_random=drew_random,
            model_calls=tuple(self.inputs.calls),
            reached=frozenset(reached),
            updates=self.updates.parameters,
            adapter_calls=self.adapter.layers,
            compilations=compilations.read(),
            updated=self.updated,
            other_optimizers=tuple(dict.fromkeys(self.others)),
            undone=undone,
        )

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Global optimizer hook."""
        with unseen():
            self.before_first_update(optimizer)
            if not self._is_of_the_model(optimizer):
                return None
            self.note_modes()
            self.given[id(optimizer)] = with_gradient(optimizer)
            if self.inputs.backwards is not None:
                self.inputs.backwards.update_begins(optimizer)
            return self.updates.before(optimizer, args, kwargs)

    def _after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook."""
        with unseen():
            if not self._is_of_the_model(optimizer):
                self.others.append(class_names(optimizer)[0])
                return
            self.updates.after(optimizer, args, kwargs)
            if self.inputs.backwards is not None:
                self.inputs.backwards.update_ends(optimizer)
        self.stepped += groups_of(optimizer, self.given.pop(id(optimizer), ()))
        self.steps_elsewhere += threading.get_ident() != self.thread

    def _is_of_the_model(self, optimizer: Any) -> bool:
        """Whether it holds a parameter of the model; torch calls the hooks for those of any other model, too."""
        own = set(map(id, every_parameter(self.model)))
        return any(id(value) in own for group in optimizer.param_groups for value in group["params"])
