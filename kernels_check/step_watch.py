"""Watch a fine-tuning step as it takes place: judge what ran, and neither call nor put back anything.

``verify`` takes steps of its own and undoes them. Here the step is the training's: it happens once, and it must come
out to the bit as if nobody had looked. What one step cannot tell is unknown, with what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import nn

from kernels_check.check import INSTRUMENTS, Check, Instrument, Json
from kernels_check.judges.paths import PATHS, validate
from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.live_step import COMPILED_MEANWHILE, LiveStepObserver
from kernels_check.observe.observation import Observation
from kernels_check.observe.trained_parts import ParameterStatus
from kernels_check.verification import judge_all

_PARTS: Mapping[str, Callable[[Observation], list[ParameterStatus]]] = {
    "embedding.trained": Observation.embeddings,
    "norms.trained": Observation.norms,
}
NO_UPDATE = (
    "no optimizer that holds the model's parameters stepped in what was watched: let the watch stand around all that "
    "one update accumulates"
)
_OPEN = "this watch is open already: close it before the next step, or make one for each model"
NOTHING_RAN = "the model was not called while it was watched, and no gradient reached it"


def watch(
    model: nn.Module,
    requirements: Mapping[str, Json] | None = None,
    *,
    instrument: Instrument = "profile",
    batch: Mapping[str, Any] | None = None,
) -> Watch:
    """Look on at a step that takes place by itself: ``with watch(model, requirements) as watched: step()``.

    Args:
        model: the model that is trained, as PEFT returned it.
        requirements: path to expected value, see ``REQUIREMENTS``. Paths nobody asked for are reported too.
        instrument: as for ``verify``.
        batch: as for ``verify``; its forwards are made when the block has ended.

    Returns:
        A context manager, which can be entered again for the next step. ``checks`` holds what was found.

    Raises:
        ValueError: unknown path or instrument, or a value of the wrong kind.
    """
    return Watch(model, requirements or {}, instrument=instrument, batch=batch)


class Watch:
    """Judges the step inside its block; see ``watch``.

    The block takes one step: all forward and backward passes that one update accumulates, and the update. It can be
    opened in one place and closed in another, as the callbacks of a Trainer do by an ``ExitStack``. What fails of the
    check itself raises nothing and is ``unknown``. An error of the step goes through.
    """

    def __init__(
        self,
        model: nn.Module,
        requirements: Mapping[str, Json],
        *,
        instrument: Instrument = "profile",
        batch: Mapping[str, Any] | None = None,
    ) -> None:
        validate(requirements)
        if instrument not in INSTRUMENTS:
            raise ValueError(f"instrument {instrument!r} is none of {', '.join(INSTRUMENTS)}")
        self._model, self._requirements = model, dict(requirements)
        self._instrument, self._batch = instrument, batch
        self._steps = LiveStepObserver(model, instrument)
        self._is_open = False
        self._unopened: str | None = None
        """Why nothing could be watched."""
        self._checks: tuple[Check, ...] = ()

    @contextmanager
    def glance(self) -> Iterator[None]:
        """Look on at what the update of a step does, and at nothing else, which costs next to nothing: the step that is
        watched after it is judged of both where it takes two, as whether an update is kept.

        Raises:
            RuntimeError: it looks on already.
        """
        if self._is_open:
            raise RuntimeError(_OPEN)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._steps.glanced())
            except Exception:  # the next step is the first then
                self._steps.forget()
            yield

    @property
    def checks(self) -> list[Check]:
        """One check per path of the last step that ended, as ``verify`` gives them; none before the first has."""
        return list(self._checks)

    def __enter__(self) -> Watch:
        """Look on from here.

        Raises:
            RuntimeError: it looks on already.
        """
        if self._is_open:
            raise RuntimeError(_OPEN)
        self._is_open = True
        self._unopened = None
        try:
            self._steps.begin()
        except Exception as error:
            self._steps.forget()
            self._unopened = f"the step could not be watched: {_words(error)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take everything off, and judge.

        Raises:
            RestoreError: a forward that was made to answer a question, after the step, has changed the model for good.
        """
        self._is_open = False
        if self._unopened is not None:
            self._checks = self._unknown(self._unopened)
        elif error is not None:
            self._steps.break_off()
            self._checks = self._unknown(f"the step raised {_words(error)}, so that it was not seen to its end")
        else:
            self._checks = self._judged()

    def _judged(self) -> tuple[Check, ...]:
        try:
            seen = self._steps.end()
            if self._steps.fault is not None:
                return self._unknown(f"what looked on failed: {self._steps.fault}")
            traces = seen.modules.all, seen.profile.compiled_regions, seen.reached, seen.updated, self._steps.compiled
            if not any(traces):
                return self._unknown(NOTHING_RAN)
            checks = self._checks_of(seen)
        except Exception as error:
            self._steps.forget()
            return self._unknown(f"what was seen could not be read: {_words(error)}")
        else:
            if self._steps.unrestored is not None:
                raise self._steps.unrestored
            return checks
        finally:
            self._steps.release()

    def _checks_of(self, seen: Observation) -> tuple[Check, ...]:
        with gc_paused():
            checks = judge_all(seen, self._requirements, self._instrument, packed=False)
        if self._asks_for_records():
            by_forwards = replace(seen, batch=self._batch, left=None)
            checks |= judge_all(by_forwards, self._requirements, self._instrument, packed=True)
        decided = (self._decided(checks[path], seen) for path in PATHS if path in checks)
        return tuple(map(self._with_what_is_left, decided))

    def _with_what_is_left(self, check: Check) -> Check:
        """The check, with what of its instrument is still in place."""
        if self._steps.left is None or not PATHS[check.path].rests_on:
            return check
        return replace(check, reason=f"{check.reason}; {self._steps.left}")

    def _decided(self, check: Check, seen: Observation) -> Check:
        """The check, or why one step of this kind does not decide it."""
        why = None
        if self._steps.compiled and PATHS[check.path].by_modules:
            return replace(check, observed=None, status="unknown", reason=COMPILED_MEANWHILE)
        if self._takes_an_update(check) and not seen.updated:  # what stepped in an earlier block is none of this one's
            why = NO_UPDATE
        elif self._may_show_more(check, seen):
            why = PATHS[check.path].further_steps
        if why is None:
            return check
        return replace(check, observed=None, status="unknown", reason=f"{why}; so far: {check.reason}")

    def _takes_an_update(self, check: Check) -> bool:
        if check.path == "lora.learning" and check.observed is not True and not self._steps.undecided:
            return False  # what an earlier step has found wrong is wrong still
        return PATHS[check.path].takes_update

    def _may_show_more(self, check: Check, seen: Observation) -> bool:
        if check.path == "lora.learning":
            return self._steps.undecided
        if check.path == "base.frozen":
            return check.observed is True and seen.calls == 1 and _is_merged_and_back(seen)
        parts = _PARTS.get(check.path)
        return parts is not None and self._steps.undecided and any(part.open for part in parts(seen))

    def _asks_for_records(self) -> bool:
        return self._batch is not None or any(PATHS[path].packed for path in self._requirements)

    def _unknown(self, reason: str) -> tuple[Check, ...]:
        asked = self._asks_for_records()
        return tuple(
            Check(path=path, required=self._requirements.get(path), observed=None, status="unknown", reason=reason)
            for path, judged in PATHS.items()
            if self._instrument in judged.instruments and (asked or not judged.packed)
        )


def _is_merged_and_back(seen: Observation) -> bool:
    return any(part.kind == "merged" for part in seen.after.parts.values())


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
