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

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from kernels_check.check import Instrument
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.digest import digest
from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.instruments import watch_by_profile, watch_by_spy
from kernels_check.observe.module_tree import ModelTree
from kernels_check.observe.observation import Observation
from kernels_check.observe.snapshot import Snapshot
from kernels_check.observe.step_observer import StepObserver

MOST_CALLS = 8
"""Of which a run whose optimizer steps in each call takes two."""


def observe(
    model: nn.Module, step: Callable[[], object], snapshot: Snapshot, instrument: Instrument = "profile"
) -> Observation:
    """Call ``step`` a few times; the caller restores ``snapshot`` afterwards."""
    with gc_paused():
        found = ModelTree.of(model)  # what a step makes of it is read anew
        before = digest(found)
    watcher = StepObserver(model, snapshot.watch)

    def call() -> None:
        watcher.begin_call()
        step()
        watcher.end_call()

    def hooked(*, marked: bool = False) -> AbstractContextManager[CallRecorder]:
        return watcher.hooked(marked=marked, tree=None if watcher.begun else found)

    with gc_paused():
        watcher.updates.begin(found)
    with watcher.told_of_updates(found):
        if instrument == "spy":
            profile = watch_by_spy(call, hooked, watcher)
        else:
            call()
            profile = watch_by_profile(call, hooked, watcher)
        reached = watcher.gradients.reached()
        while watcher.begun < MOST_CALLS and watcher.updates.pending():
            call()
    with gc_paused():
        left = ModelTree.of(model)
        after = digest(left, before)
    return watcher.observation(
        profile,
        before=before,
        after=after,
        left=left,
        reached=reached,
        changed=snapshot.changed(),
        drew_random=snapshot.random.advanced(),
    )
