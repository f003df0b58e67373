"""The interface of displays of a running measurement, and the wrapper that keeps their errors from the run."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from kernels_check.terminal import print_stderr
from lorameter.errors import redact
from lorameter.records.record import Notice, TrialRecord
from lorameter.run.plan import Plan, Slot


class Display:
    """Shows a run under way between its turns, so it must return quickly; this one shows nothing."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has its record."""

    def starting(self, plan: Plan, run_id: str) -> None:
        """The worker is being started."""

    def tokens_prepared(self, data: str) -> None:
        """The user's data has been read; `data` describes it."""

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """The scripts have been rehearsed: the plan at the level that fits, and notices."""


def shield(display: Display) -> Display:
    """The display; its first error is printed and ends the display, and the run continues."""
    return cast(Display, _Shield(display))


class _Shield:
    def __init__(self, display: Display) -> None:
        self._display: Display | None = display

    def __getattr__(self, event: str) -> Callable[..., None]:
        return partial(self._show, event)

    def _show(self, event: str, *arguments: Any) -> None:
        if self._display is None:
            return
        try:
            getattr(self._display, event)(*arguments)
        except MemoryError:  # the run reports it itself
            self._display = None
        except (Exception, SystemExit):  # rich exits where its output is closed
            self._display = None
            with contextlib.suppress(OSError, ValueError):
                print_stderr(redact(traceback.format_exc().rstrip("\n")))
