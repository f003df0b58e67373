"""What a script's process may say, read once where it comes in: typed, within bounds, each word where it is due.

Whoever knows the name of the socket can speak, and a script that was built for another version does. So nothing of a
word is taken on trust: a field of another type, a time that no clock shows, fewer steps than were asked, or a word that
answers another question is refused by the name of what is wrong with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorameter.attach.observer import Source, StepReading
from lorameter.attach.turn_client import MOST_TRACEBACK
from lorameter.errors import UsageError, shorten
from lorameter.records import codec
from lorameter.records.validation import LARGEST, check_evidence

NAME, LONGEST = 120, 2000
"""Characters of the name of an error, and of what it says."""
COUNTED = (
    "number", "cpu_time_s", "data_time_s", "forward_time_s", "backward_time_s", "optimizer_time_s", "sequences",
    "real_tokens", "padded_tokens", "loss_tokens",
)  # fmt: skip
"""Fields of a step that count or time something."""
Kind = Literal["begin", "steps", "peaks", "end", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a script says of its training when it stands before its first step."""

    pid: int
    source: Source
    planned_steps: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    trainable_dtypes: dict[str, int] = field(default_factory=dict)
    """Number of trainable parameters by their type."""
    accumulation: int | None = None
    required: dict[str, Any] = field(default_factory=dict)
    """What the script itself says that a step must have."""
    ranks: int = 1
    threads: int | None = None
    cuda: bool = False
    """Whether it computes on a GPU."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peaks until then, by their names in a record."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions of its packages, and of its `python` and `cuda`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEnded:
    """How its training has ended."""

    error: str | None
    """The type of the error; None where there was none."""
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One line of the conversation (`lorameter.attach.turn_client`)."""

    begin: Begun | None = None
    steps: tuple[StepReading, ...] | None = None
    peaks: dict[str, int] | None = None
    end: TrainingEnded | None = None
    fault: str | None = None

    @property
    def kind(self) -> Kind | None:
        """What it is about; steps come with an end as well."""
        said: list[Kind] = [kind for kind in ("begin", "peaks", "end", "fault") if getattr(self, kind) is not None]
        if len(said) > 1 or (said not in ([], ["end"]) and self.steps is not None):
            return None
        return said[0] if said else "steps" if self.steps is not None else None


def read_word(message: Mapping[str, Any], *due: Kind, steps: int = 0) -> Word:
    """The word in a message, of one of the kinds that are due; `steps` is how many were asked for.

    Raises:
        UsageError: it is none, or none that can be meant.
    """
    word = codec.from_json(Word, message, "a word of the script")
    kind = word.kind
    if kind not in due:
        said = shorten(", ".join(map(repr, message)) or "nothing", 60)
        raise UsageError(f"a word of the script: it says {said}, and {' or '.join(due)} is due")
    readings = word.steps or ()
    if len(readings) > steps or (kind == "steps" and len(readings) < steps):
        raise UsageError(f"a word of the script: it tells of {len(readings)} steps, and {steps} were asked for")
    for index, reading in enumerate(readings):
        _check_reading(reading, f"a word of the script, steps[{index}]")
    _check_counts(word.peaks or {}, "a word of the script, peaks")
    if word.begin is not None:
        counts = ("planned_steps", "trainable_parameters", "total_parameters", "accumulation", "ranks", "threads")
        _check_counts({key: getattr(word.begin, key) for key in counts}, "a word of the script, begin")
        _check_counts(word.begin.memory, "a word of the script, begin, memory")
    return _shortened(word)


def _shortened(word: Word) -> Word:
    if word.fault is not None:
        return dataclasses.replace(word, fault=shorten(word.fault, LONGEST))
    if word.end is None:
        return word
    error = None if word.end.error is None else shorten(word.end.error, NAME)
    message, traceback = shorten(word.end.message, LONGEST), word.end.traceback[-MOST_TRACEBACK:]
    return dataclasses.replace(word, end=TrainingEnded(error=error, message=message, traceback=traceback))


def _check_reading(reading: StepReading, where: str) -> None:
    if not 0 < reading.step_time_s <= LARGEST:
        raise UsageError(f"{where}: step_time_s = {reading.step_time_s!r}, and no step takes that")
    _check_counts({key: getattr(reading, key) for key in COUNTED}, where)
    checks = codec.from_json(tuple[dict[str, Any], ...], reading.checks or (), f"{where}, checks")
    check_evidence(checks, f"{where}, checks")


def _check_counts(counts: Mapping[str, float | None], where: str) -> None:
    for key, value in counts.items():
        if value is not None and not 0 <= value <= LARGEST:
            raise UsageError(f"{where}: {shorten(key, 60)} = {value!r}, and nothing is counted or timed so")
