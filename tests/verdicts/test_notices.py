"""Tests of the notices of a run: damaged lines, repeated measurements, a constant loss.

Tests of disturbance notices: one for each kind, with the worst trial, the affected number, and the trials to measure
again.

Tests of the validity of a run: report, comparison and baseline use the same answer, with reasons.
"""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.records import codec, store
from lorameter.records.record import DISTURBED, Failure, TrialRecord
from lorameter.studies.study import Study
from lorameter.verdicts.compare import comparison_input
from lorameter.verdicts.notices import collect_notices
from lorameter.verdicts.validity import (
    MAX_FAULTS,
    Fault,
    InvalidReason,
    disturbance_notices,
    format_faults,
    run_validity,
)

STEPS = {"plain": [0.1, 0.1, 0.1], "nf4": [0.2, 0.2, 0.2]}


@pytest.fixture
def notices(write_run, small_study, tmp_path):
    """A function that writes a run with changed records and returns its notices by code."""

    def of(change=lambda record: record, **run_changes):
        write_run("run", STEPS, change=change)
        run = dataclasses.replace(store.read_run("run", tmp_path / "runs"), **run_changes)
        return {notice.code: notice for notice in collect_notices(run, small_study, {})}

    return of


def test_trials_measured_again_are_counted(notices):
    """The notice is one line, and earlier records do not count."""
    assert notices(measured_again=3)["measured-again"].message.startswith("3 trials measured again")
    assert "measured-again" not in notices()


def test_disturbed_trials_are_a_notice_with_the_reason(notices):
    """The notice has the number of repeated trials with the reason, the trials that still do not count, and the
    remedy."""
    hot = Failure(phase="train", kind=DISTURBED, message="while training the GPU lowered its clocks")

    def change(record):
        return record.replaced(status="invalid", failure=hot) if record.trial == "r0-nf4" else record

    first = TrialRecord(
        trial="r1-plain", status="invalid", name="plain", variant="v", role="variant", replicate=1, position=1, seed=0,
        interleaving="replicates", started_unix_s=0.0, wall_time_s=1.0, failure=hot,
    )  # fmt: skip
    found = notices(change, disturbed=(first,))
    assert found["disturbed"].message.startswith("1 trial measured again because of disturbances, r1-plain")
    assert "lowered its clocks; 1 of them count now" in found["disturbed"].message
    assert "1 trial left out" in found["still-disturbed"].message
    assert "--allow-disturbed" in found["still-disturbed"].remedy
    assert not {"disturbed", "still-disturbed"} & set(notices())


def test_damaged_lines_are_a_notice(notices):
    """Truncated lines and lines without evidence are counted together."""
    assert notices(damaged_lines=3)["damaged-lines"].message.startswith("3 lines of trials.jsonl truncated, or with")
    assert "damaged-lines" not in notices()


def test_a_constant_loss_is_a_notice(notices):
    """A learning rate that saturates the layers in the first step may leave the same finite loss on every batch."""

    def stuck(record):
        if record.name != "nf4":
            return record
        return record.replaced(samples=record.samples | {"warmup_loss": (5.5, 4.25), "timed_loss": (4.25,) * 3})

    notice = notices(stuck)["loss-constant"]
    assert "3 of 9 trials (nf4)" in notice.message
    assert "learning_rate" in notice.remedy


def record(trial, *, interleaving="replicates", occupancy=None, **values):
    samples = {} if occupancy is None else {"step_time_s": (1.0, 1.0), "step_cpu_time_s": (occupancy, occupancy)}
    return TrialRecord(
        trial=trial, status="ok", name="a", variant="a", role="variant", replicate=0, position=0,
        interleaving=interleaving, seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=samples, values=values,
    )  # fmt: skip


def test_a_kind_has_one_notice_with_its_worst_trial():
    """The notice has the number of affected trials and the values."""
    watched = {"host_busy_train_s": 9.7, "host_busy_generate_s": 5.0}
    records = [
        record("r0-a", host_steal_train_s=0.3, **watched), record("r1-a", **watched),
        record("r2-a", host_steal_generate_s=5.0, **watched),
    ]  # fmt: skip
    (notice,) = disturbance_notices(records, on_cpu=False)
    assert notice.code == "stolen"
    assert notice.message.startswith("2 of 3 trials; r2-a while generating: the hypervisor")
    assert "for 50% of the CPU time" in notice.message
    assert notice.message.endswith("Past the limit: r2-a.")


def test_too_little_of_a_cpu_is_past_the_limit_without_turns():
    """With turns the occupancy notice reports it instead; on a GPU the host is expected to wait."""
    one = record("r0-a", occupancy=0.3)
    (notice,) = disturbance_notices([one], on_cpu=True)
    assert notice.code == "cpu-contention"
    assert notice.message.endswith("Past the limit: r0-a.")
    assert list(disturbance_notices([record("r0-a", occupancy=0.3, interleaving="lockstep")], on_cpu=True)) == []
    assert list(disturbance_notices([one], on_cpu=False)) == []


TIMES = {"plain": [0.100, 0.101, 0.099, 0.1005], "nf4": [0.200, 0.201, 0.199, 0.2005]}


def validity_of(path):
    """Return the validity of a written run, and assert that a comparison has the same."""
    run = store.read_run(str(path), path.parent)
    found = run_validity(run, codec.from_json(Study, run.manifest.study, "run"))
    assert comparison_input(run).broken == found.broken
    return found


def test_a_whole_run_is_valid(write_run):
    """If every trial is ok and the control shows no difference, the run has no fault."""
    found = validity_of(write_run("a", TIMES))
    assert (found.valid, found.broken, found.failures, found.faults) == (True, None, (), ())


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"status": "interrupted"}, "incomplete", "its status is 'interrupted', not 'complete'"),
        (
            {"control": 1.5},
            "control-differs",
            "its control regressed in phase 'train': the reference differs from itself",
        ),
        ({"control": None}, "control-not-measured", "the control of phase 'train' was not measured"),
        ({"status": "running"}, "incomplete", "its status is 'running', not 'complete'"),
    ],
)
def test_a_fault_of_a_run_makes_all_of_it_invalid(write_run, options, reason, words):
    """The report and a comparison give the same reason."""
    found = validity_of(write_run("a", TIMES, **options))
    assert not found.valid
    assert found.faults == (Fault(reason=InvalidReason(reason), message=words),)
    assert found.broken == f"run a: {words}"


def test_a_control_without_a_ratio_makes_the_run_invalid(write_run):
    """A time below zero has no ratio, so the control proves nothing."""
    (fault,) = validity_of(write_run("a", TIMES, control=-1.0)).faults
    assert fault.reason == InvalidReason.CONTROL_NOT_MEASURED
    assert "is invalid: the samples cannot be compared: candidate trial 0 sample 0 is -0.09" in fault.message


def test_a_failed_trial_affects_only_its_own_variant(write_run):
    """The run is invalid, but the other variants can be compared."""

    def fails(record):
        return record.replaced(status="oom") if record.trial == "r1-nf4" else record

    path = write_run("a", TIMES, change=fails)
    found = validity_of(path)
    assert [(fault.reason, fault.variant) for fault in found.faults] == [(InvalidReason.TRIAL_FAILED, "nf4")]
    assert (found.valid, found.broken) == (False, None)
    assert found.failures == ("r1-nf4: oom (log: )",)
    sides = comparison_input(store.read_run(str(path), path.parent)).variants
    assert (sides["plain"].broken, sides["nf4"].broken) == (None, "run a: trial r1-nf4: oom")


def test_many_faults_are_counted():
    """A crash at the start of every trial gives as many faults as trials."""
    faults = [Fault(reason=InvalidReason.TRIAL_FAILED, message=f"fault {index}") for index in range(MAX_FAULTS + 2)]
    assert format_faults(faults) == "fault 0; fault 1; fault 2; and 2 more"
