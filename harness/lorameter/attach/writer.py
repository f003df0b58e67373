"""The observer that writes a script's training as a run of lorameter on disk.

It asks for one step to be watched, the first after the warm-up, and for the next one where that left something unknown.
What it does itself it does between steps, where no step's time is: a look at the machine where a stretch of training
begins and ends, and each step to the disk.

The run is claimed by making its directory, which one process can do; a second one is not followed. The record is
written when the training begins and when it has ended, and each step as it comes, so that a process that is killed
leaves what it had measured until then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

import kernels_check
import lorameter
from lorameter.attach.attachment import device_of
from lorameter.attach.environment import REQUIRE, RUN, read_command
from lorameter.attach.measures import Energy, Peaks, Work
from lorameter.attach.observer import (
    NotFollowedError,
    ObserverReply,
    Phase,
    Source,
    StepReading,
    TrainingInfo,
    say,
)
from lorameter.attach.samples import MOST_TIMED, UNSEEN_END, Ranks, StepSamples, exit_status, tokens_in
from lorameter.errors import UsageError, said_by
from lorameter.machine import provenance
from lorameter.machine.telemetry import Telemetry
from lorameter.records import codec, store
from lorameter.records.record import UNDER_WAY, Failure, Notice, TrialRecord, find_unmet
from lorameter.records.store import Manifest, RunWriter
from lorameter.records.trials import STEPS, Step, step_line_of
from lorameter.records.units import format_bytes
from lorameter.records.worker_info import WorkerInfo
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_words
from lorameter.studies.script_study import study_of_command
from lorameter.studies.study import Study

PROTOCOL = Protocol(phases=("train",), replicates=1, turns=1, steps_per_turn=1, allow_disturbed=True)
"""A training is measured as it comes; how many steps it has is known at its end."""


class RunFile:
    """One run that is being written. Holds its lock until it is finished."""

    def __init__(
        self,
        path: Path,
        *,
        command: str,
        device: str,
        requirements: Mapping[str, Any],
        values: dict[str, float],
    ) -> None:
        """Claim the directory, and write the manifest and the record with these values.

        Raises:
            NotFollowedError: another process has claimed it.
            InvalidRunError: the disk refuses.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise NotFollowedError("another process of this command is followed") from None
        self.path = path
        self._held = contextlib.ExitStack()
        self._held.enter_context(store.writing(path))
        self.study = study_of(command, dict(requirements))
        (self.variant,) = self.study.variants
        self._begun_s, self._begun_unix_s = time.monotonic(), time.time()
        self._manifest = self._first_manifest(device)
        self._writer = RunWriter(path.parent, self._manifest)
        self._last: TrialRecord | None = None
        self._steps = self._held.enter_context((path / STEPS).open("ab", buffering=0))
        failure = Failure(phase="train", kind=UNDER_WAY, message="under way when this was written")
        self._writer.append(self.record(status="interrupted", failure=failure, values=values))

    def _first_manifest(self, device: str) -> Manifest:
        machine = provenance.probe_machine()
        if device == "cpu":
            machine = dataclasses.replace(
                machine, device="cpu", device_name=machine.cpu_model, device_memory_bytes=None
            )
        hello = WorkerInfo(
            harness=provenance.harness_identity(), import_time_s=0.0, device=device.split(":")[0],
            torch=torch.__version__,
        )  # fmt: skip
        facts = provenance.collect(self.study, provenance.read_facts(machine), torch.get_num_threads(), hello)
        return Manifest(
            run=self.path.name,
            study=codec.to_json(self.study),
            phases=("train",),
            interleaving="replicates",
            order=(self.trial,),
            seed=0,
            created_unix_s=self._begun_unix_s,
            provenance=facts,
            fingerprint=provenance.fingerprint(facts),
        )

    @property
    def trial(self) -> str:
        """The name of the one trial."""
        return f"r0-{self.variant.name}"

    @property
    def device_name(self) -> str:
        """As the provenance names it."""
        return str(self._manifest.provenance["device_name"])

    def record(self, **measured: Any) -> TrialRecord:
        """The record of the trial with what was measured; `status` and `failure` among it."""
        return TrialRecord(
            trial=self.trial,
            name=self.variant.name,
            variant=self.variant.id,
            role="variant",
            replicate=0,
            position=0,
            interleaving="replicates",
            seed=0,
            started_unix_s=self._begun_unix_s,
            wall_time_s=time.monotonic() - self._begun_s,
            log=f"logs/{self.trial}.log",
            **measured,
        )

    def add(self, step: Step) -> None:
        """Write what a step adds to the record."""
        self._steps.write(step_line_of(step))

    def finish(self, record: TrialRecord, *, timed: int, notes: tuple[str, ...], notices: tuple[Notice, ...]) -> None:
        """Write the last record, and with it what is known now: how many steps were timed, and what tokens are."""
        log = self.path / record.log
        with contextlib.suppress(OSError):
            said = record.failure.traceback if record.failure is not None else ""
            log.write_text(said or "What the script printed went where it was started.\n", encoding="utf-8")
        protocol = dataclasses.replace(PROTOCOL, turns=max(1, timed))
        study = dataclasses.replace(self.study, protocol=protocol, notes=notes)
        self._manifest = msgspec.structs.replace(self._manifest, study=codec.to_json(study), notices=notices)
        self._write_last(record)
        self._held.close()

    def add_notice(self, notice: Notice) -> None:
        """One more notice of a training that has ended, and whose record is written."""
        if self._last is not None:
            self._write_last(self._last.replaced(notices=(*self._last.notices, notice)))

    def _write_last(self, record: TrialRecord) -> None:
        self._last = record
        writer = RunWriter(self.path.parent, self._manifest)
        writer.append(record)
        writer.finish("interrupted" if not record.settled else "complete")


def study_of(command: str, requirements: dict[str, object]) -> Study:
    """The study of a command that runs already. A line that no study could hold (a program text behind `-c`) is written
    as its program alone."""
    options: dict[str, Any] = {"threads": torch.get_num_threads(), "protocol": PROTOCOL, "requirements": requirements}
    try:
        return study_of_command(command, **options)
    except UsageError:
        return study_of_command(shlex.join(shlex.split(command)[:1]), **options)


MOST_WATCHED = 2
"""Steps that are watched: what a change of weights becomes shows in the step after it."""
REPORT_TIMEOUT_S = 120.0
EVERY_TWO_SECONDS = ObserverReply(flush_interval_s=1.0)
"""So much of a training is lost by a process that is killed."""
AT_ONCE = ObserverReply()


class Writer:
    """A `TrainingObserver` that writes a run. Without arguments the environment configures it."""

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
            report: whether the report is printed at the end; None: unless the process is wrapped.
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
            self._ranks = Ranks(path, training)
            return AT_ONCE
        device = _device_of(training)
        if training.ranks > 1:
            self._ranks = Ranks(path, training)
        self._values = _counts_of(training)
        self._file = RunFile(
            path, command=read_command(), device=device, requirements=self._require, values=dict(self._values)
        )
        self._peaks, self._watch, self._energy = Peaks(device), Telemetry("train", device), Energy(device)
        self._read_s = time.monotonic()
        self._peaks.begin()
        return AT_ONCE

    def step(self, reading: StepReading) -> ObserverReply:
        """One more step; the first after the warm-up is watched."""
        if self._ranks is not None:
            self._ranks.add(reading)
        if self._file is None:
            return AT_ONCE
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
        """What is known in addition to the steps, with what takes a system call once a second."""
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
        if self._training is None:
            return
        if self._ranks is not None and self._training.rank:
            self._ranks.write()
        if self._file is None:
            return
        self._end_stretch()
        status, failure = exit_status(error, self._gathered, self._peaks.phase)
        if status == "ok" and (failure_of_checks := find_unmet(self._checks or (), self._require)):
            status, failure = "invalid", failure_of_checks
        if self._gathered.steps > MOST_TIMED:
            self._notices.append(not_kept(self._gathered.steps))
        measured = self._measured()
        measured["values"] |= {} if seen else {UNSEEN_END: 1.0}
        measured["values"] |= self._work.values(self._gathered, self._file.device_name)
        if self._ranks is not None:
            measured["samples"] = self._gathered.samples(
                self._ranks.together(self._gathered.timed_steps, self._notices)
            )
            measured["samples"].pop("warmup_tokens", None)  # of this rank alone
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
        return runs / store.new_run_id(name_of_words(shlex.split(read_command())), runs)


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


def _counts_of(training: TrainingInfo) -> dict[str, float]:
    """What is known before the first step, as values of the record."""
    names = ("trainable_parameters", "total_parameters", "accumulation", "ranks")
    counts = {name: getattr(training, name) for name in names} | {"threads": torch.get_num_threads()}
    return {name: float(count) for name, count in counts.items() if count is not None}


def _device_of(training: TrainingInfo) -> str:
    if training.module is None:
        return "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    return str(device_of(training.module))


SEEN_BY = {
    "trainer": "steps are the Trainer's: from the end of one to the end of the next, evaluation and saving apart",
    "loop": "steps are those that the loop names",
    "optimizer": "steps lie between two updates of the optimizer; the first update is before the first step",
}
FORWARD = "forward lasts from the wait for data, or the last update or backward pass, until backward begins"
NO_TOKENS = {
    "trainer": "no tokens are known: the Trainer's batches hold no token ids",
    "loop": "no tokens are known: the loop's batches hold no token ids",
    "optimizer": "no tokens are known: no DataLoader of torch yielded batches with token ids",
}


def say_missing(source: Source, samples: Mapping[str, Any]) -> tuple[str, ...]:
    """How forward passes were timed, and that no tokens were seen."""
    forward = (FORWARD,) if source != "trainer" and "forward_time_s" in samples else ()
    return forward if "turn_tokens" in samples or not samples else (*forward, NO_TOKENS[source])


def say_seen(checks: Sequence[Mapping[str, Any]] | None) -> str:
    """What the watched step was seen to run, whatever was required of it."""
    if checks is None:
        return "no step was watched"
    found = [f"{one['path']} {one['observed']}" for one in checks if one["observed"] is not None]
    return (
        f"seen in a step after the warm-up: {', '.join(found)}" if found else "a step was watched, and nothing was seen"
    )


def say_peaks(memory: Mapping[str, int]) -> str:
    """The peak of each phase in words, where there is more than training."""
    where = "device_peak_allocated" if "device_peak_allocated_train_bytes" in memory else "host_peak"
    words = {"train": "training", "evaluate": "evaluating", "save": "saving"}
    found = [
        f"{word} {format_bytes(memory[name])}"
        for phase, word in words.items()
        if (name := f"{where}_{phase}_bytes") in memory
    ]
    return f"peak memory while {', '.join(found)} ({where.split('_')[0]})" if len(found) > 1 else ""


def second_training(training: TrainingInfo) -> Notice:
    """A second training of one process is not measured."""
    return Notice(
        code="second-training",
        message=f"a second training began in the same process (seen by its {training.source}); the first one is what "
        "was measured.",
        remedy="Measure each training in a process of its own.",
    )


def not_kept(steps: int) -> Notice:
    """Of a long training not all steps are kept."""
    return Notice(
        code="timed-steps-truncated",
        message=f"the training had {steps} steps; its first {MOST_TIMED} timed ones are kept.",
        remedy="Nothing is wrong; later steps are in the script's own log.",
    )
