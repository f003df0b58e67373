"""The instruments at work: which calls of the step are watched by what, and what is left untold.

A profile sees everything that a step does, in all its threads. Two cannot run at once: where the program has one of its
own around ``verify`` or inside the step, that one is left undisturbed, and the spy watches in place of ours. What only
a profile could have told is then unknown. So is what runs in another thread than the step's, for the spy: a dispatch
mode is of one thread (those of the autograd engine take the caller's over).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from torch import nn

from kernels_check.check import Evidence
from kernels_check.observe.calls import CallRecorder, Calls
from kernels_check.observe.compilations import compiler_held
from kernels_check.observe.dispatch_recorder import DispatchRecorder, is_on_cuda, spied
from kernels_check.observe.events import CompilerSeen, StepProfile
from kernels_check.observe.recording import entries, is_recording, profiled

_IN_MODEL: tuple[Evidence, ...] = ("attention", "products", "product_paths")
_ELSEWHERE = "ran in a thread of its own, whose operators the spy does not see: take a profile"
AROUND = "a profiler of the program runs around this check, which another would end"
INSIDE = "the step runs a profiler of its own, which ends any other"


class CallWatcher(Protocol):
    """What is told of the step beside its operators."""

    model: nn.Module
    calls: Calls
    steps_elsewhere: int
    """Optimizer steps of the watched call in other threads."""

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""

    def forget(self) -> None:
        """Drop what the calls so far have shown."""

    def keep(self) -> None:
        """Take the last call for the watched one."""

    def drop_calls(self) -> None:
        """What the hooks have noted is not what the call that counts shows."""


class Hooked(Protocol):
    """Notes the calls of the model's modules while it lasts."""

    def __call__(self, *, marked: bool = False) -> AbstractContextManager[CallRecorder]:
        """Args: marked: whether the profiler's records name them, too."""


def watch_by_profile(call: Callable[[], None], hooked: Hooked, watcher: CallWatcher) -> StepProfile:
    """Call once under the profiler, or by the spy where a profiler of the program is in the way."""
    if is_recording():
        return _in_place_of_a_profile(call, hooked, watcher, AROUND)
    profile = _profiled(call, hooked)
    if lacks_kernels(profile, watcher.model):
        watcher.forget()
        profile = _profiled(call, hooked)
    if profile is None:
        return _in_place_of_a_profile(call, hooked, watcher, INSIDE)
    if profile.compiler.lookups <= profile.compiler.regions:
        return profile
    bare = profiled(call)  # some code was not at hand: either it is compiled in each call, or never
    if bare is None:
        return profile
    if bare.compiler.regions <= profile.compiler.regions:  # never, or what was not at hand is the hooks' own code
        return replace(profile, compiler=_counted(profile.compiler, bare.compiler))
    watcher.keep()
    watcher.drop_calls()
    return bare


def _profiled(call: Callable[[], None], hooked: Hooked) -> StepProfile | None:
    with compiler_held(), hooked(marked=True):
        return profiled(call)


def lacks_kernels(profile: StepProfile | None, model: nn.Module) -> bool:
    """Whether a profile of a model on a GPU holds nothing of the GPU: worth to be tried once more, since one that
    begins on the heels of another can come out so (a race in CUPTI)."""
    return profile is not None and is_on_cuda(model) and not (profile.kernels or profile.unclassified)


def watch_by_spy(call: Callable[[], None], hooked: Hooked, watcher: CallWatcher) -> StepProfile:
    """Call once or twice with a dispatch mode, see ``observe``."""
    spy = _spied(call, hooked)
    if spy.compiled_calls:
        watcher.forget()
        compiler, reason = _compiler_seen(call, hooked, watcher)
        profile = replace(told(spy, watcher), compiler=compiler)
        return replace(profile, untold={**profile.untold, "compilation": reason}) if reason else profile
    if not watcher.steps:
        spy = _spied(call, hooked)
    return told(spy, watcher)


def _compiler_seen(call: Callable[[], None], hooked: Hooked, watcher: CallWatcher) -> tuple[CompilerSeen, str | None]:
    """Bare calls of what is compiled, and why they do not show which code they enter."""
    if is_recording():
        with compiler_held(), hooked():
            call()
        return CompilerSeen(), AROUND
    with compiler_held(), hooked(marked=True):
        found = entries(call)
    if found is None:
        return CompilerSeen(), INSIDE
    if found.lookups <= found.regions:
        return found, None
    held, calls = found, watcher.calls
    watcher.forget()
    found = entries(call) or held
    if found.regions <= held.regions:
        watcher.calls = calls
        return _counted(held, found), None
    return found, None


def _counted(held: CompilerSeen, bare: CompilerSeen) -> CompilerSeen:
    """Where each region was entered, as the hooks tell, and how many there are without them."""
    return replace(held, regions=bare.regions, lookups=bare.lookups)


def _in_place_of_a_profile(call: Callable[[], None], hooked: Hooked, watcher: CallWatcher, reason: str) -> StepProfile:
    spy = _spied(call, hooked)
    compiler: dict[Evidence, str] = {}
    if spy.compiled_calls:
        with compiler_held(), hooked():
            call()
        compiler["compilation"] = reason
    return stand_in(told(spy, watcher), reason, compiler)


def _spied(call: Callable[[], None], hooked: Hooked) -> DispatchRecorder:
    with hooked() as recorder, spied(recorder) as spy:
        call()
    return spy


def stand_in(spied: StepProfile, reason: str, untold: Mapping[Evidence, str]) -> StepProfile:
    """What a spy saw in place of a profile: what it is blind to should have been told, and is not.

    Args:
        spied: what it saw.
        reason: why there is no profile.
        untold: what else is not told.
    """
    hidden = {evidence: f"{why}; {reason}" for evidence, why in spied.blind.items()}
    return replace(spied, blind={}, untold={**hidden, **spied.untold, **untold})


def told(spy: DispatchRecorder, watcher: CallWatcher) -> StepProfile:
    """What the spy saw, without that of other threads."""
    untold: dict[Evidence, str] = {}
    if watcher.calls.in_other_threads():
        untold |= dict.fromkeys(_IN_MODEL, f"the forward pass {_ELSEWHERE}")
    if watcher.steps_elsewhere:
        untold["update"] = f"the update {_ELSEWHERE}"
    return replace(spy.profile(watcher.model), untold=untold)
