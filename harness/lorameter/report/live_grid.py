"""What is known of a run under way: a cell for each variant and replicate, and the ratios as far as they have come.

Nothing here draws. The display gets every phase and every record, and asks for this between two turns.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter

from lorameter.errors import InvalidRunError
from lorameter.records.metrics import METRICS, PRIMARY, Phase, samples_of
from lorameter.records.record import Role, Side, TrialRecord
from lorameter.records.units import format_value
from lorameter.report.blocks import Cell, write_ratio
from lorameter.run.plan import Plan, Slot
from lorameter.stats import Comparison
from lorameter.studies.command import COMMANDS
from lorameter.verdicts.series import compare_series, group_trials
from lorameter.verdicts.validity import disturbances_of

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
        values = [cell for record in ended if (cell := _value(record))]
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


def _value(record: TrialRecord) -> Cell | None:
    """The value shown for a trial: its step time, else a request, else its cold start."""
    phases: tuple[Phase, ...] = ("train", "generate", "cold")
    for phase in phases:
        metric = METRICS[PRIMARY[phase]]
        if samples := samples_of(record, metric.name):
            value = statistics.median(samples)
            return Cell(text=format_value(value, metric.unit), value=value, unit=metric.unit)
    return None
