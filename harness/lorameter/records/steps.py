"""The steps of a trial under way, one a line: a process that is killed loses none that it has written.

Lines are not synced: what a process has written outlives it, though not the machine. The record at the trial's end
holds all of it, and the file is removed with that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.records import codec, journal
from lorameter.records.record import TrialRecord

FILE = "steps.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step adds to the record of its trial."""

    samples: dict[str, float | None] = field(default_factory=dict)
    """One value for each sample; None where it was not seen."""
    values: dict[str, float] = field(default_factory=dict)
    """Values of the record as they are now."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peaks as they are now."""


def line_of(step: Step) -> bytes:
    """The line of a step. It is written while a training waits, and `codec` takes five times as long."""
    try:
        text = json.dumps({"samples": step.samples, "values": step.values, "memory": step.memory}, allow_nan=False)
    except ValueError:  # what is no number in JSON
        text = codec.dumps(step)
    return f"{text}\n".encode()


def with_steps(record: TrialRecord, folder: Path) -> TrialRecord:
    """The record with the steps in the folder of its run, each a turn of its own. A sample that one of them did not
    show is left out for all, and so is a line that was cut short."""
    samples: dict[str, list[float | None]] = {}
    values, memory = dict(record.values), dict(record.memory)
    for line in journal.lines(folder / FILE):
        try:
            step = codec.from_json(Step, codec.parse(line), FILE)
        except (UsageError, codec.NotJsonError):
            break
        for name, value in step.samples.items():
            samples.setdefault(name, []).append(value)
        values |= step.values
        memory |= step.memory
    whole = {name: tuple(value for value in found if value is not None) for name, found in samples.items()}
    seen = {name: found for name, found in whole.items() if len(found) == len(samples[name])}
    turns = (1,) * len(seen.get("step_time_s", ()))
    return record.replaced(samples=record.samples | seen, turn_lengths=turns, values=values, memory=memory)


def remove(folder: Path) -> None:
    """Its trial has ended."""
    (folder / FILE).unlink(missing_ok=True)
