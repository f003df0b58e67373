"""The observer that writes a script's training to disk as a run.

It requests a check of the first step after the warm-up, and of the next step if the first left something unknown. It
works only between steps, outside all step times: it reads the machine's state at the ends of each stretch of training,
and writes each step.

A process claims the run by creating its directory, which succeeds in one process only; trainings of other processes are
not measured. The record is written when the training begins and when it ends, and each step when it is reported, so a
killed process leaves the steps measured until then.
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
from lorameter.attach.launch import REQUIRE, RUN, UNSEEN_END, read_command, tokens_in
from lorameter.attach.measures import MAX_TIMED, Energy, Peaks, Ranks, StepFlops, StepSamples, describe_end
from lorameter.attach.observer import (
    NotFollowedError,
    ObserverReply,
    Phase,
    Source,
    StepReading,
    TrainingInfo,
    print_notice,
)
from lorameter.attach.sources import device_in_use, device_of
from lorameter.errors import UsageError, format_error
from lorameter.machine import provenance
from lorameter.machine.telemetry import Telemetry
from lorameter.records import codec, store
from lorameter.records.record import UNDER_WAY, Failure, Notice, Status, TrialRecord, WorkerInfo, find_unmet
from lorameter.records.store import Manifest, RunWriter
from lorameter.records.trials import STEPS, Step, encode_step
from lorameter.records.units import format_bytes, format_count
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_words
from lorameter.studies.script_study import study_of_command
from lorameter.studies.study import Study

PROTOCOL = Protocol(phases=("train",), replicates=1, turns=1, steps_per_turn=1, allow_disturbed=True)
"""A training is measured while it runs; its number of steps is known only at its end."""


class RunFile:
    """The run file of one training. Holds the run's lock until the training is finished."""

    def __init__(self, path: Path, *, device: str, requirements: Mapping[str, Any], values: dict[str, float]) -> None:
        """Claim the directory, and write the manifest and the record with these values.

        Raises:
            NotFollowedError: another process has claimed it.
            InvalidRunError: writing failed.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise NotFollowedError("another process of this command is followed") from None
        self.path = path
        self._held = contextlib.ExitStack()
        self._held.enter_context(store.lock_run(path))
        self.study = study_of(read_command(), dict(requirements))
        (self._variant,) = self.study.variants
        self._begun_s, self._begun_unix_s = time.monotonic(), time.time()
        facts = describe_place(self.study, device)
        self.device_name = str(facts["device_name"])
        self._manifest = Manifest(
            run=path.name,
            study=codec.to_json(self.study),
            phases=("train",),
            interleaving="replicates",
            order=(f"r0-{self._variant.name}",),
            seed=0,
            created_unix_s=self._begun_unix_s,
            provenance=facts,
            fingerprint=provenance.fingerprint(facts),
        )
        self.steps = self._held.enter_context((path / STEPS).open("ab", buffering=0))
        failure = Failure(phase="train", kind=UNDER_WAY, message="under way when this was written")
        begun = self.record(status="interrupted", failure=failure, values=values)
        RunWriter(path.parent, self._manifest).append(begun)

    def record(self, **measured: Any) -> TrialRecord:
        """The record of the trial with the measured values, including `status` and `failure`."""
        (trial,) = self._manifest.order
        return TrialRecord(
            trial=trial,
            name=self._variant.name,
            variant=self._variant.id,
            role="variant",
            replicate=0,
            position=0,
            interleaving="replicates",
            seed=0,
            started_unix_s=self._begun_unix_s,
            wall_time_s=time.monotonic() - self._begun_s,
            log=f"logs/{trial}.log",
            **measured,
        )

    def finish(self, record: TrialRecord, notes: Sequence[str]) -> None:
        """Write the last record, the number of timed steps, and notes on the numbers."""
        with contextlib.suppress(OSError):
            text = record.failure.traceback if record.failure is not None else ""
            log = text or "The output of the script went to its terminal.\n"
            (self.path / record.log).write_text(log, encoding="utf-8")
        protocol = dataclasses.replace(PROTOCOL, turns=max(1, len(record.turn_lengths)))
        study = dataclasses.replace(self.study, protocol=protocol, notes=tuple(notes))
        self._manifest = msgspec.structs.replace(self._manifest, study=codec.to_json(study))
        self.write_last(record)
        self._held.close()

    def write_last(self, record: TrialRecord) -> None:
        """Write the record of a training that has ended."""
        RunWriter(self.path.parent, self._manifest).finish_with(record)


def study_of(command: str, requirements: dict[str, object]) -> Study:
    """The study of a running command. A command line that no study can hold (a program text behind `-c`) is shortened
    to its program."""
    options: dict[str, Any] = {"threads": torch.get_num_threads(), "protocol": PROTOCOL, "requirements": requirements}
    try:
        return study_of_command(command, **options)
    except UsageError:
        return study_of_command(shlex.join(shlex.split(command)[:1]), **options)


def describe_place(study: Study, device: str) -> dict[str, Any]:
    """The provenance of a training on this device (a torch device type)."""
    machine = provenance.probe_machine()
    if device == "cpu":
        machine = dataclasses.replace(machine, device="cpu", device_name=machine.cpu_model, device_memory_bytes=None)
    hello = WorkerInfo(
        harness=provenance.harness_identity(), import_time_s=0.0, device=device.split(":")[0], torch=torch.__version__
    )
    return provenance.collect(study, provenance.read_facts(machine), torch.get_num_threads(), hello)


MAX_WATCHED = 2
"""Maximum number of watched steps: the effect of changed weights shows in the next step."""
REPORT_TIMEOUT_S = 120.0
FLUSH_INTERVAL_S = 1.0
"""Maximum seconds of training that a killed process loses."""
AT_ONCE = ObserverReply()


class Writer:
    """A `TrainingObserver` that writes a run."""

    def __init__(self, *, runs_dir: str | Path | None = None, report: bool = False) -> None:
        """Nothing is written before the training begins.

        Args:
            runs_dir: where the run is written; None: from the environment.
            report: whether the report is printed at the end.
        """
        self._runs_dir = None if runs_dir is None else str(runs_dir)
        self._require: dict[str, Any] = json.loads(os.environ.get(REQUIRE, "{}"))
        self._report = report
        self._training: TrainingInfo | None = None
        self._file: RunFile | None = None
        self._last: TrialRecord | None = None
        """The last record, after it has been written."""
        self._ranks: Ranks | None = None
        self._notices: list[Notice] = []
        self._checks: tuple[dict[str, Any], ...] | None = None
        self._watched = 0
        self._in_stretch = False
        """Whether steps are being timed, and the machine's state is being recorded."""
        self._values: dict[str, float] = {}

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Claim the run; a second training in the same process is only noted."""
        if self._training is not None:
            self._notices.append(
                Notice(
                    code="second-training",
                    message=f"a second training began in the same process (seen by its {training.source}); the first "
                    "one is what was measured.",
                    remedy="Measure each training in a process of its own.",
                )
            )
            if self._last is not None and self._file is not None:
                self._file.write_last(self._last.replaced(notices=tuple(self._notices)))
            return AT_ONCE
        self._training = training
        self._require = {**training.required, **self._require}  # requirements of the command take precedence
        path = self._path()
        if training.ranks > 1:
            self._ranks = Ranks(path, training)
        if training.rank:
            return AT_ONCE
        device = str(device_of([*training.module.parameters()])) if training.module is not None else device_in_use()
        self._samples, self._work = StepSamples(training.planned_steps), StepFlops(training)
        self._values = training.counts | {"threads": float(torch.get_num_threads())}
        self._file = RunFile(path, device=device, requirements=self._require, values=dict(self._values))
        self._peaks, self._telemetry, self._energy = Peaks(device), Telemetry("train", device), Energy(device)
        self._read_s = time.monotonic()
        return AT_ONCE

    def _path(self) -> Path:
        """The directory of the run."""
        if named := os.environ.get(RUN):
            return Path(named)
        runs = store.runs_dir(self._runs_dir, make=True).absolute()
        return runs / store.new_run_id(name_of_words(shlex.split(read_command())), runs)

    def step(self, reading: StepReading) -> ObserverReply:
        """Add a step; request a check of the first step after the warm-up."""
        if self._ranks is not None:
            self._ranks.add(reading)
        if self._file is None:
            return AT_ONCE
        if reading.checks is not None:
            self._watched += 1
            self._checks = tuple(codec.to_json(check) for check in reading.checks)
        was_warm = self._samples.warm
        columns = self._samples.add(reading)
        self._file.steps.write(encode_step(Step(samples=columns, **self._so_far())))
        if self._samples.warm and (not was_warm or self._watch_again(reading)):
            return ObserverReply(watch=self._require)
        if not was_warm:
            return AT_ONCE
        if not self._in_stretch:
            self._begin_stretch()
        elif reading.checks is None:
            self._energy.step(reading)
        return ObserverReply(flush_interval_s=FLUSH_INTERVAL_S)

    def _watch_again(self, reading: StepReading) -> bool:
        """Whether a check of the next step may decide what the first left unknown."""
        if reading.checks is None or self._watched >= MAX_WATCHED:
            return False
        from kernels_check.judges.paths import PATHS

        unknown = {check.path for check in reading.checks if check.status == "unknown"}
        return any(PATHS[path].further_steps for path in unknown & PATHS.keys())

    def _so_far(self) -> dict[str, Any]:
        """Values that are known between steps; those that need a system call are read once a second."""
        now = time.monotonic()
        if now - self._read_s < FLUSH_INTERVAL_S:
            return {"values": self._samples.values}
        self._read_s = now
        return {"values": self._samples.values | self._energy.values(), "memory": self._peaks.so_far()}

    def _begin_stretch(self) -> None:
        self._in_stretch = True
        self._telemetry.begin()
        self._energy.begin()

    def _end_stretch(self) -> None:
        if self._in_stretch:
            self._in_stretch = False
            self._energy.end()
            self._values |= self._telemetry.end()

    def phase(self, phase: Phase) -> None:
        """Start a new memory peak for the phase; evaluation and saving end the stretch of training."""
        if self._file is None or self._last is not None:
            return
        if phase != "train":
            self._end_stretch()
        self._peaks.enter(phase)
        if phase == "train" and self._samples.timed:
            self._begin_stretch()

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Write the last record, and print the report."""
        if self._ranks is not None and self._file is None:
            self._ranks.write()
        if self._file is None or self._training is None or self._last is not None:
            return
        self._end_stretch()
        status, failure = self._judge(error)
        samples = self._samples.samples()
        if self._ranks is not None:
            samples = self._ranks.merge(samples, self._samples.timed, self._notices)
        if (steps := int(self._samples.values["training_steps"])) > MAX_TIMED:
            self._notices.append(
                Notice(
                    code="timed-steps-truncated",
                    message=f"the training had {steps} steps; its first {MAX_TIMED} timed ones are kept.",
                    remedy="Nothing is wrong; later steps are in the script's own log.",
                )
            )
        values = self._values | self._samples.values | self._energy.values() | ({} if seen else {UNSEEN_END: 1.0})
        record = self._file.record(
            status=status,
            failure=failure,
            samples=samples,
            turn_lengths=(1,) * len(self._samples.timed),
            values=values | self._work.values(self._samples.samples(), self._file.device_name),
            memory=self._peaks.so_far(),
            tokens=tokens_in(samples),
            checks=self._checks or (),
            notices=tuple(self._notices),
        )
        self._file.finish(record, describe_measuring(self._training.source, record, self._samples, self._checks))
        self._last = record  # from here on a failure leaves a complete run
        if self._report:
            print_report(self._file.path)
        else:
            print_notice(f"run {self._file.path.name} is written")

    def _judge(self, error: BaseException | None) -> tuple[Status, Failure | None]:
        """The status of a training that ended with this error, and the failure if it is not ok."""
        if error is not None:
            return describe_end(error, self._peaks.phase)
        failure = self._samples.not_finite
        if failure is None and not self._samples.timed:
            steps = format_count(int(self._samples.values["training_steps"]), "step")
            message = (
                f"the training ended after {steps}: only its first step, its warm-up and watched steps, so "
                "none is timed. Train for more steps."
            )
            failure = Failure(phase="warm_up", kind="NothingTimed", message=message)
        failure = failure or find_unmet(self._checks or (), self._require)
        return ("ok", None) if failure is None else ("invalid", failure)


def print_report(path: Path) -> None:
    """Print the report of a run in a separate process."""
    folders = dict.fromkeys(str(Path(str(package.__file__)).parents[1]) for package in (lorameter, kernels_check))
    search = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-m", "lorameter.cli", "report", str(path)]
    try:
        subprocess.run(command, env=variables, check=False, timeout=REPORT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        print_notice(f"run {path.name} is written, and its report was not printed: {format_error(error)}")


SEEN_BY: Mapping[Source, str] = {
    "trainer": "steps are the Trainer's: from the end of one to the end of the next, without evaluation and saving",
    "loop": "steps are those that the loop names",
    "optimizer": "steps lie between two updates of the optimizer; the first update is before the first step",
}
NO_TOKENS = "no tokens are known: no batch that was seen holds token ids"
PHASES = {"train": "training", "evaluate": "evaluating", "save": "saving"}


def describe_measuring(
    source: Source, record: TrialRecord, samples: StepSamples, checks: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    """Notes on the measurement: how steps are delimited, how tokens are counted, the checks of the watched step, and
    the peak memory of each phase if there are several."""
    notes = [SEEN_BY[source]]
    notes += [NO_TOKENS] if record.samples and "turn_tokens" not in record.samples else []
    notes += samples.conventions
    where = "device_peak_allocated" if "device_peak_allocated_train_bytes" in record.memory else "host_peak"
    sizes = {word: record.memory.get(f"{where}_{phase}_bytes") for phase, word in PHASES.items()}
    peaks = [f"{word} {format_bytes(size)}" for word, size in sizes.items() if size is not None]
    notes += [f"peak memory while {', '.join(peaks)} ({where.split('_')[0]})"] if len(peaks) > 1 else []
    found = [f"{one['path']} {one['observed']}" for one in checks or () if one["observed"] is not None]
    watched = (
        f"seen in a step after the warm-up: {', '.join(found)}"
        if found
        else "a step was watched, but nothing was observed"
    )
    return [*notes, "no step was watched" if checks is None else watched]
