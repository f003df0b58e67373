"""The interface of displays of a running measurement, and the wrapper that keeps their errors from the run."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from kernels_check.terminal import print_stderr
from lorameter.errors import redact
from lorameter.records.record import Notice, TrialRecord
from lorameter.run.plan import Plan, Slot


class ProgressListener(Protocol):
    """Receives the progress of a run between turns; must return quickly."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial has its record."""


class Display(ProgressListener, Protocol):
    """Shows a run under way."""

    def starting(self, plan: Plan, run_id: str) -> None:
        """The worker is being started."""

    def tokens_prepared(self, data: str) -> None:
        """The user's data has been read; `data` describes it."""

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """The scripts have been rehearsed: the plan at the level that fits, and notices."""


class Shielded:
    """A display whose first error is printed; after it nothing is displayed and the run goes on."""

    def __init__(self, display: Display) -> None:
        self._display: Display | None = display

    def starting(self, plan: Plan, run_id: str) -> None:
        """As the display's."""
        self._tell(lambda display: display.starting(plan, run_id))

    def tokens_prepared(self, data: str) -> None:
        """As the display's."""
        self._tell(lambda display: display.tokens_prepared(data))

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """As the display's."""
        self._tell(lambda display: display.rehearsed(plan, notices))

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """As the display's."""
        self._tell(lambda display: display.trial_phase(slot, phase))

    def trial_ended(self, record: TrialRecord) -> None:
        """As the display's."""
        self._tell(lambda display: display.trial_ended(record))

    def _tell(self, what: Callable[[Display], None]) -> None:
        if self._display is None:
            return
        try:
            what(self._display)
        except MemoryError:  # the run reports it itself
            self._display = None
        except (Exception, SystemExit):  # rich exits where its output is closed
            self._display = None
            with contextlib.suppress(OSError, ValueError):
                print_stderr(redact(traceback.format_exc().rstrip("\n")))
