"""A run under way: a grid of variants and replicates, the ratios as they narrow, and the time left with its basis.

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
from lorameter.records.metrics import METRICS, PRIMARY, Phase, samples_of
from lorameter.records.record import Notice, Role, Side, TrialRecord
from lorameter.records.units import format_count, format_duration, format_value
from lorameter.report.blocks import Cell, tone_of, write_ratio
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
"""Without a terminal, seconds after which what a replicate is at is said again."""
_CELL_WIDTH = 10


class LiveDisplay(Display):
    """Shows a run in the terminal; use as a context manager around it."""

    def __init__(self, console: Console, *, device: str = "", expected_s: float | None = None, basis: str = "") -> None:
        """`expected_s` is what the run is expected to take, in seconds, and `basis` what that rests on."""
        self._console = console
        self._device, self._expected_s, self._basis = device, expected_s, basis
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._grid: Grid | None = None
        self._begin = self._drawn = self._told = time.monotonic()
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
        self._grid = Grid(plan)
        self._begin = self._told = time.monotonic()
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
        if self._grid is not None:
            self._grid.replan(plan)
        self._console.print(draw_text(f"level {plan.interleaving}: {plan.why}"))
        for notice in notices:
            self._console.print(draw_text(f"{notice.code}: {notice.message} {notice.remedy}"))

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """Show the trial's new phase."""
        words = COMMANDS[phase].label if phase in COMMANDS else phase  # it must not raise
        role = " (control)" if slot.role == "control" else ""
        side = f"{slot.side} " if slot.side else ""
        replicates = self._grid.plan.study.protocol.replicates if self._grid else 0
        self._now = f"replicate {slot.replicate + 1}/{replicates}  {side}{slot.variant.name}{role}: {words}"
        if self._grid is not None:
            self._grid.enter(slot, phase)
        new, self._phase = (slot.replicate, words) != self._phase, (slot.replicate, words)
        self._draw(at_once=new)
        if time.monotonic() - self._told >= SILENT_S:
            self._line(_joined(f"{self._now}, after {format_duration(time.monotonic() - self._begin)}", self._left()))

    def trial_ended(self, record: TrialRecord) -> None:
        """Show the trial's value and how it ended."""
        if self._grid is not None:
            self._grid.end(record)
        ended, total = (len(self._grid.records), len(self._grid.plan.slots)) if self._grid else (0, 0)
        why = f": {record.failure.message}" if record.failure else ""
        self._draw(at_once=True)
        self._line(f"[{ended}/{total}] {record.trial} {record.status} in {record.wall_time_s:.1f} s{why}")

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._console.is_terminal and self._grid is not None and (at_once or now - self._drawn >= LEAST_BETWEEN_S):
            self._live.update(self.picture(), refresh=True)
            self._drawn = time.monotonic()

    def picture(self) -> Group:
        """All that there is to be seen now."""
        assert self._grid is not None
        grid, width = self._grid, self._console.width
        names = {key: _name(key) for key in grid.rows}
        longest = min(max(map(len, names.values())), width // 3)
        ratios = {key: grid.ratio(key) for key in grid.rows}
        ratio_width = max(len("ratio so far"), *(len(cell.line) for cell in ratios.values()))
        room = max((width - longest - ratio_width - 6) // (_CELL_WIDTH + 2), 1)
        first = self._first(room)
        shown = grid.replicates[first : first + room]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
        table.add_column("", no_wrap=True, overflow="ellipsis", width=longest)
        for replicate in shown:
            table.add_column(Text(str(replicate + 1), style="dim"), no_wrap=True, justify="right", width=_CELL_WIDTH)
        table.add_column(Text("ratio so far", style="dim"), no_wrap=True, overflow="ellipsis")
        for key in grid.rows:
            cells = [_drawn(cell) for cell in grid.cells(key)[first : first + room]]
            style = "bold" if key[1] == grid.plan.study.reference and key[2] == "variant" else ""
            table.add_row(draw_text(names[key]), *cells, draw_text(ratios[key].line), style=style)
        return Group(table, self._said(self._now), self._said(self._status()))

    def _first(self, room: int) -> int:
        """The first replicate that is shown where not all have room: the one under way is the last but one."""
        assert self._grid is not None
        begun = {*self._grid.phases, *self._grid.records}
        last = max((slot.replicate for slot in self._grid.plan.slots if slot.trial in begun), default=0)
        return max(min(last + 2, len(self._grid.replicates)) - room, 0)

    def _said(self, text: str) -> Text:
        said = draw_text(text, "faint")
        said.truncate(self._console.width, overflow="ellipsis")
        return said

    def _status(self) -> str:
        assert self._grid is not None
        ended, total = len(self._grid.records), len(self._grid.plan.slots)
        met = ", ".join(f"{code} in {count}" for code, count in self._grid.disturbed.items())
        surroundings = f"surroundings: {met}" if met else ""
        return _joined(f"{ended} of {total} trials", self._left(), self._device, surroundings)

    def _left(self) -> str:
        """The time left, and what that rests on: the trials so far, or what was expected; never more than the limit of
        the run leaves."""
        if self._grid is None:
            return ""
        spent, ended = time.monotonic() - self._begin, len(self._grid.records)
        left = spent / ended * (len(self._grid.plan.slots) - ended) if ended else None
        foreseen = self._expected_s - spent if left is None and self._expected_s is not None else left
        minutes = self._grid.plan.study.protocol.max_minutes
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
            self._told = time.monotonic()


def _joined(*parts: str) -> str:
    """What there is to say of what is asked for; what is not known is left out with its mark."""
    return "; ".join(filter(None, parts))


def _name(key: Key) -> str:
    side, name, role = key
    return f"{side} {name}".strip() + (" (again)" if role == "control" else "")


def _drawn(cell: Cell) -> Text:
    text = draw_text(f"{cell.said} {cell.text}".strip(), tone_of(cell.verdict) if cell.verdict else "plain")
    text.truncate(_CELL_WIDTH, overflow="ellipsis")
    return text


Key = tuple[Side, str, Role]
"""Side, variant and role of a row."""


class Grid:
    """The state of a run: which trial is where, what it was measured as, and what follows."""

    def __init__(self, plan: Plan) -> None:
        self.phases: dict[str, str] = {}
        """What each trial that is under way does, by trial."""
        self.records: dict[str, TrialRecord] = {}
        """Of trials that have ended."""
        self.disturbed: Counter[str] = Counter()
        """How many trials each kind of disturbance has met."""
        self._ratios: dict[Key, Comparison] = {}
        self.replan(plan)

    def replan(self, plan: Plan) -> None:
        """The plan is another now, as a rehearsal may find."""
        self.plan = plan
        self._slots: dict[tuple[Key, int], list[Slot]] = {}
        for slot in plan.slots:
            key = slot.side, slot.variant.name, slot.role
            self._slots.setdefault((key, slot.replicate), []).append(slot)
        order = {variant.name: place for place, variant in enumerate(plan.study.variants)}
        keys = dict.fromkeys(key for key, _ in self._slots)
        self.rows = sorted(keys, key=lambda key: (key[2] == "control", order.get(key[1], 0), key[0]))
        """Sides, variants and roles in the order of the study, the control last."""
        self.replicates = sorted({replicate for _, replicate in self._slots})
        """Their numbers, from 0."""

    def enter(self, slot: Slot, phase: str) -> None:
        """A trial begins a phase; whatever the word is, it is no error."""
        self.phases[slot.trial] = COMMANDS[phase].label if phase in COMMANDS else phase

    def end(self, record: TrialRecord) -> None:
        """A trial has its record, and the ratio of its row is taken anew."""
        self.phases.pop(record.trial, None)
        self.records[record.trial] = record  # one that is measured again ends twice
        on_cpu = not any(kind.startswith("device_") for kind in record.memory)
        self.disturbed.update({one.code for _, one in disturbances_of(record, on_cpu=on_cpu)})
        ended: Key = (record.side, record.name, record.role)
        for key in [ended, *(other for other in self.rows if self._base(other) == ended)]:
            if (found := self._ratio(key)) is not None:
                self._ratios[key] = found

    def cells(self, key: Key) -> list[Cell]:
        """What is known of a row, one cell a replicate: a dot for what has not begun."""
        return [self._cell(key, replicate) for replicate in self.replicates]

    def ratio(self, key: Key) -> Cell:
        """The ratio of a row as far as it has come."""
        return write_ratio(self._ratios[key]) if key in self._ratios else Cell()

    def _cell(self, key: Key, replicate: int) -> Cell:
        """Of several trials of a replicate the one that is under way, or failed, or took turns."""
        slots = self._slots.get((key, replicate), [])
        under_way = [self.phases[slot.trial] for slot in slots if slot.trial in self.phases]
        if under_way:
            return Cell(text=under_way[0], verdict="inconclusive", said="▸")
        ended = [self.records[slot.trial] for slot in slots if slot.trial in self.records]
        failed = next((record for record in ended if record.status != "ok"), None)
        if failed is not None:
            return Cell(verdict="invalid", said=failed.status.replace("_", " "))
        values = [cell for record in ended if (cell := _value_of(record))]
        return values[0] if values else Cell(text="·" if len(ended) < len(slots) else "✓")

    def _ratio(self, key: Key) -> Comparison | None:
        """To its base, as far as both have been measured."""
        against = self._base(key)
        ours, base = (
            tuple(record for record in self.records.values() if (record.side, record.name, record.role) == one)
            for one in (key, against)
        )
        if key == against or not ours or not base or self.plan.study.protocol.mixed:
            return None
        series = [group_trials(records, one[0])[one[1], one[2]] for records, one in ((base, against), (ours, key))]
        for metric in PRIMARY.values():
            with contextlib.suppress(InvalidRunError):  # what cannot be compared yet is not shown
                if found := compare_series(series[0], series[1], metric):
                    return found
        return None

    def _base(self, key: Key) -> Key:
        """What a row is compared with: the reference, or the base of an A/B; the control with what it repeats."""
        side, name, _ = key
        return ("base", name, "variant") if side else ("", self.plan.study.reference, "variant")


def _value_of(record: TrialRecord) -> Cell | None:
    """The value shown for a trial: its step time, else a request, else its cold start."""
    phases: tuple[Phase, ...] = ("train", "generate", "cold")
    for phase in phases:
        metric = METRICS[PRIMARY[phase]]
        if samples := samples_of(record, metric.name):
            value = statistics.median(samples)
            return Cell(text=format_value(value, metric.unit), value=value, unit=metric.unit)
    return None
