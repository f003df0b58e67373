"""A run under way: the trial, its phase and replicate, and the time left.

Redrawn only when the parent is between two commands: rich's refresh thread is off, because a thread that wakes up
while a step is timed is work beside the measurement. Without a terminal one line a trial is printed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from harness.records.record import Notice, TrialRecord
from harness.records.units import format_duration
from harness.report.drawing import draw_text
from harness.run.plan import Plan, Slot
from harness.studies.command import COMMANDS
from kernels_check.visible import make_visible


class LiveDisplay:
    """Implements the runner's `Watcher`; use as a context manager around a run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, left="")
        self._begin = time.monotonic()
        self._ended: set[str] = set()
        self._total = 0
        self._replicates = 0

    def __enter__(self) -> LiveDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def starting(self, plan: Plan, run_id: str) -> None:
        """Say what is about to be measured."""
        self._total = len(plan.slots)
        self._replicates = plan.study.protocol.replicates
        self._begin = time.monotonic()
        self._progress.update(self._task, total=self._total, description="starting the worker, preparing tokens")
        self._show()
        self._line(f"run {run_id}: {self._total} trials, {self._replicates} replicates; starting the worker")

    def tokens_prepared(self, data: str) -> None:
        """Say what is trained on."""
        self._line(f"data {make_visible(data)}")

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """Say at which level the scripts will be measured, and what is to be known of them."""
        self._console.print(draw_text(f"level {plan.interleaving}: {plan.why}"))
        for notice in notices:
            self._console.print(draw_text(make_visible(f"{notice.code}: {notice.message} {notice.remedy}")))

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """Show the trial's new phase."""
        words = (
            COMMANDS[phase].says if phase in COMMANDS else phase
        )  # whatever it is told, it raises nothing into the loop
        role = " (control)" if slot.role == "control" else ""
        self._progress.update(
            self._task,
            description=make_visible(
                f"replicate {slot.replicate + 1}/{self._replicates}  {slot.variant.name}{role}: {words}"
            ),
        )
        self._show()

    def trial_ended(self, record: TrialRecord) -> None:
        """Count the trial and say how it ended."""
        self._ended.add(record.trial)  # one that is measured again ends twice
        spent, ended = time.monotonic() - self._begin, len(self._ended)
        left = spent / ended * (self._total - ended)
        self._progress.update(self._task, completed=ended, left=f"about {format_duration(left)} left")
        self._show()
        why = f": {record.failure.message}" if record.failure else ""
        self._line(f"[{ended}/{self._total}] {record.trial} {record.status} in {record.wall_time_s:.1f} s{why}")

    def _show(self) -> None:
        if self._console.is_terminal:
            self._progress.refresh()

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(draw_text(text))
