"""The follower that writes down what it is told: a script's training as a run of lorameter on disk.

It asks for one step to be watched, the first after the warm-up, and for the next one where that left something unknown.
What it does itself it does between steps, where no step's time is: a look at the machine where a stretch of training
begins and ends, and each step to the disk.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kernels_check
import lorameter
from lorameter.attach.command import own_command
from lorameter.attach.energy import Energy
from lorameter.attach.error_guard import say
from lorameter.attach.exit_status import exit_status
from lorameter.attach.flops import Work
from lorameter.attach.identity import device_of
from lorameter.attach.marker_files import command_of
from lorameter.attach.observer import ObserverReply, Phase, StepReading, TrainingInfo
from lorameter.attach.peaks import Peaks
from lorameter.attach.ranks import RankFile, Ranks
from lorameter.attach.report_notes import SEEN_BY, not_kept, say_missing, say_peaks, say_seen, second_training
from lorameter.attach.run_file import RunFile
from lorameter.attach.step_samples import MOST_TIMED, StepSamples, tokens_in
from lorameter.attach.variables import COMMAND, REQUIRE, RUN, UNSEEN_END
from lorameter.errors import said_by
from lorameter.machine.telemetry import Telemetry
from lorameter.records import codec, store
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.requirements import lacking
from lorameter.records.steps import Step
from lorameter.studies.script import name_of_words

MOST_WATCHED = 2
"""Steps that are watched: what a change of weights becomes shows in the step after it."""
REPORT_TIMEOUT_S = 120.0
EVERY_TWO_SECONDS = ObserverReply(flush_interval_s=1.0)
"""So much of a training is lost by a process that is killed."""
AT_ONCE = ObserverReply()


class Writer:
    """A `Follower` that writes a run. Without arguments it does what the environment says, as of a wrapped command."""

    def __init__(
        self,
        *,
        runs_dir: str | Path | None = None,
        require: Mapping[str, Any] | None = None,
        report: bool | None = None,
    ) -> None:
        """Nothing is written before the training begins.

        Args:
            runs_dir: where the run is written; None: where the environment says.
            require: paths of kernels_check that the watched step must have; None: what the environment says.
            report: whether the report is printed at the end; None: unless whoever started the process does it.
        """
        named = os.environ.get(RUN)
        self._named = Path(named) if named else None
        self._runs_dir = None if runs_dir is None else Path(runs_dir)
        self._require = dict(json.loads(os.environ.get(REQUIRE, "{}")) if require is None else require)
        self._report = self._named is None if report is None else report
        self._training: TrainingInfo | None = None
        self._file: RunFile | None = None
        self._finished: RunFile | None = None
        """The same when its last record is written."""
        self._rank: RankFile | None = None
        self._ranks: Ranks | None = None
        self._notices: list[Notice] = []
        self._checks: tuple[dict[str, Any], ...] | None = None
        self._watched = 0
        self._watching = False
        self._values: dict[str, float] = {}

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Claim the run; a second training of the same process is noted and no more."""
        if self._training is not None:
            notice = second_training(training)
            self._notices.append(notice)
            if self._finished is not None:
                self._finished.add_notice(notice)
            return AT_ONCE
        self._training = training
        self._require = {**training.required, **self._require}  # who has started the command asks for more
        self._gathered, self._work = StepSamples(training.planned_steps), Work(training)
        path = self._path()
        if training.rank:
            self._rank = RankFile(path, training)
            return AT_ONCE
        device = _device_of(training)
        if training.ranks > 1:
            self._ranks = Ranks(path, training.ranks)
        self._values = _counts_of(training)
        self._file = RunFile(
            path, command=_command(), device=device, requirements=self._require, values=dict(self._values)
        )
        self._peaks, self._watch, self._energy = Peaks(device), Telemetry("train", device), Energy(device)
        self._read_s = time.monotonic()
        self._peaks.begin()
        return AT_ONCE

    def step(self, reading: StepReading) -> ObserverReply:
        """One more step; the first after the warm-up is watched."""
        if self._rank is not None:
            self._rank.add(reading)
            return AT_ONCE
        if self._file is None:
            return AT_ONCE
        if self._ranks is not None:
            self._ranks.add(reading)
        if reading.checks is not None:
            self._watched += 1
            self._checks = tuple(codec.to_json(check) for check in reading.checks)
        was_warm = self._gathered.warm
        self._file.add(Step(samples=self._gathered.add(reading), **self._so_far()))
        if self._gathered.warm and (not was_warm or self._watch_again(reading)):
            return ObserverReply(watch=self._require)
        if not was_warm:
            return AT_ONCE
        self._look(reading)
        return EVERY_TWO_SECONDS

    def _watch_again(self, reading: StepReading) -> bool:
        """Whether a second step in a row may tell what the first did not."""
        if reading.checks is None:  # of all steps but one or two
            return False
        from kernels_check.judges.paths import PATHS

        unknown = {check.path for check in reading.checks if check.status == "unknown"}
        further = {path for path, judged in PATHS.items() if judged.further_steps}
        return bool(unknown & further) and self._watched < MOST_WATCHED

    def _look(self, reading: StepReading) -> None:
        """Read the machine before the first timed step."""
        if not self._watching:
            self._begin_stretch()
        elif reading.checks is None:
            self._energy.step(reading)

    def _so_far(self) -> dict[str, Any]:
        """What is known beside the steps, with what takes a system call once a second."""
        values, now = self._gathered.values(), time.monotonic()
        if now - self._read_s < EVERY_TWO_SECONDS.flush_interval_s:
            return {"values": values}
        self._read_s = now
        return {"values": values | self._energy.values(), "memory": self._peaks.so_far()}

    def _begin_stretch(self) -> None:
        self._watching = True
        self._watch.begin()
        self._energy.begin()

    def _end_stretch(self) -> None:
        if self._watching:
            self._watching = False
            self._energy.end()
            self._values |= self._watch.end()

    def phase(self, phase: Phase) -> None:
        """Peaks of memory are those of a phase; evaluation and saving are in no stretch of training."""
        if self._file is None:
            return
        if phase != "train":
            self._end_stretch()
        self._peaks.enter(phase)
        if phase == "train" and self._gathered.timed:
            self._begin_stretch()

    def so_far(self, readings: Sequence[StepReading]) -> Mapping[str, float]:
        """Peaks of memory, the GPU's energy, and MFU of these steps where the device has a stated peak."""
        if self._file is None:
            return {}
        return self._peaks.so_far() | self._energy.values() | self._work.mfu(readings, self._file.device_name)

    def _measured(self) -> dict[str, Any]:
        """What goes into the record."""
        samples = self._gathered.samples()
        return {
            "samples": samples,
            "turn_lengths": (1,) * self._gathered.timed,
            "values": self._values | self._gathered.values() | self._energy.values(),
            "memory": self._peaks.so_far(),
            "tokens": tokens_in(samples),
        }

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Write the last record, and print the report."""
        if self._rank is not None:
            self._rank.finish()
        if self._file is None or self._training is None:
            return
        self._end_stretch()
        status, failure = exit_status(error, self._gathered, self._peaks.phase)
        if status == "ok" and (failure_of_checks := lacking(self._checks or (), self._require)):
            status, failure = "invalid", failure_of_checks
        if self._gathered.steps > MOST_TIMED:
            self._notices.append(not_kept(self._gathered.steps))
        measured = self._measured()
        measured["values"] |= {} if seen else {UNSEEN_END: 1.0}
        measured["values"] |= self._work.values(self._gathered, self._file.device_name)
        if self._ranks is not None:
            measured["samples"] = self._ranks.slowest(measured["samples"], self._gathered.timed_numbers, self._notices)
            measured["tokens"] = tokens_in(measured["samples"])
        record = self._file.record(
            status=status, failure=failure, checks=self._checks or (), notices=tuple(self._notices), **measured
        )
        self._file.finish(record, timed=self._gathered.timed, notes=self._notes(record), notices=())
        path = self._file.path
        self._finished, self._file = self._file, None  # whatever fails from here on, the run is whole
        if self._report:
            print_report(path)
        else:
            say(f"run {path.name} is written")

    def _notes(self, record: TrialRecord) -> tuple[str, ...]:
        """What a reader must know of how the numbers were had."""
        source = self._training.source if self._training is not None else "loop"
        missing = say_missing(source, record.samples)
        conventions = self._gathered.conventions
        notes = (SEEN_BY[source], *missing, *conventions, say_peaks(record.memory), say_seen(self._checks))
        return tuple(note for note in notes if note)

    def _path(self) -> Path:
        """The directory of the run."""
        if self._named is not None:
            return self._named
        runs = store.runs_dir(None if self._runs_dir is None else str(self._runs_dir), make=True).absolute()
        return runs / store.new_run_id(name_of_words(shlex.split(_command())), runs)


def print_report(path: Path) -> None:
    """Print the report of a run, by a process of its own."""
    folders = dict.fromkeys(str(Path(str(package.__file__)).parents[1]) for package in (lorameter, kernels_check))
    search = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-m", "lorameter.cli", "report", str(path)]
    try:
        subprocess.run(command, env=variables, check=False, timeout=REPORT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"run {path.name} is written, and its report was not printed: {said_by(error)}")


def _command() -> str:
    written = os.environ.get(COMMAND) or (command_of(Path(run)) if (run := os.environ.get(RUN)) else "")
    return written or own_command()


def _counts_of(training: TrainingInfo) -> dict[str, float]:
    """What is known before the first step, as values of the record."""
    names = ("trainable_parameters", "total_parameters", "accumulation", "ranks")
    counts = {name: getattr(training, name) for name in names} | {"threads": torch.get_num_threads()}
    return {name: float(count) for name, count in counts.items() if count is not None}


def _device_of(training: TrainingInfo) -> str:
    if training.module is None:
        return "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    return str(device_of(training.module))
