"""Tests of a script's training as a run on disk.

Tests that an error of the meter is printed and ends the measurement, not the training.

Tests of several ranks: the slowest rank of each timed step counts.
"""

import dataclasses
import json
import sys

import msgspec
import pytest

from kernels_check import Check
from lorameter.attach import measures
from lorameter.attach.launch import REQUIRE, RUN, WRAP, finalize_run
from lorameter.attach.observer import ErrorGuard, NotMeasuredError, StepReading, TrainingInfo, UnendedError
from lorameter.attach.writer import Writer
from lorameter.records import store


def training(**changes):
    plain = TrainingInfo(
        source="loop", model=None, planned_steps=None, trainable_parameters=6, total_parameters=6,
        accumulation=2,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def reading(number, time_s=0.1, **more):
    plain = {"sequences": 2, "real_tokens": 24, "padded_tokens": 32, "loss": 2.0, "forward_time_s": 0.04}
    return StepReading(number=number, step_time_s=time_s, cpu_time_s=time_s, **plain | more)


CHECKS = (
    Check(path="base.bits", required=4, observed=4, status="active", reason="4 bits"),
    Check(path="base.frozen", required=None, observed=True, status="active", reason="unchanged"),
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that reports a training to a writer and returns the run, the writer and its replies."""
    names = iter(range(100))

    def report(readings, *, error=None, end=True, require=None, facts=None):
        path = tmp_path / "runs" / f"run-{next(names)}"
        monkeypatch.setenv(RUN, str(path))
        monkeypatch.setenv(WRAP, str(tmp_path))
        (tmp_path / "command").write_text("python train.py --r 8")
        monkeypatch.setenv(REQUIRE, json.dumps(require or {}))
        writer = Writer()
        answers = [writer.begin(facts or training())]
        answers += [writer.step(one) for one in readings]
        if end:
            writer.end(error)
        return store.read_run(str(path), path.parent), writer, answers

    return report


def steps(count, *, watched=CHECKS, **more):
    """Return steps with the eighth one watched: one first step, a warm-up of six, the watched step, and timed steps."""
    return [reading(n, checks=watched if n == 8 else None, **more) for n in range(1, count + 1)]


def test_steps_become_the_samples_of_a_trial(write):
    """The first step is a value, six are the warm-up, one is watched and has no time, and the others are timed."""
    run, _, answers = write(steps(20))
    (record,) = run.records
    assert (run.state, record.status, record.name, record.trial) == ("complete", "ok", "train", "r0-train")
    assert [index for index, answer in enumerate(answers) if answer.watch is not None] == [7]
    assert record.values["first_step_time_s"] == 0.1
    assert len(record.samples["warmup_step_time_s"]) == 6
    assert record.samples["step_time_s"] == (0.1,) * 12
    assert record.samples["turn_padded_tokens"] == (8.0,) * 12
    assert record.samples["forward_time_s"] == (0.04,) * 12
    assert "data_time_s" not in record.samples
    assert record.turn_lengths == (1,) * 12
    assert (record.values["training_steps"], record.values["accumulation"]) == (20.0, 2.0)
    assert [check["path"] for check in record.checks] == ["base.bits", "base.frozen"]
    assert record.memory["host_peak_train_bytes"] > 0
    assert run.manifest.study["variants"][0]["command"] == "python train.py --r 8"
    assert run.manifest.study["protocol"]["turns"] == 12


def test_an_unmet_requirement_makes_the_trial_invalid(write):
    """A missing watched step makes the trial invalid as well."""
    lacking = (dataclasses.replace(CHECKS[0], observed=16, status="fallback", reason="16 bits"),)
    run, _, _ = write(steps(12, watched=lacking), require={"base.bits": 4})
    assert (run.records[0].status, run.records[0].failure.kind) == ("invalid", "RequiredPathNotActive")
    run, _, _ = write(steps(12, watched=None), require={"base.bits": 4})
    assert (run.records[0].status, run.records[0].failure.kind) == ("invalid", "RequiredPathNotSeen")


def test_an_unmet_requirement_of_the_script_makes_the_trial_invalid(write):
    """The watched step must meet the script's requirements; a requirement on the command line takes precedence."""
    lacking = (dataclasses.replace(CHECKS[0], observed=16, status="fallback", reason="16 bits"),)
    run, _, answers = write(steps(12, watched=lacking), facts=training(required={"base.bits": 4}))
    assert (run.records[0].status, run.records[0].failure.kind) == ("invalid", "RequiredPathNotActive")
    assert [answer.watch for answer in answers if answer.watch is not None] == [{"base.bits": 4}]
    assert run.manifest.study["requirements"] == {"base.bits": 4}
    both = training(required={"base.bits": 16, "base.frozen": True})
    _, _, answers = write(steps(12), facts=both, require={"base.bits": 4})
    assert answers[7].watch == {"base.bits": 4, "base.frozen": True}


@pytest.mark.parametrize("source", ["optimizer", "trainer"])
@pytest.mark.parametrize("code", [0, 3])
def test_an_unseen_end_is_judged_by_the_exit_code(write, source, code):
    """An unfinished Trainer is crashed for any exit code; a loop without a meter may have ended as planned, unless the
    code says otherwise."""
    run, writer, _ = write(steps(12), end=False, facts=training(source=source))
    error = UnendedError("the process has ended before its training did") if source == "trainer" else None
    writer.end(error, seen=False)
    assert finalize_run(run.path, code, run.path.parent, required=False) == bool(code or error)
    (record,) = store.read_run(str(run.path), run.path.parent).records
    kind = "UnendedError" if error else "ProcessDied"
    assert (record.status, record.failure and record.failure.kind) == (
        ("crashed", kind) if code or error else ("ok", None)
    )
    assert record.values["ended_unseen"] == 1.0
    assert len(record.samples["step_time_s"]) == 4
    assert not record.notices


@pytest.mark.parametrize("code", [0, 3])
def test_an_observed_end_counts_with_any_exit_code(write, code):
    """An exit code other than 0 does not change the record."""
    run, _, _ = write(steps(12))
    assert not finalize_run(run.path, code, run.path.parent, required=False)
    (record,) = store.read_run(str(run.path), run.path.parent).records
    assert (record.status, "ended_unseen" in record.values) == ("ok", False)
    assert not record.notices


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ValueError("mine"), "crashed", "ValueError"),
        (KeyboardInterrupt(), "interrupted", "Interrupted"),
        (RuntimeError("CUDA out of memory."), "oom", "RuntimeError"),
        (OSError(28, "No space left on device"), "interrupted", "Refused"),
    ],
)
def test_an_error_ends_the_trial_and_keeps_its_steps(write, error, status, kind):
    """The steps are kept, and the traceback is in the log."""
    run, _, _ = write(steps(15), error=error)
    (record,) = run.records
    assert (record.status, record.failure.kind) == (status, kind)
    assert len(record.samples["step_time_s"]) == 7


def test_a_loss_that_is_not_a_number_makes_the_trial_invalid(write):
    """The message has the step."""
    readings = steps(15)
    readings[9] = msgspec.structs.replace(readings[9], loss=float("nan"))
    run, _, _ = write(readings)
    (record,) = run.records
    assert (record.status, record.failure.kind) == ("invalid", "LossNotFinite")
    assert "step 10" in record.failure.message


def test_a_training_that_is_too_short_has_no_result(write):
    """All its steps are warm-up."""
    run, _, _ = write(steps(4))
    assert (run.records[0].status, run.records[0].failure.kind) == ("invalid", "NothingTimed")


LARGE_BYTES = 64 << 20


def take_memory():
    """Allocate and touch a block and free it at once, so that it goes back to the kernel."""
    assert len(b"x" * LARGE_BYTES) == LARGE_BYTES


def test_phases_have_peaks_of_their_own(write, tmp_path, monkeypatch):
    """Memory of training, evaluation or saving counts only for its own phase."""
    path = tmp_path / "phases"
    monkeypatch.setenv(RUN, str(path))
    writer = Writer()
    writer.begin(training())
    for one in steps(12):
        writer.step(one)
    for phase in ("evaluate", "save", "train"):
        writer.phase(phase)
        if phase == "evaluate":
            take_memory()
    writer.end(None)
    run = store.read_run(str(path), path.parent)
    memory = run.records[0].memory
    peaks = {phase: memory[f"host_peak_{phase}_bytes"] for phase in ("train", "evaluate", "save")}
    assert {name for name in memory if name.startswith("host_peak")} == {f"host_peak_{one}_bytes" for one in peaks}
    assert peaks["evaluate"] >= max(peaks["train"], peaks["save"]) + LARGE_BYTES // 2
    assert any("while training" in note and "evaluating" in note for note in run.manifest.study["notes"])


def test_a_second_process_of_a_command_is_not_followed(write, monkeypatch):
    """The first process claims the directory of the run."""
    run, _, _ = write(steps(12))
    monkeypatch.setenv(RUN, str(run.path))
    with pytest.raises(Exception, match="another process of this command is measured"):
        Writer().begin(training())


def test_a_command_that_is_invalid_in_a_study_is_followed(tmp_path, monkeypatch):
    """The run is named after the command, and the manifest stores only its program."""
    monkeypatch.delenv(RUN, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", ">", "it's"])
    writer = Writer(runs_dir=tmp_path)
    for call, argument in ((writer.begin, training()), *((writer.step, one) for one in steps(12)), (writer.end, None)):
        call(argument)
    (path,) = store.list_runs(tmp_path)
    run = store.read_run(str(path), tmp_path)
    assert (path.name.split("-")[2], run.records[0].status) == ("train", "ok")
    assert run.manifest.study["variants"][0]["command"] == "python"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "expected", "never"),
    [
        (NotMeasuredError("another process of it is"), "this training is not measured: another process", "has failed"),
        (OSError("no room left"), "the measurement failed and has stopped; the training", "is not measured"),
    ],
)
def test_an_error_is_printed_once(capfd, error, expected, never):
    """A failure and a training that cannot be observed are each printed once, and nothing is called afterwards."""
    errors = []
    guard = ErrorGuard(errors.append)
    for _ in range(2):
        assert guard.run(fail, error) is None
    assert guard.run(len, "never called") is None
    text = capfd.readouterr().err
    assert text.count(expected) == 1
    assert never not in text
    assert errors == [error]
    assert not guard.is_working


def test_exit_and_interrupt_are_raised_through_the_guard():
    """SystemExit and KeyboardInterrupt are raised and are not errors of the meter."""
    guard = ErrorGuard()
    for wish in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(wish)):
            guard.run(fail, wish)
    assert guard.is_working


CHECK = Check(path="mode", required=None, observed="train", status="active", reason="seen")
WATCHED = 8
"""One step, a warm-up of six, and the watched step."""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that reports steps on two ranks and returns the record; step n takes n seconds on rank 0, and a
    hundred times that on rank 1 if n is even."""
    monkeypatch.setenv(RUN, str(tmp_path / "run"))
    monkeypatch.setattr(measures, "WAIT_S", 0.2)

    def run(steps, *, other=None):
        training = TrainingInfo(
            source="loop", model=None, planned_steps=None, trainable_parameters=6,
            total_parameters=6, accumulation=1, ranks=2,
        )  # fmt: skip
        writers = [Writer(), Writer()]
        for rank, writer in enumerate(writers):
            writer.begin(dataclasses.replace(training, rank=rank))
            for number in range(1, (steps if other is None or not rank else other) + 1):
                time_s = number * (100.0 if rank and not number % 2 else 1.0) if number > WATCHED else 1.0
                checks = (CHECK,) if number == WATCHED and not rank else None
                writer.step(StepReading(
                    number=number, step_time_s=time_s, cpu_time_s=0.0, checks=checks, sequences=1,
                    real_tokens=number * (rank + 1), padded_tokens=3 * number,
                ))  # fmt: skip
        writers[1].end(None)
        writers[0].end(None)
        (record,) = store.read_run(str(tmp_path / "run"), tmp_path).records
        return record

    return run


def test_first_warm_up_and_watched_steps_are_left_out_of_both(measure):
    """Steps of both ranks are matched by their number."""
    timed = range(WATCHED + 1, 14)
    record = measure(13)
    assert record.samples["step_time_s"] == tuple(n * (1.0 if n % 2 else 100.0) for n in timed)
    assert record.samples["turn_tokens"] == tuple(3.0 * n for n in timed)
    assert record.samples["turn_sequences"] == (2.0,) * len(timed)


def test_a_rank_that_saw_fewer_steps_was_not_seen(measure):
    """Its steps may not match; a notice names the rank, and the tokens of all ranks are unknown."""
    record = measure(12, other=11)
    assert [notice.code for notice in record.notices] == ["rank-unseen"]
    assert record.samples["step_time_s"] == (9.0, 10.0, 11.0, 12.0)
    assert not [name for name in record.samples if name.startswith("turn_")]
