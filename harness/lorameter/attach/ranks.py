"""Several ranks of one training: rank 0 writes the run, and of each step the slowest rank counts.

Ranks wait for each other inside a step, so their times are close; a collective of ours would make them wait once more
and could hang where theirs does. So each rank writes its steps to a file when it ends, and rank 0 reads them. The
folder is found without a message between the ranks: they are children of one launcher.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lorameter.attach.environment import RUN, wrap_folder
from lorameter.attach.observer import StepReading, TrainingInfo
from lorameter.attach.samples import MOST_TIMED
from lorameter.records.fileio import write_whole
from lorameter.records.record import Notice

WAIT_S = 10.0
"""How long rank 0 waits for the files of the others, which end at the same time."""
MOST_KEPT = 2 * MOST_TIMED
"""Steps of which a rank keeps anything: the timed ones are among the first (`samples.MOST_TIMED`)."""


def folder_of(run: Path) -> Path:
    """Where the ranks of a run meet: named after the run where a command was wrapped, else after their launcher."""
    if os.environ.get(RUN):
        return wrap_folder(run) / "ranks"
    return run.with_name(f".ranks-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")


class Ranks:
    """The steps of one rank, and for rank 0 those of the others."""

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
            notices.append(_unseen(missing, self._ranks))
        return [_merge([one, *(rank[one.number - 1] for rank in others)], complete=not missing) for one in timed]

    def _read(self) -> list[list[StepReading]]:
        """The steps of the others that have seen as many; waits for the files that are not there yet."""
        deadline = time.monotonic() + WAIT_S
        paths = [self._folder / f"{rank}.json" for rank in range(1, self._ranks)]
        while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.05)
        read = [msgspec.json.decode(path.read_bytes(), type=list[StepReading]) for path in paths if path.is_file()]
        return [one for one in read if len(one) >= len(self._readings)]


def _merge(step: Sequence[StepReading], *, complete: bool) -> StepReading:
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


def _unseen(missing: int, ranks: int) -> Notice:
    return Notice(
        code="rank-unseen",
        message=f"{missing} of {ranks} ranks left no times, so the slowest rank of a step may be slower than what is "
        "given, and tokens of all ranks are not known.",
        remedy="Let all ranks end by themselves, and on one machine or with a runs directory that they share.",
    )
