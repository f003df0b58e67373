"""A run under way: how far each variant is, the ratios as they narrow, and the time left with its basis.

Redrawn only when the parent is between two commands, so never while a step is timed: rich's refresh thread is off,
because a thread that wakes up then would disturb the measurement. Without a terminal a line a trial is printed, and
one where a replicate has been silent for long.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorameter.errors import InvalidRunError
from lorameter.records.metrics import METRICS, PRIMARY, samples_of
from lorameter.records.record import Notice, Role, Side, TrialRecord
from lorameter.records.units import format_count, format_duration, format_value
from lorameter.report.blocks import write_ratio
from lorameter.report.terminal import draw_text
from lorameter.run.display import Display
from lorameter.run.plan import Plan, Slot
from lorameter.stats import Comparison
from lorameter.studies.command import COMMANDS
from lorameter.verdicts.series import compare_series, group_trials
from lorameter.verdicts.validity import disturbances_of

LEAST_BETWEEN_S = 0.1
"""Seconds between two redrawings: a turn of a small model takes no longer."""
SILENT_S = 60.0
"""Without a terminal, seconds after which what a replicate is at is printed again."""
Key = tuple[Side, str, Role]
"""Side, variant and role of a row."""


class LiveDisplay(Display):
    """Shows a run in the terminal; use as a context manager around it."""

    def __init__(self, console: Console, *, device: str = "", expected_s: float | None = None, basis: str = "") -> None:
        """`expected_s` is what the run is expected to take, in seconds, and `basis` what that rests on."""
        self._console = console
        self._device, self._expected_s, self._basis = device, expected_s, basis
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._plan: Plan | None = None
        self._phases: dict[str, str] = {}
        """What each trial that is under way does."""
        self._records: dict[str, TrialRecord] = {}
        self._ratios: dict[Key, Comparison] = {}
        self._disturbed: Counter[str] = Counter()
        """How many trials each kind of disturbance has met."""
        self._begin = self._drawn = self._said_at = time.monotonic()
        self._now, self._phase = "", (-1, "")

    def __enter__(self) -> LiveDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.update(Text(""), refresh=False)
            self._live.stop()

    def starting(self, plan: Plan, run_id: str) -> None:
        """Say what is about to be measured."""
        self._plan = plan
        self._begin = self._said_at = time.monotonic()
        self._now = f"run {run_id}: starting the worker, preparing tokens"
        self._draw(at_once=True)
        trials = format_count(len(plan.slots), "trial")
        replicates = format_count(plan.study.protocol.replicates, "replicate")
        self._line(_joined(f"run {run_id}: {trials}, {replicates}", "starting the worker", self._left()))

    def tokens_prepared(self, data: str) -> None:
        """Say what is trained on."""
        self._line(f"data {data}")

    def rehearsed(self, plan: Plan, notices: Sequence[Notice]) -> None:
        """Say at which level the scripts will be measured, and what is to be known of them."""
        self._plan = plan
        self._console.print(draw_text(f"level {plan.interleaving}: {plan.why}"))
        for notice in notices:
            self._console.print(draw_text(f"{notice.code}: {notice.message} {notice.remedy}"))

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """Show the trial's new phase."""
        words = COMMANDS[phase].label if phase in COMMANDS else phase  # it must not raise
        self._phases[slot.trial] = words
        replicates = self._plan.study.protocol.replicates if self._plan else 0
        role = " (control)" if slot.role == "control" else ""
        side = f"{slot.side} " if slot.side else ""
        self._now = f"replicate {slot.replicate + 1}/{replicates}  {side}{slot.variant.name}{role}: {words}"
        new, self._phase = (slot.replicate, words) != self._phase, (slot.replicate, words)
        self._draw(at_once=new)
        if time.monotonic() - self._said_at >= SILENT_S:
            self._line(_joined(f"{self._now}, after {format_duration(time.monotonic() - self._begin)}", self._left()))

    def trial_ended(self, record: TrialRecord) -> None:
        """Show the trial's value and how it ended, and the ratio of its variant anew."""
        self._phases.pop(record.trial, None)
        self._records[record.trial] = record  # one that is measured again ends twice
        on_cpu = not any(kind.startswith("device_") for kind in record.memory)
        self._disturbed.update({one.code for _, one in disturbances_of(record, on_cpu=on_cpu)})
        ended: Key = (record.side, record.name, record.role)
        for key in [ended, *(one for one in self._rows() if self._base(one) == ended)]:
            if (found := self._ratio(key)) is not None:
                self._ratios[key] = found
        total = len(self._plan.slots) if self._plan else 0
        why = f": {record.failure.message}" if record.failure else ""
        self._draw(at_once=True)
        done = f"[{len(self._records)}/{total}]"
        self._line(f"{done} {record.trial} {record.status} in {record.wall_time_s:.1f} s{why}")

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._console.is_terminal and self._plan is not None and (at_once or now - self._drawn >= LEAST_BETWEEN_S):
            self._live.update(self.picture(), refresh=True)
            self._drawn = time.monotonic()

    def picture(self) -> Group:
        """A row a variant: trials that have ended, the last value, the ratio so far, and what is under way."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("", "trials", "last", "ratio so far", "now"):
            table.add_column(Text(head, style="dim"), no_wrap=True, overflow="ellipsis")
        for (side, name, role), slots in self._rows().items():
            ended = [self._records[slot.trial] for slot in slots if slot.trial in self._records]
            under_way = [self._phases[slot.trial] for slot in slots if slot.trial in self._phases]
            ratio = self._ratios.get((side, name, role))
            cells = (
                f"{side} {name}".strip() + (" (again)" if role == "control" else ""),
                f"{len(ended)}/{len(slots)}",
                next((said for record in reversed(ended) if (said := _last_value(record))), ""),
                "" if ratio is None else write_ratio(ratio).line,
                under_way[0] if under_way else "",
            )
            table.add_row(*map(draw_text, cells))
        met = ", ".join(f"{code} in {count}" for code, count in self._disturbed.items())
        done = f"{len(self._records)} of {len(self._plan.slots) if self._plan else 0} trials"
        status = _joined(done, self._left(), self._device, f"surroundings: {met}" if met else "")
        return Group(table, self._faint(self._now), self._faint(status))

    def _faint(self, text: str) -> Text:
        drawn = draw_text(text, "faint")
        drawn.truncate(self._console.width, overflow="ellipsis")
        return drawn

    def _rows(self) -> dict[Key, list[Slot]]:
        """The slots of each row, the control last."""
        rows: dict[Key, list[Slot]] = {}
        slots = self._plan.slots if self._plan else ()
        for slot in sorted(slots, key=lambda one: (one.role == "control", one.replicate)):
            rows.setdefault((slot.side, slot.variant.name, slot.role), []).append(slot)
        return rows

    def _base(self, key: Key) -> Key | None:
        """What a row is compared with: the reference, or the base of an A/B; the control with what it repeats."""
        side, name, _ = key
        if self._plan is None:
            return None
        return ("base", name, "variant") if side else ("", self._plan.study.reference, "variant")

    def _ratio(self, key: Key) -> Comparison | None:
        """To its base, as far as both have been measured."""
        against = self._base(key)
        if against is None or key == against or (self._plan and self._plan.study.protocol.mixed):
            return None
        sides = [
            group_trials([one for one in self._records.values() if (one.side, one.name, one.role) == side], side[0])
            for side in (against, key)
        ]
        base, ours = (groups.get(side[1:]) for groups, side in zip(sides, (against, key), strict=True))
        for metric in PRIMARY.values() if base and ours else ():
            with contextlib.suppress(InvalidRunError):  # what cannot be compared yet is not shown
                if found := compare_series(base, ours, metric):  # type: ignore[arg-type]
                    return found
        return None

    def _left(self) -> str:
        """The time left, and what that rests on: the trials so far, or what was expected; never more than the limit of
        the run leaves."""
        if self._plan is None:
            return ""
        spent, ended = time.monotonic() - self._begin, len(self._records)
        left = spent / ended * (len(self._plan.slots) - ended) if ended else None
        foreseen = self._expected_s - spent if left is None and self._expected_s is not None else left
        minutes = self._plan.study.protocol.max_minutes
        if minutes is not None and (foreseen is None or not 0 <= foreseen <= 60 * minutes - spent):
            return f"{format_duration(max(0.0, 60 * minutes - spent))} left of {minutes:g} minutes"
        if left is not None:
            return f"about {format_duration(left)} left, by {format_count(ended, 'trial')} so far"
        if self._expected_s is None:
            return ""
        if spent > self._expected_s:
            return f"longer than the {format_duration(self._expected_s)} of {self._basis}"
        return f"about {format_duration(self._expected_s - spent)} left, by {self._basis}"

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(draw_text(text))
            self._said_at = time.monotonic()


def _joined(*parts: str) -> str:
    """What there is to say of what is asked for; what is not known is left out with its mark."""
    return "; ".join(filter(None, parts))


def _last_value(record: TrialRecord) -> str:
    """The value shown for a trial: its step time, else a request, else its cold start; of a failed one its status."""
    if record.status != "ok":
        return record.status.replace("_", " ")
    for metric in PRIMARY.values():
        if samples := samples_of(record, metric):
            return format_value(statistics.median(samples), METRICS[metric].unit)
    return ""
