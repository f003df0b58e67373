"""Tests of the notices of a run: damaged lines, repeated measurements, a constant loss."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.records import store
from lorameter.records.record import DISTURBED, Failure, TrialRecord
from lorameter.verdicts.notices import run_notices

STEPS = {"plain": [0.1, 0.1, 0.1], "nf4": [0.2, 0.2, 0.2]}


@pytest.fixture
def notices(write_run, small_study, tmp_path):
    """A function that writes a run with changed records and returns its notices by code."""

    def of(change=lambda record: record, **run_changes):
        write_run("run", STEPS, change=change)
        run = dataclasses.replace(store.read_run("run", tmp_path / "runs"), **run_changes)
        return {notice.code: notice for notice in run_notices(run, small_study, {})}

    return of


def test_trials_measured_again_are_counted(notices):
    """The notice is one line, and earlier records do not count."""
    assert notices(measured_again=3)["measured-again"].message.startswith("3 trials measured again")
    assert "measured-again" not in notices()


def test_disturbed_trials_are_a_notice_with_the_reason(notices):
    """The notice has the number of repeated trials with the reason, the trials that still do not count, and the
    remedy."""
    hot = Failure(phase="train", kind=DISTURBED, message="while training the GPU held its clocks down")

    def change(record):
        return record.replaced(status="invalid", failure=hot) if record.trial == "r0-nf4" else record

    first = TrialRecord(
        trial="r1-plain", status="invalid", name="plain", variant="v", role="variant", replicate=1, position=1, seed=0,
        interleaving="replicates", started_unix_s=0.0, wall_time_s=1.0, failure=hot,
    )  # fmt: skip
    found = notices(change, disturbed=(first,))
    assert found["disturbed"].message.startswith("1 trial measured again because of the surroundings, r1-plain")
    assert "held its clocks down; 1 of them count now" in found["disturbed"].message
    assert "1 trial left out" in found["still-disturbed"].message
    assert "--allow-disturbed" in found["still-disturbed"].remedy
    assert not {"disturbed", "still-disturbed"} & set(notices())


def test_truncated_lines_and_lost_evidence_have_their_own_notices(notices):
    """Both count as damaged lines but have separate notices."""
    found = notices(damaged_lines=3, without_evidence=2)
    assert found["damaged-lines"].message.startswith("1 line of trials.jsonl cut short")
    assert found["evidence-lost"].message.startswith(
        "2 lines of trials.jsonl with checks that checks.jsonl does not hold"
    )
    assert "damaged-lines" not in notices(damaged_lines=2, without_evidence=2)
    assert "evidence-lost" not in notices(damaged_lines=1)


def test_a_constant_loss_is_a_notice(notices):
    """A learning rate that saturates the layers in the first step may leave the same finite loss on every batch."""

    def stuck(record):
        if record.name != "nf4":
            return record
        return record.replaced(samples=record.samples | {"warmup_loss": (5.5, 4.25), "timed_loss": (4.25,) * 3})

    said = notices(stuck)["loss-constant"]
    assert "3 of 9 trials (nf4)" in said.message
    assert "learning_rate" in said.remedy
