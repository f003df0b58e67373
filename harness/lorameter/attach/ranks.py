"""Several ranks of one training: rank 0 speaks, and of each step the slowest rank counts.

Ranks wait for each other inside a step, so their times are close; a collective of ours would make them wait once more
and could hang where theirs does. So each rank writes its own times to a file when it ends, beside the run, and rank 0
reads them. The folder is found without a word between the ranks: they are children of one launcher.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorameter.attach.environment import RUN, wrap_folder
from lorameter.attach.observer import StepReading, TrainingInfo
from lorameter.attach.samples import MOST_TIMED
from lorameter.records import bounded_io, codec
from lorameter.records.atomic_json import write_document
from lorameter.records.record import Notice

WAIT_S = 10.0
"""How long rank 0 waits for the files of the others, which end at the same time."""
MOST_BYTES = 64 << 20
MOST_KEPT = 2 * MOST_TIMED
"""Steps of which a rank keeps anything: the timed ones are among the first (`gathered.MOST_TIMED`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """What one rank says of its steps, by their number less one."""

    rank: int
    step_time_s: tuple[float, ...]
    real_tokens: tuple[int | None, ...]
    padded_tokens: tuple[int | None, ...]
    sequences: tuple[int | None, ...]


def folder_of(run: Path) -> Path:
    """Where the ranks of a run meet: named after the run where a command was wrapped, else after their launcher."""
    if os.environ.get(RUN):
        return wrap_folder(run) / "ranks"
    return run.with_name(f".ranks-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")


class RankFile:
    """The file of a rank that does not speak."""

    def __init__(self, run: Path, training: TrainingInfo) -> None:
        self._path = folder_of(run) / f"{training.rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rank = training.rank
        self._readings: list[StepReading] = []

    def add(self, reading: StepReading) -> None:
        """One more step."""
        if len(self._readings) < MOST_KEPT:
            self._readings.append(reading)

    def finish(self) -> None:
        """The training has ended, or nothing more of it is seen."""
        write_document(self._path, _times_of(self._rank, self._readings))


class Ranks:
    """Rank 0's view of the others."""

    def __init__(self, run: Path, ranks: int) -> None:
        self._folder = folder_of(run)
        self._ranks = ranks
        self._own: list[StepReading] = []

    def add(self, reading: StepReading) -> None:
        """One more step of rank 0."""
        if len(self._own) < MOST_KEPT:
            self._own.append(reading)

    def slowest(
        self, samples: dict[str, tuple[float, ...]], timed: Sequence[int], notices: list[Notice]
    ) -> dict[str, tuple[float, ...]]:
        """The samples of rank 0 with each step's time that of its slowest rank, and its tokens those of all ranks.

        Ranks that left no file are named in a notice, and tokens are left out, since theirs are not known.

        Args:
            samples: of rank 0.
            timed: numbers of the steps that they are of.
            notices: told of ranks that were not seen.
        """
        others = self._read()
        shutil.rmtree(self._folder, ignore_errors=True)
        found = dict(samples)
        own = zip(timed, samples.get("step_time_s", ()), strict=True)
        found["step_time_s"] = tuple(max([time_s, *(one.step_time_s[n - 1] for one in others)]) for n, time_s in own)
        for key in ("warmup_tokens", "step_tokens", "turn_loss_tokens"):  # of this rank alone
            found.pop(key, None)
        missing = self._ranks - 1 - len(others)
        if missing:
            notices.append(_unseen(missing, self._ranks))
            return {key: value for key, value in found.items() if not key.startswith("turn_")}
        return found | self._all_tokens(timed, others)

    def _all_tokens(self, timed: Sequence[int], others: list[RankTimes]) -> dict[str, tuple[float, ...]]:
        every = [_times_of(0, self._own), *others]
        found: dict[str, tuple[float, ...]] = {}
        counts = {
            "turn_sequences": [[one.sequences[number - 1] for one in every] for number in timed],
            "turn_tokens": [[one.real_tokens[number - 1] for one in every] for number in timed],
            "turn_padded_tokens": [[one.padded_tokens[number - 1] for one in every] for number in timed],
        }
        for name, steps in counts.items():
            if steps and not any(None in step for step in steps):
                found[name] = tuple(float(sum(count or 0 for count in step)) for step in steps)
        if {"turn_tokens", "turn_padded_tokens"} <= found.keys():
            pairs = zip(found["turn_padded_tokens"], found["turn_tokens"], strict=True)
            found["turn_padded_tokens"] = tuple(all_ - real for all_, real in pairs)
        if "turn_tokens" in found:
            found["step_tokens"] = found["turn_tokens"]
        return found

    def _read(self) -> list[RankTimes]:
        """The files of the others that have seen as many steps; waits for those that are not there yet."""
        deadline = time.monotonic() + WAIT_S
        paths = [self._folder / f"{rank}.json" for rank in range(1, self._ranks)]
        while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.05)
        read = [
            codec.from_json(RankTimes, bounded_io.read_json(path, MOST_BYTES), path.name)
            for path in paths
            if path.is_file()
        ]
        return [one for one in read if len(one.step_time_s) >= len(self._own)]


def _times_of(rank: int, readings: list[StepReading]) -> RankTimes:
    return RankTimes(
        rank=rank,
        step_time_s=tuple(one.step_time_s for one in readings),
        real_tokens=tuple(one.real_tokens for one in readings),
        padded_tokens=tuple(one.padded_tokens for one in readings),
        sequences=tuple(one.sequences for one in readings),
    )


def _unseen(missing: int, ranks: int) -> Notice:
    return Notice(
        code="rank-unseen",
        message=f"{missing} of {ranks} ranks left no times, so the slowest rank of a step may be slower than what is "
        "given, and tokens of all ranks are not known.",
        remedy="Let all ranks end by themselves, and on one machine or with a runs directory that they share.",
    )
