"""The observer that writes a script's training to disk as a run.

The first step is reported separately, the warm-up ends when the step times are steady, the next step is watched by
kernels_check and has no time, and the rest is timed. The observer works only between steps, outside all step times: it
reads the machine's state at the ends of each stretch of training, and writes each step.

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
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from lorameter.attach.launch import REQUIRE, RUN, UNSEEN_END, WRAP, read_command, tokens_in
from lorameter.attach.measures import (
    MAX_TIMED,
    Columns,
    Energy,
    Peaks,
    Ranks,
    StepFlops,
    complete_columns,
    describe_end,
    loss_not_finite,
    turn_columns,
    untimed_columns,
)
from lorameter.attach.observer import (
    NotMeasuredError,
    ObserverReply,
    Phase,
    Source,
    StepReading,
    TrainingInfo,
    print_notice,
)
from lorameter.errors import UsageError, format_error
from lorameter.machine import provenance
from lorameter.machine.telemetry import Telemetry, gpu_opener
from lorameter.records import codec, store
from lorameter.records.record import UNDER_WAY, Failure, Notice, Status, TrialRecord, WorkerInfo, find_unmet
from lorameter.records.store import Manifest, RunWriter
from lorameter.records.trials import STEPS, Step, encode_step
from lorameter.records.units import format_bytes, format_count
from lorameter.stats import is_steady, is_warm
from lorameter.studies.commands import study_of_command
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_words
from lorameter.studies.study import Study

PROTOCOL = Protocol(phases=("train",), replicates=1, turns=1, steps_per_turn=1, allow_disturbed=True)
"""A training is measured while it runs; its number of steps is known only at its end."""


class RunFile:
    """The run file of one training. Holds the run's lock until the training is finished."""

    def __init__(self, path: Path, *, device: str, requirements: Mapping[str, Any], values: dict[str, float]) -> None:
        """Claim the directory, and write the manifest and the record with these values.

        Raises:
            NotMeasuredError: another process has claimed it.
            InvalidRunError: writing failed.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise NotMeasuredError("another process of this command is measured") from None
        self.path = path
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(store.lock_run(path))
        self._study = make_study(read_command(), dict(requirements))
        (variant,) = self._study.variants
        trial, begun_unix_s = f"r0-{variant.name}", time.time()
        self._begun_s = time.monotonic()
        facts = describe_provenance(self._study, device)
        self.device_name = str(facts["device_name"])
        self._manifest = Manifest(
            run=path.name,
            study=codec.to_json(self._study),
            phases=("train",),
            interleaving="replicates",
            order=(trial,),
            seed=0,
            created_unix_s=begun_unix_s,
            provenance=facts,
            fingerprint=provenance.fingerprint(facts),
        )
        self.steps = self._resources.enter_context((path / STEPS).open("ab", buffering=0))
        self.record = TrialRecord(
            trial=trial,
            status="interrupted",
            failure=Failure(phase="train", kind=UNDER_WAY, message="under way when this was written"),
            name=variant.name,
            variant=variant.id,
            role="variant",
            replicate=0,
            position=0,
            interleaving="replicates",
            seed=0,
            started_unix_s=begun_unix_s,
            wall_time_s=time.monotonic() - self._begun_s,
            log=f"logs/{trial}.log",
            values=values,
        )
        """The record of the training before its first step."""
        RunWriter(path.parent, self._manifest).append(self.record)

    def finish(self, record: TrialRecord, notes: Sequence[str]) -> None:
        """Write the last record, the number of timed steps, and notes on the numbers."""
        with contextlib.suppress(OSError):
            text = record.failure.traceback if record.failure is not None else ""
            log = text or "The output of the script went to its terminal.\n"
            (self.path / record.log).write_text(log, encoding="utf-8")
        protocol = dataclasses.replace(PROTOCOL, turns=max(1, len(record.turn_lengths)))
        study = dataclasses.replace(self._study, protocol=protocol, notes=tuple(notes))
        manifest = msgspec.structs.replace(self._manifest, study=codec.to_json(study))
        wall_time_s = time.monotonic() - self._begun_s
        RunWriter(self.path.parent, manifest).finish_with(record.replaced(wall_time_s=wall_time_s))
        self._resources.close()


def make_study(command: str, requirements: dict[str, object]) -> Study:
    """The study of a running command. A command line that no study can hold (a program text behind `-c`) is shortened
    to its program."""
    options: dict[str, Any] = {"threads": torch.get_num_threads(), "protocol": PROTOCOL, "requirements": requirements}
    try:
        return study_of_command(command, **options)
    except UsageError:
        return study_of_command(shlex.join(shlex.split(command)[:1]), **options)


def describe_provenance(study: Study, device: str) -> dict[str, Any]:
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
REPORT_AT_ONCE = ObserverReply()
REPORT_LATER = ObserverReply(flush_interval_s=FLUSH_INTERVAL_S)


class Writer:
    """A `TrainingObserver` that writes a run."""

    _training: TrainingInfo
    _program: Generator[ObserverReply, StepReading, NoReturn]

    def __init__(self, *, runs_dir: str | Path | None = None, report: bool = False) -> None:
        """Nothing is written before the training begins.

        Args:
            runs_dir: where the run is written; None: from the environment.
            report: whether the report is printed at the end.
        """
        self._runs_dir = runs_dir
        self._report = report
        self._required: dict[str, Any] = json.loads(os.environ.get(REQUIRE, "{}"))
        self._run: RunFile | None = None
        """None on ranks other than 0, which write no run, and after the end."""
        self._ranks: Ranks | None = None
        self._columns: Columns = {}
        self._timed: list[int] = []
        """The numbers of the timed steps."""
        self._conventions: dict[str, None] = {}
        """Descriptions of how tokens were counted."""
        self._not_finite: Failure | None = None
        """The failure of the first step whose loss is not finite."""
        self._checks: tuple[dict[str, Any], ...] | None = None
        self._warm = False
        """Whether the following steps are timed."""
        self._in_stretch = False
        """Whether the machine's state is being recorded."""
        self._read_s = 0.0

    def begin(self, training: TrainingInfo) -> ObserverReply:
        """Claim the run."""
        self._training = training
        self._required = {**training.required, **self._required}  # requirements of the command take precedence
        path = self._path()
        if training.ranks > 1:
            self._ranks = Ranks(path, training)
        if training.rank:
            return REPORT_AT_ONCE
        device = training.device
        values = training.counts | {"threads": float(torch.get_num_threads())}
        self._work = StepFlops(training)
        self._run = RunFile(path, device=device, requirements=self._required, values=values)
        self._values = values | {"training_steps": 0.0}
        self._peaks, self._energy = Peaks(device), Energy(device)
        self._telemetry = Telemetry("train", gpu_opener(device))
        self._program = self._measure()
        return next(self._program)

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
        if self._run is None:
            return REPORT_AT_ONCE
        self._conventions |= dict.fromkeys(reading.conventions)
        self._not_finite = self._not_finite or loss_not_finite([reading])
        return self._program.send(reading)

    def _measure(self) -> Generator[ObserverReply, StepReading, NoReturn]:
        """Yields the request for each step, and receives its reading. The warm-up takes at most a third of the
        training."""
        protocol, planned_steps = Protocol(), self._training.planned_steps
        min_steps, max_steps = protocol.warmup_steps_min, protocol.warmup_steps_max
        if planned_steps is not None:
            max_steps = max(min_steps, min(max_steps, planned_steps // 3))
        reading = yield REPORT_AT_ONCE
        self._add_step(reading, untimed_columns("warmup", [reading]), first_step_time_s=reading.step_time_s)
        times: list[float] = []
        while not is_warm(times, min_steps, max_steps):
            reading = yield REPORT_AT_ONCE
            times.append(reading.step_time_s)
            columns: Columns = {"warmup_step_time_s": [reading.step_time_s]}
            self._add_step(reading, columns | untimed_columns("warmup", [reading]))
        for _ in range(MAX_WATCHED):
            reading = yield ObserverReply(watch=self._required)
            self._add_step(reading, {}, warmup_steady=float(is_steady(times)))
            if reading.checks is not None:
                self._checks = tuple(codec.to_json(check) for check in reading.checks)
            if not needs_another_step(reading.checks or ()):
                break
        self._warm = True
        self._begin_stretch()
        while True:
            reading = yield REPORT_LATER
            self._energy.step(reading)
            columns = {}
            if len(self._timed) < MAX_TIMED:
                columns = turn_columns([reading])  # each timed step is its own turn
                self._timed.append(reading.number)
            self._add_step(reading, columns)

    def _add_step(self, reading: StepReading, columns: Columns, **values: float) -> None:
        """Add a step with these samples and values to the record, and write it. Values that need a system call are
        read once a second."""
        assert self._run is not None
        values["training_steps"] = float(reading.number)
        self._values |= values
        for name, samples in columns.items():
            self._columns.setdefault(name, []).extend(samples)
        memory: dict[str, int] = {}
        if time.monotonic() - self._read_s >= FLUSH_INTERVAL_S:
            self._read_s = time.monotonic()
            values |= self._energy.values()
            memory = self._peaks.read()
        step = Step(samples={name: value for name, (value,) in columns.items()}, values=values, memory=memory)
        self._run.steps.write(encode_step(step))

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
        if self._run is not None:
            self._peaks.enter(phase)
            if phase != "train":
                self._end_stretch()
            elif self._warm:
                self._begin_stretch()

    def end(self, error: BaseException | None, *, seen: bool = True) -> None:
        """Write the last record, and print the report."""
        if self._ranks is not None and self._training.rank:
            self._ranks.write()
        if self._run is None:
            return
        self._end_stretch()
        status, failure = self._judge(error)
        samples = complete_columns(self._columns)
        notices: list[Notice] = []
        values = self._values | self._energy.values() | self._work.values(samples, self._run.device_name)
        if self._ranks is not None:
            samples = self._ranks.merge(samples, self._timed, notices)
        if (steps := int(values["training_steps"])) > MAX_TIMED:
            notices.append(
                Notice(
                    code="timed-steps-truncated",
                    message=f"the training had {steps} steps; its first {MAX_TIMED} timed ones are kept.",
                    remedy="Nothing is wrong; later steps are in the script's own log.",
                )
            )
        record = self._run.record.replaced(
            status=status,
            failure=failure,
            samples=samples,
            turn_lengths=(1,) * len(self._timed),
            values=values | ({} if seen else {UNSEEN_END: 1.0}),
            memory=self._peaks.read(),
            tokens=tokens_in(samples),
            checks=self._checks or (),
            notices=tuple(notices),
        )
        self._run.finish(record, describe_measuring(self._training.source, record, self._conventions, self._checks))
        path, self._run = self._run.path, None  # from here on a failure leaves a complete run
        if self._report:
            print_report(path)
        elif not os.environ.get(WRAP):  # the program that wraps the command prints it, wherever the script has printed
            print_notice(f"run {path.name} is written")

    def _judge(self, error: BaseException | None) -> tuple[Status, Failure | None]:
        """The status of a training that ended with this error, and the failure if it is not ok."""
        if error is not None:
            return describe_end(error, self._peaks.phase)
        failure = self._not_finite
        if failure is None and not self._timed:
            steps = format_count(int(self._values["training_steps"]), "step")
            message = (
                f"the training ended after {steps}: only its first step, its warm-up and watched steps, so "
                "none is timed. Train for more steps."
            )
            failure = Failure(phase="warm_up", kind="NothingTimed", message=message)
        failure = failure or find_unmet(self._checks or (), self._required)
        return ("ok", None) if failure is None else ("invalid", failure)


def needs_another_step(checks: Iterable[Any]) -> bool:
    """Whether a check of the next step may decide what these checks leave unknown."""
    from kernels_check.judges.paths import PATHS

    unknown = {check.path for check in checks if check.status == "unknown"}
    return any(PATHS[path].further_steps for path in unknown & PATHS.keys())


def print_report(path: Path) -> None:
    """Print the report of a run in a separate process."""
    command = [sys.executable, "-m", "lorameter.cli", "report", str(path)]
    try:
        subprocess.run(command, check=False, timeout=REPORT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        print_notice(f"run {path.name} is written, and its report was not printed: {format_error(error)}")


STEP_DEFINITIONS: Mapping[Source, str] = {
    "trainer": "steps are the Trainer's: from the end of one to the end of the next, without evaluation and saving",
    "loop": "steps are those that the loop names",
    "optimizer": "steps lie between two updates of the optimizer; the first update is before the first step",
}
NO_TOKENS = "no tokens are known: no batch that was seen holds token ids"
PHASES = {"train": "training", "evaluate": "evaluating", "save": "saving"}


def describe_measuring(
    source: Source, record: TrialRecord, conventions: Iterable[str], checks: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    """Notes on the measurement: how steps are delimited, how tokens are counted, the checks of the watched step, and
    the peak memory of each phase if there are several."""
    notes = [STEP_DEFINITIONS[source]]
    notes += [NO_TOKENS] if record.samples and "turn_tokens" not in record.samples else []
    notes += conventions
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
