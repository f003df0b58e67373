"""Displays a run in progress: the progress of each variant, its ratio so far, and the estimated time left.

The display is redrawn only between two commands of the parent, never during a timed step: rich's refresh thread is off,
because it would disturb the measurement. Without a terminal, each trial prints one line, and so does a replicate that
has been silent for long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from lorameter.measurements.metrics import METRICS, PRIMARY, get_samples
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.units import format_count, format_duration, format_value
from lorameter.report.phrases import format_verdict
from lorameter.report.terminal import draw_text
from lorameter.run.display import Display
from lorameter.run.plan import Plan, Slot
from lorameter.stats import Comparison
from lorameter.studies.request import COMMANDS
from lorameter.verdicts.series import Key

MIN_BETWEEN_S = 0.1
"""Minimum seconds between two redraws, because a turn of a small model may be shorter."""
SILENT_S = 60.0
"""Without a terminal, seconds after which the phase of a silent replicate is printed again."""


class LiveDisplay(Display):
    """Shows a run in the terminal; use as a context manager around it."""

    def __init__(self, console: Console, *, device: str = "") -> None:
        self._console, self._device = console, device
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._plan: Plan  # known from `starting` or `rehearsed` on, which come first
        self._phases: dict[str, str] = {}
        """The phase of each running trial."""
        self._records: dict[str, TrialRecord] = {}
        self._ratios: dict[str, str] = {}
        """The ratio of each variant so far, with its interval and verdict."""
        self._begin = self._drawn = self._printed_at = time.monotonic()
        self._now, self._phase = "", (-1, "")

    def __enter__(self) -> LiveDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(Text(""), refresh=False)
        self._live.stop()

    def starting(self, plan: Plan, run_id: str) -> None:
        """Show the plan at the start of the run."""
        self._plan = plan
        self._begin = self._printed_at = time.monotonic()
        self._now = f"run {run_id}: starting the worker, preparing tokens"
        self._draw(at_once=True)
        replicates = format_count(plan.study.protocol.replicates, "replicate")
        trials = format_count(len(plan.slots), "trial")
        self._print_line(f"run {run_id}: {trials}, {replicates}", "starting the worker", self._describe_time_left())

    def tokens_prepared(self, data: str) -> None:
        """Print the data of the training."""
        self._print_line(f"data {data}")

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """Print the interleaving of the scripts, and the notices of their rehearsal."""
        self._plan = plan
        self._console.print(draw_text(f"level {plan.interleaving}: {plan.why}"))
        for notice in notices:
            self._console.print(draw_text(f"{notice.code}: {notice.message} {notice.remedy}"))

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """Show the trial's new phase."""
        words = COMMANDS[phase].label if phase in COMMANDS else phase  # must not raise
        self._phases[slot.trial] = words
        self._now = f"replicate {slot.replicate + 1}/{self._plan.study.protocol.replicates}  {_name(slot)}: {words}"
        new, self._phase = (slot.replicate, words) != self._phase, (slot.replicate, words)
        self._draw(at_once=new)
        if time.monotonic() - self._printed_at >= SILENT_S:
            self._print_line(
                f"{self._now}, after {format_duration(time.monotonic() - self._begin)}", self._describe_time_left()
            )

    def trial_ended(self, record: TrialRecord) -> None:
        """Show the trial's value and status."""
        self._phases.pop(record.trial, None)
        self._records[record.trial] = record  # a trial that is measured again ends twice
        why = f": {record.failure.message}" if record.failure else ""
        self._draw(at_once=True)
        done = f"[{len(self._records)}/{len(self._plan.slots)}]"
        self._print_line(f"{done} {record.trial} {record.status} in {record.wall_time_s:.1f} s{why}")

    def judged(self, comparisons: Mapping[Key, Comparison]) -> None:
        """Show the ratio of each variant so far in its first metric, whose interval narrows with each replicate."""
        self._ratios = {}
        for (name, metric), comparison in comparisons.items():
            if comparison.low is not None:
                self._ratios.setdefault(name, format_verdict(comparison, metric))
        self._draw(at_once=True)
        if self._ratios:
            ended = max((record.replicate for record in self._records.values()), default=0) + 1
            ratios = (f"{name} {ratio}" for name, ratio in self._ratios.items())
            self._print_line(f"replicate {ended}: {', '.join(ratios)}", self._describe_time_left())

    def _draw(self, *, at_once: bool = False) -> None:
        if self._console.is_terminal and (at_once or time.monotonic() - self._drawn >= MIN_BETWEEN_S):
            self._live.update(self.render(), refresh=True)
            self._drawn = time.monotonic()

    def render(self) -> Group:
        """A row for each variant, the control last: ended trials, last value, ratio so far and current phase."""
        heads = (Text(head, style="dim") for head in ("", "trials", "last", "ratio", "now"))
        columns = (Column(head, no_wrap=True, overflow="ellipsis") for head in heads)
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        rows: dict[str, list[Slot]] = {}
        for slot in sorted(self._plan.slots, key=lambda one: (one.arm.role == "control", one.replicate)):
            rows.setdefault(_name(slot), []).append(slot)
        for name, slots in rows.items():
            ended = [self._records[slot.trial] for slot in slots if slot.trial in self._records]
            under_way = [self._phases[slot.trial] for slot in slots if slot.trial in self._phases]
            last = next(filter(None, map(_last_value, reversed(ended))), "")
            ratio = self._ratios.get(slots[0].variant.name, "") if _has_ratio(slots[0]) else ""
            cells = (name, f"{len(ended)}/{len(slots)}", last, ratio, next(iter(under_way), ""))
            table.add_row(*map(draw_text, cells))
        done = f"{len(self._records)} of {len(self._plan.slots)} trials"
        status = _join(done, self._describe_time_left(), self._device)
        below = (draw_text(text, "faint") for text in (self._now, status))
        return Group(table, *(Text.assemble(line, no_wrap=True, overflow="ellipsis") for line in below))

    def _describe_time_left(self) -> str:
        """The time left, estimated from the trials so far and capped by the run's time limit."""
        elapsed_s, ended = time.monotonic() - self._begin, len(self._records)
        left = elapsed_s / ended * (len(self._plan.slots) - ended) if ended else None
        minutes = self._plan.study.protocol.max_minutes
        if minutes is not None and (left is None or not 0 <= left <= 60 * minutes - elapsed_s):
            return f"{format_duration(max(0.0, 60 * minutes - elapsed_s))} left of {minutes:g} minutes"
        most = "at most" if self._plan.study.protocol.looks else "about"
        return "" if left is None else f"{most} {format_duration(left)} left, by {format_count(ended, 'trial')} so far"

    def _print_line(self, *parts: str) -> None:
        if not self._console.is_terminal:
            self._console.print(draw_text(_join(*parts)))
            self._printed_at = time.monotonic()


def _name(slot: Slot) -> str:
    return f"{slot.arm.side} {slot.variant.name}".strip() + (" (control)" if slot.arm.role == "control" else "")


def _has_ratio(slot: Slot) -> bool:
    """Whether the row of a trial is that of a compared side."""
    return slot.arm.role == "variant" and slot.arm.side in ("", "candidate")


def _join(*parts: str) -> str:
    """Join the parts that are not empty."""
    return "; ".join(filter(None, parts))


def _last_value(record: TrialRecord) -> str:
    """The value shown for a trial: its step time, else a request time, else its cold start; its status if it failed."""
    if record.status != "ok":
        return record.status.replace("_", " ")
    for metric in PRIMARY.values():
        if samples := get_samples(record, metric):
            return format_value(statistics.median(samples), METRICS[metric].unit)
    return ""
