"""Samples of the steps of a script, of one rank or several, and the status of its training.

Which steps count is decided as for any trial: the first is a number of its own, the warm-up ends when the steps are
steady, a step that kernels_check watched has no time, and the rest is timed. What one of them did not show is left out
for all. Of several ranks rank 0 writes the run, and of each step the slowest rank counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorameter.attach.environment import WRAP
from lorameter.attach.observer import NotFollowedError, StepReading, TrainingInfo
from lorameter.records.failures import describe_error
from lorameter.records.fileio import write_whole
from lorameter.records.record import Failure, Notice, Status
from lorameter.records.units import format_count
from lorameter.stats import is_steady, is_warm
from lorameter.studies.protocol import Protocol

UNSEEN_END = "ended_unseen"
"""Of the values of a record: no source saw the training end, and its process has ended."""
_TIMED: Mapping[str, str] = {
    "step_time_s": "step_time_s",
    "step_cpu_time_s": "cpu_time_s",
    "data_time_s": "data_time_s",
    "forward_time_s": "forward_time_s",
    "backward_time_s": "backward_time_s",
    "optimizer_time_s": "optimizer_time_s",
    "gradient_norm": "gradient_norm",
    "timed_loss": "loss",
    "step_tokens": "real_tokens",
}
"""Samples of timed steps by the field of a reading that they hold."""
_COUNTED: Mapping[str, str] = {
    "turn_sequences": "sequences",
    "turn_tokens": "real_tokens",
    "turn_loss_tokens": "loss_tokens",
}
"""Samples of turns by the field of a reading that they sum."""


def timed_samples(turns: Sequence[Sequence[StepReading]]) -> dict[str, tuple[float, ...]]:
    """Samples of timed steps, one a step, and what each turn of them held."""
    readings = [reading for turn in turns for reading in turn]
    steps = {name: _all([getattr(one, field) for one in readings]) for name, field in _TIMED.items()}
    return {name: samples for name, samples in (steps | _counts_of(turns)).items() if samples}


def timed_columns(reading: StepReading) -> dict[str, float | None]:
    """What a timed step adds to these samples as a turn of its own; None where it did not show it."""
    found = timed_samples([[reading]])
    return {name: found[name][0] if name in found else None for name in (*_TIMED, *_COUNTED, "turn_padded_tokens")}


def untimed_columns(losses: str, tokens: str, reading: StepReading) -> dict[str, float | None]:
    """What another step adds to `untimed_samples`."""
    real = reading.real_tokens
    return {losses: reading.loss, tokens: None if real is None else float(real)}


def untimed_samples(losses: str, tokens: str, readings: Sequence[StepReading]) -> dict[str, tuple[float, ...]]:
    """Losses and real tokens of other steps, by these names."""
    found = {losses: _all([one.loss for one in readings]), tokens: _all([one.real_tokens for one in readings])}
    return {name: samples for name, samples in found.items() if samples}


def _counts_of(turns: Sequence[Sequence[StepReading]]) -> dict[str, tuple[float, ...]]:
    """What each turn held: sequences, real tokens, tokens that the loss is over, and padding."""
    found = {
        name: _all([_sum([getattr(one, field) for one in turn]) for turn in turns]) for name, field in _COUNTED.items()
    }
    real = found["turn_tokens"]
    positions = _all([_sum([one.padded_tokens for one in turn]) for turn in turns])
    found["turn_padded_tokens"] = tuple(whole - own for whole, own in zip(positions, real, strict=False))
    return found


def _all(values: Sequence[float | None]) -> tuple[float, ...]:
    known = tuple(float(value) for value in values if value is not None)
    return known if len(known) == len(values) else ()


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


MOST_TIMED = 10_000
"""Timed steps that are kept: a record is read whole, and the later steps of a long training say no more."""


class StepSamples:
    """The steps of one training."""

    def __init__(self, planned_steps: int | None) -> None:
        """`planned_steps`: of the training; a warm-up takes no more than a third of them."""
        protocol = Protocol()
        self._least = protocol.warmup_steps_min
        most = protocol.warmup_steps_max
        self._most = most if planned_steps is None else max(self._least, min(most, planned_steps // 3))
        self._first: StepReading | None = None
        self._warm: list[StepReading] = []
        self._timed: list[StepReading] = []
        self.steady = False
        self.warm = False
        """Whether the warm-up is over."""
        self.steps = 0
        """All steps."""
        self.conventions: tuple[str, ...] = ()
        """How tokens were counted, in words."""
        self._last_conventions: tuple[str, ...] = ()
        self.not_finite: Failure | None = None
        """That of the first step whose loss is no number."""

    def add(self, reading: StepReading) -> dict[str, float | None]:
        """One more step; what it adds to the samples."""
        self.steps += 1
        if reading.conventions != self._last_conventions:
            self._last_conventions = reading.conventions
            self.conventions = tuple(dict.fromkeys((*self.conventions, *reading.conventions)))
        if self.not_finite is None:
            self.not_finite = loss_not_finite([reading])
        if reading.checks is not None:
            return {}
        early = untimed_columns("warmup_loss", "warmup_tokens", reading)
        if self._first is None:
            self._first = reading
            return early
        if not self.warm:
            self._warm.append(reading)
            self._look()
            return early | {"warmup_step_time_s": reading.step_time_s}
        if len(self._timed) < MOST_TIMED:
            self._timed.append(reading)
            return timed_columns(reading)
        return {}

    def _look(self) -> None:
        times = [one.step_time_s for one in self._warm]
        if len(times) >= self._least:
            self.steady = is_steady(times)
            self.warm = is_warm(times, self._least, self._most)

    @property
    def timed(self) -> int:
        """Steps that are timed."""
        return len(self._timed)

    @property
    def timed_steps(self) -> Sequence[StepReading]:
        """These steps."""
        return self._timed

    def samples(self, timed: Sequence[StepReading] | None = None) -> dict[str, tuple[float, ...]]:
        """As of a trial's record, each timed step a turn of its own; `timed` stand in for the timed steps."""
        early = [*([] if self._first is None else [self._first]), *self._warm]
        found = timed_samples([(reading,) for reading in (self._timed if timed is None else timed)])
        found |= untimed_samples("warmup_loss", "warmup_tokens", early)
        return found | ({"warmup_step_time_s": tuple(one.step_time_s for one in self._warm)} if self._warm else {})

    def values(self) -> dict[str, float]:
        """As of a trial's record."""
        found = {"training_steps": float(self.steps)}
        if self._first is not None:
            found["first_step_time_s"] = self._first.step_time_s
        return found | ({"warmup_steady": float(self.steady)} if self.warm else {})


WAIT_S = 10.0
"""How long rank 0 waits for the files of the others, which end at the same time."""
MOST_KEPT = 2 * MOST_TIMED
"""Steps of which a rank keeps anything: the timed ones are among the first (`MOST_TIMED`)."""


def folder_of(run: Path) -> Path:
    """Where the ranks of a run meet: that of a wrapped command, else one named after their launcher."""
    if folder := os.environ.get(WRAP):
        return Path(folder) / "ranks"
    return run.with_name(f".ranks-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")


class Ranks:
    """The steps of one rank, and for rank 0 those of the others.

    Ranks wait for each other inside a step, so their times are close; a collective of ours would make them wait once
    more and could hang where theirs does. So each rank writes its steps to a file when it ends, and rank 0 reads them.
    The folder is found without a message between the ranks: they are children of one launcher.
    """

    def __init__(self, run: Path, training: TrainingInfo) -> None:
        self._folder = folder_of(run)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank, self._ranks = training.rank, training.ranks
        self._readings: list[StepReading] = []

    def add(self, reading: StepReading) -> None:
        """One more step."""
        if len(self._readings) < MOST_KEPT:
            self._readings.append(dataclasses.replace(reading, checks=None))

    def write(self) -> None:
        """The training has ended, or nothing more of it is seen: leave the steps for rank 0."""
        write_whole(self._folder / f"{self._rank}.json", msgspec.json.encode(self._readings).decode())

    def together(self, timed: Sequence[StepReading], notices: list[Notice]) -> list[StepReading]:
        """The timed steps of rank 0, each as long as on its slowest rank and with the tokens of all ranks.

        Ranks that left no file, or one of fewer steps, are named in a notice; the tokens of all are then not known.
        """
        others = self._read()
        shutil.rmtree(self._folder, ignore_errors=True)
        if missing := self._ranks - 1 - len(others):
            notices.append(_unseen_ranks(missing, self._ranks))
        return [_merge_ranks([one, *(rank[one.number - 1] for rank in others)], complete=not missing) for one in timed]

    def _read(self) -> list[list[StepReading]]:
        """The steps of the others that have seen as many; waits for the files that are not there yet."""
        deadline = time.monotonic() + WAIT_S
        paths = [self._folder / f"{rank}.json" for rank in range(1, self._ranks)]
        while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.05)
        read = [msgspec.json.decode(path.read_bytes(), type=list[StepReading]) for path in paths if path.is_file()]
        return [one for one in read if len(one) >= len(self._readings)]


def _merge_ranks(step: Sequence[StepReading], *, complete: bool) -> StepReading:
    """One step of several ranks, that of rank 0 first."""

    def total(name: str) -> int | None:
        counts = [getattr(one, name) for one in step]
        return sum(counts) if complete and None not in counts else None

    return dataclasses.replace(
        step[0],
        step_time_s=max(one.step_time_s for one in step),
        sequences=total("sequences"),
        real_tokens=total("real_tokens"),
        padded_tokens=total("padded_tokens"),
        loss_tokens=None,
    )


def _unseen_ranks(missing: int, ranks: int) -> Notice:
    return Notice(
        code="rank-unseen",
        message=f"{missing} of {ranks} ranks left no times, so the slowest rank of a step may be slower than what is "
        "given, and tokens of all ranks are not known.",
        remedy="Let all ranks end by themselves, and on one machine or with a runs directory that they share.",
    )


def loss_not_finite(readings: Sequence[StepReading]) -> Failure | None:
    """The failure of a training in which the loss of a step is no number; None where all are."""
    for reading in readings:
        if reading.loss is not None and not math.isfinite(reading.loss):
            message = (
                f"the loss is {reading.loss} in step {reading.number}; a diverged run has no result. Lower the "
                "script's learning rate, or let it clip its gradients."
            )
            return Failure(phase="train", kind="LossNotFinite", message=message)
    return None


def tokens_in(samples: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """What the record of a trial says of its tokens: real ones and padding, of all timed steps."""
    counts = {"real_tokens": samples.get("turn_tokens", ()), "padded_tokens": samples.get("turn_padded_tokens", ())}
    return {name: int(sum(found)) for name, found in counts.items() if found}


def exit_status(error: BaseException | None, gathered: StepSamples, phase: str) -> tuple[Status, Failure | None]:
    """The status of a training that ended so, and the failure where it is not ok; `phase` is what it was in."""
    if error is not None:
        return describe_end(error, phase)
    if gathered.not_finite is not None:
        return "invalid", gathered.not_finite
    if not gathered.timed:
        message = (
            f"the training ended after {format_count(gathered.steps, 'step')}, all of them its first, its warm-up or "
            "one that was watched, so none is timed. Train for longer."
        )
        return "invalid", Failure(phase="warm_up", kind="NothingTimed", message=message)
    return "ok", None


def describe_end(error: BaseException, phase: str) -> tuple[Status, Failure]:
    """The status and the failure of a training that an exception ended, or that was not followed to its end."""
    status, failure = describe_error(error, phase)
    if type(error) is NotFollowedError:
        return "invalid", Failure(phase=phase, kind="NotFollowed", message=str(error), traceback=failure.traceback)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(phase=phase, kind="Interrupted", message="stopped by the user")
    return status, failure
