"""The interface for displays of a running measurement, and a wrapper that keeps their errors out of the run."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from lorameter.errors import redact
from lorameter.records.record import Notice, TrialRecord
from lorameter.run.plan import Plan, Slot
from lorameter.stats import Comparison
from lorameter.terminal import print_stderr
from lorameter.verdicts.series import Key


class Display:
    """Shows a running measurement between its turns, so its methods must return quickly; this base class shows
    nothing."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has ended with this record."""

    def judged(self, comparisons: Mapping[Key, Comparison]) -> None:
        """A replicate has ended; the comparisons are those so far, by variant and metric."""

    def starting(self, plan: Plan, run_id: str) -> None:
        """The worker is starting."""

    def tokens_prepared(self, data: str) -> None:
        """The user's data has been read; `data` is its description."""

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """The scripts have been rehearsed; the plan has the level that fits, and there may be notices."""


def guard_display(display: Display) -> Display:
    """Wrap a display: its first error is printed and turns it off, and the run continues."""
    return cast(Display, _GuardedDisplay(display))


class _GuardedDisplay:
    def __init__(self, display: Display) -> None:
        self._display = display

    def __getattr__(self, event: str) -> Callable[..., None]:
        return partial(self._show, event)

    def _show(self, event: str, *arguments: Any) -> None:
        try:
            getattr(self._display, event)(*arguments)
        except (Exception, SystemExit):  # rich exits if its output is closed
            self._display = Display()
            with contextlib.suppress(OSError, ValueError, MemoryError):
                print_stderr(redact(traceback.format_exc().rstrip("\n")))
