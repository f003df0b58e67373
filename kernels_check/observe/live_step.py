"""One step of a training as it takes place, which the check neither calls nor puts back.

So nothing may come of being looked at: every hook is shielded, no compilation is held back, nothing is copied but what
the updates of an adapter are told by, and whatever was put in place is taken out again, in whichever order blocks end.
Where code is compiled for the first time the hooks on modules go at once, since it would keep them for good; what they
had noted is half a step then, and worth nothing.

Steps may be watched one after the other. What takes several, such as whether an update is still there at the next, is
then told of all of them, unless something has changed the adapter in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module

from torch import nn

from kernels_check.check import Instrument
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.compilations import compiler_held
from kernels_check.observe.digest import Digest, digest
from kernels_check.observe.fingerprint import Fingerprinter
from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.live_instruments import Beside, choose
from kernels_check.observe.module_tree import ModelTree
from kernels_check.observe.observation import Observation
from kernels_check.observe.observe import MOST_CALLS
from kernels_check.observe.random_state import RandomState
from kernels_check.observe.restore import restored
from kernels_check.observe.safe_hooks import HookGuard
from kernels_check.observe.snapshot import RestoreError
from kernels_check.observe.step_observer import StepObserver
from kernels_check.observe.tensor_copy import plain_parts

COMPILED_MEANWHILE = "code was compiled in this step, and a hook beside it would stay in that code: watch a later step"


class LiveStepObserver:
    """Looks on at the steps of one model, each between ``begin`` and ``end``.

    Args:
        model: that the steps train.
        instrument: that looks on.
    """

    def __init__(self, model: nn.Module, instrument: Instrument) -> None:
        self._model, self._instrument = model, instrument
        self._watcher: StepObserver | None = None
        self._shield = HookGuard()
        self._before: Digest | None = None
        self._values: Mapping[str, str] = {}
        self._random: RandomState | None = None
        self._open = ExitStack()
        self._hooks = ExitStack()
        self._beside: Beside | None = None
        self._recorder: CallRecorder | None = None
        self.compiled = False
        """Whether code was compiled in the last step, so that its modules were not watched to the end."""
        self.unrestored: RestoreError | None = None
        """What a forward of the check's own has changed for good."""

    @property
    def fault(self) -> str | None:
        """What failed in a hook, so that nothing of the step is known."""
        return self._shield.fault

    @property
    def left(self) -> str | None:
        """What of the instrument is still in place after the last step, and until when."""
        return None if self._beside is None else self._beside.left

    @property
    def undecided(self) -> bool:
        """Whether a further step may show what these did not."""
        watcher = self._watcher
        return watcher is not None and watcher.begun < MOST_CALLS and watcher.updates.pending()

    def begin(self) -> None:
        """Look on from here.

        Raises:
            Exception: something of the model cannot be hooked or read; nothing is left in place then.
        """
        with ExitStack() as stack:
            with gc_paused():
                tree = ModelTree.of(self._model)
                watcher = self._go_on(tree)
            self.compiled = False
            stack.enter_context(watcher.told_of_updates(tree))
            hooks = stack.enter_context(ExitStack())
            beside = choose(self._instrument, tree)
            recorder = hooks.enter_context(watcher.hooked(marked=beside.marks, tree=tree))
            stack.enter_context(self._told_of_compilations())
            self._beside, self._recorder, self._hooks = beside, recorder, hooks
            watcher.begin_call()
            self._random = RandomState()
            stack.enter_context(beside.opened(recorder, self._shield))
            self._open = stack.pop_all()

    @contextmanager
    def glanced(self) -> Iterator[None]:
        """Look on at what the updates of a step do, and at nothing else.

        Raises:
            Exception: something of the model cannot be hooked or read; nothing is left in place then. What fails once
                the step has begun raises nothing, and the next step is the first then.
        """
        with ExitStack() as hooks:
            with gc_paused():
                tree = ModelTree.of(self._model)
                watcher = self._go_on(tree)
            hooks.enter_context(watcher.told_of_updates(tree))
            watcher.begin_call()
            try:
                yield
            except BaseException:
                self.forget()
                raise
        try:
            watcher.end_call()
        except Exception:
            self.forget()

    def end(self) -> Observation:
        """Take everything off and tell what was seen.

        Raises:
            Exception: it cannot be told; everything is off all the same.
        """
        random, watcher, beside, before = self._random, self._watcher, self._beside, self._before
        self._open.close()
        if random is None or watcher is None or beside is None or before is None:
            raise RuntimeError("no step has begun")
        drew_random = random.advanced()
        reached = watcher.gradients.reached()
        watcher.end_call()
        watcher.keep()
        with gc_paused():
            left = ModelTree.of(self._model)
            values = _values(left)
            return watcher.observation(
                beside.told(watcher),
                before=before,
                after=digest(left, before),
                left=left,
                reached=reached,
                changed=frozenset(name for name, value in self._values.items() if values.get(name) != value),
                drew_random=drew_random,
                undone=self._undone,
            )

    def break_off(self) -> None:
        """Take everything off and forget all steps so far."""
        try:
            self._open.close()
        finally:
            self.forget()

    def forget(self) -> None:
        """Let the next step be the first."""
        self._watcher = self._before = self._beside = self._recorder = None
        self._values = {}

    def release(self) -> None:
        """Hold on to nothing of the last step but what the next is compared with."""
        self._beside = self._recorder = self._random = None
        if self._watcher is not None:
            self._watcher.inputs.calls.clear()

    def _go_on(self, tree: ModelTree) -> StepObserver:
        """Who has watched the steps so far, or somebody new where this one does not follow them."""
        if self._watcher is None or self.fault is not None or not self._watcher.updates.goes_on(tree):
            self._shield = HookGuard()
            self._before = digest(tree)
            self._values = _values(tree)
            self._watcher = StepObserver(self._model, shield=self._shield)
            self._watcher.updates.begin(tree)
        return self._watcher

    @contextmanager
    def _told_of_compilations(self) -> Iterator[None]:
        """Take the hooks on modules off where a compilation starts."""
        handler = import_module("torch._dynamo").callback_handler  # the optimizer's step loads it anyway
        started = self._shield(self._compiling)
        handler.register_start_callback(started)
        try:
            yield
        finally:
            handler.remove_start_callback(started)

    def _compiling(self, started: object) -> None:
        if not self.compiled:
            self.compiled = True
            if self._recorder is not None:
                self._recorder.break_off()
            self._hooks.close()

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Forwards of the check's own, between two steps of a training, and all that they do put back.

        What is compiled runs eagerly in them: other shapes would have it compiled anew.
        """
        try:
            with restored(self._model), compiler_held("force_eager"):
                yield
        except RestoreError as error:
            self.unrestored = error
            raise


def _values(tree: ModelTree) -> dict[str, str]:
    """Fingerprints of the parameters that train, as far as they can be read, by name."""
    take, found = Fingerprinter(), dict[str, str]()
    for name, parameter in tree.parameters:
        if parameter.requires_grad:
            try:
                found[name] = " ".join(take(part) for _, part in plain_parts(parameter.detach(), name))
            except Exception:  # of a kind that nobody can read: no change of it is seen
                continue
    return found
