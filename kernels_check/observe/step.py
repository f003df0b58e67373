"""Observes steps of one model as they take place, and leaves nothing behind.

Every hook is guarded, nothing is compiled differently, and whatever was put in place is taken out again, in whichever
order blocks end. Where code is compiled during a step, the hooks on modules are removed at once, since the compiled
code would keep them; what they had recorded is half a step then, and not used.

Steps may be observed one after the other. What takes several of them, such as whether an update is kept until the
next, is judged over all of them, unless something has changed the adapter in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels_check.observe.calls import CallRecorder, Calls
from kernels_check.observe.compile import read_compilations
from kernels_check.observe.digest import digest
from kernels_check.observe.hooks import HookGuard, RandomState
from kernels_check.observe.inputs import InputLog
from kernels_check.observe.learning import Gradients, Updates
from kernels_check.observe.modules import Fingerprinter, ModelTree, every_parameter, named_modules, plain_parts
from kernels_check.observe.observation import Observation
from kernels_check.observe.optimizer import GroupSeen, class_names, groups_of, with_gradient
from kernels_check.observe.profile import AROUND, INSIDE, ProfilerRecording, StepProfile, is_recording, not_recorded
from kernels_check.observe.targets import AdapterCalls

MOST_CALLS = 8
"""Steps after which no other is waited for; a run whose optimizer steps in each takes two."""


class StepObserver:
    """Observes the steps of one model, each between ``begin`` and ``end``.

    Args:
        model: that the steps train; held weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model, lambda _: self.forget())
        self._series: _Series | None = None
        self._recording: ProfilerRecording | None = None
        self._calls: CallRecorder | None = None
        self._random: RandomState | None = None
        self._open = ExitStack()
        self._hooks = ExitStack()
        self.compiled = False
        """Whether code was compiled in the last step, so that its modules were not observed to the end."""

    @property
    def fault(self) -> str | None:
        """The exception of a hook, after which nothing of the step is known."""
        return None if self._series is None else self._series.guard.fault

    @property
    def undecided(self) -> bool:
        """Whether a further step may show what these did not."""
        series = self._series
        return series is not None and series.begun < MOST_CALLS and series.updates.pending()

    def begin(self) -> None:
        """Observe from here.

        Raises:
            Exception: something of the model cannot be hooked or read; nothing is left in place then.
        """
        model = self._model
        with ExitStack() as stack:
            tree = ModelTree.of(model)
            series = self._continued(tree)
            self.compiled = False
            stack.enter_context(series.update_hooks(tree))
            recording = None if is_recording() else ProfilerRecording()
            hooks = stack.enter_context(ExitStack())
            self._calls = hooks.enter_context(series.module_hooks(model, tree, marked=recording is not None))
            stack.enter_context(self._compile_callback(series.guard))
            self._recording, self._hooks = recording, hooks
            series.begin_step(model)
            self._random = RandomState()
            if recording is not None:
                stack.enter_context(recording.opened())
            self._open = stack.pop_all()

    @contextmanager
    def updates_only(self) -> Iterator[None]:
        """Observe what the updates of a step do, and nothing else.

        Raises:
            Exception: something of the model cannot be hooked or read; nothing is left in place then. What fails once
                the step has begun raises nothing, and the next step is the first then.
        """
        model = self._model
        with ExitStack() as hooks:
            tree = ModelTree.of(model)
            series = self._continued(tree)
            hooks.enter_context(series.update_hooks(tree))
            series.begin_step(model)
            try:
                yield
            except BaseException:
                self.forget()
                raise
        try:
            series.end_step(model)
        except Exception:
            self.forget()

    def end(self) -> Observation:
        """Remove everything and return what was observed.

        Raises:
            Exception: it cannot be read; everything is removed all the same.
        """
        random, series, recording, model = self._random, self._series, self._recording, self._model
        self._open.close()
        if random is None or series is None:
            raise RuntimeError("no step has begun")
        drew_random = random.advanced()
        reached = series.gradients.reached()
        series.end_step(model)
        profile = not_recorded(AROUND) if recording is None else _profile_of(recording)
        return series.observation(model, profile, reached=reached, drew_random=drew_random)

    def break_off(self) -> None:
        """Remove everything and forget all steps so far."""
        try:
            self._open.close()
        finally:
            self.forget()

    def forget(self) -> None:
        """Let the next step be the first."""
        self._series = None
        self.release()

    def release(self) -> None:
        """Keep nothing of the last step but what the next is compared with."""
        self._recording = self._calls = self._random = None
        if self._series is not None:
            self._series.inputs.clear()
            self._series.adapter.forget()

    @property
    def _model(self) -> nn.Module:
        model = self._reference()
        if model is None:
            raise RuntimeError("the model no longer exists")
        return model

    def _continued(self, tree: ModelTree) -> _Series:
        """The series that this step continues, or a new one where something else changed the adapter since."""
        series = self._series
        if series is None or series.guard.fault is not None or not series.updates.goes_on(tree):
            series = self._series = _Series(tree)
        return series

    @contextmanager
    def _compile_callback(self, guard: HookGuard) -> Iterator[None]:
        """Remove the hooks on modules where a compilation starts."""
        handler = import_module("torch._dynamo").callback_handler  # the optimizer's step loads it anyway
        started = guard(self._on_compile)
        handler.register_start_callback(started)
        try:
            yield
        finally:
            handler.remove_start_callback(started)

    def _on_compile(self, started: object) -> None:
        if not self.compiled:
            self.compiled = True
            if self._calls is not None:
                self._calls.break_off()
            self._hooks.close()


def _profile_of(recording: ProfilerRecording) -> StepProfile:
    return recording.profile() if recording.lasted else not_recorded(INSIDE)


class _Series:
    """What consecutive steps of one model have shown, and what the next is compared with.

    Args:
        tree: of the model before the first.
    """

    def __init__(self, tree: ModelTree) -> None:
        self.guard = HookGuard()
        self.gradients = Gradients(weakref.ref(tree.model), self.guard)
        self.updates = Updates(self.gradients)
        self.adapter = AdapterCalls(self.guard)
        self.inputs = InputLog(self.guard)
        self.begun = 0
        """Steps so far."""
        self._before = digest(tree)
        self._values = _fingerprints(tree)
        self._others: list[str] = []
        """Classes of the optimizers that stepped and hold no parameter of the model."""
        self._own: frozenset[int] = frozenset()
        self._stepped: list[GroupSeen] = []
        self._given: dict[int, frozenset[int]] = {}
        """Parameters with a gradient before an optimizer's step that has not ended, by the optimizer."""
        self._calls = Calls()
        self._modes: dict[str, bool] = {}
        """Where no hook records them."""
        self.updates.begin(tree)

    @contextmanager
    def update_hooks(self, tree: ModelTree) -> Iterator[None]:
        """Hook parameters and optimizers."""
        with ExitStack() as hooks:
            hooks.enter_context(self.gradients.watched(tree))
            hooks.push(register_optimizer_step_pre_hook(self.guard(self._before_update)))
            hooks.push(register_optimizer_step_post_hook(self.guard(self._after_update)))
            yield

    @contextmanager
    def module_hooks(self, model: nn.Module, tree: ModelTree, *, marked: bool) -> Iterator[CallRecorder]:
        """Hook every module; ``marked``: the profile names their calls, too."""
        recorder = CallRecorder(model, marked=marked, shield=self.guard)
        with ExitStack() as hooks:
            hooks.enter_context(recorder.hooked())
            self.inputs.attach(model, hooks, recorder.current)
            hooks.enter_context(self.adapter.watched(tree, recorder))
            yield recorder
        self._calls = recorder.calls()
        self.adapter.drop(self._calls.failed)
        self.inputs.drop(self._calls.failed)

    def begin_step(self, model: nn.Module) -> None:
        """A step begins."""
        self.begun += 1
        self._own = frozenset(map(id, every_parameter(model)))
        self._stepped, self._modes = [], {}
        self.gradients.begin_call()
        self.updates.begin_call()

    def end_step(self, model: nn.Module) -> None:
        """It has ended."""
        self.gradients.end_call()
        self.updates.end_call()
        self._modes = self._modes or _modes(model)

    def observation(
        self, model: nn.Module, profile: StepProfile, *, reached: frozenset[str], drew_random: bool
    ) -> Observation:
        """Everything that was observed, for the judges."""
        left = ModelTree.of(model)
        values = _fingerprints(left)
        return Observation(
            model=model,
            left=left,
            before=self._before,
            after=digest(left, self._before),
            profile=profile,
            calls=self.begun,
            optimizer_steps=self.updates.steps,
            optimizers=tuple(self.updates.optimizers.values()),
            gradients=self.gradients.seen(),
            changed=frozenset(name for name, value in self._values.items() if values.get(name) != value),
            modules=self._calls,
            modes=self._calls.training() or self._modes,
            drew_random=drew_random,
            model_calls=tuple(self.inputs.calls),
            reached=reached,
            updates=self.updates.parameters,
            adapter_calls=self.adapter.layers,
            compilations=read_compilations(),
            updated=tuple(self._stepped),
            other_optimizers=tuple(dict.fromkeys(self._others)),
        )

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Global optimizer hook."""
        if not self._is_own(optimizer):
            return None
        self._modes = self._modes or _modes(self.gradients.model)
        self._given[id(optimizer)] = with_gradient(optimizer)
        if self.inputs.backwards is not None:
            self.inputs.backwards.update_begins(optimizer)
        return self.updates.before(optimizer, args, kwargs)

    def _after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Global optimizer hook."""
        if not self._is_own(optimizer):
            self._others.append(class_names(optimizer)[0])
            return
        self.updates.after(optimizer, args, kwargs)
        if self.inputs.backwards is not None:
            self.inputs.backwards.update_ends(optimizer)
        self._stepped += groups_of(optimizer, self._given.pop(id(optimizer), ()))

    def _is_own(self, optimizer: Any) -> bool:
        """Whether it holds a parameter of the model; torch calls the hooks for those of other models, too."""
        own = self._own.union(map(id, every_parameter(self.gradients.model)))
        return any(id(value) in own for group in optimizer.param_groups for value in group["params"])


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in named_modules(model)}


def _fingerprints(tree: ModelTree) -> Mapping[str, str]:
    """Fingerprints of the parameters that train, as far as they can be read, by name."""
    take, found = Fingerprinter(), dict[str, str]()
    for name, parameter in tree.parameters:
        if parameter.requires_grad:
            with suppress(Exception):  # of an unknown kind: no change of it is seen
                found[name] = " ".join(take(part) for _, part in plain_parts(parameter.detach(), name))
    return found
