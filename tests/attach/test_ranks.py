"""Tests of several ranks: the slowest rank of each timed step counts."""

import dataclasses

import pytest

from kernels_check import Check
from lorameter.attach import measures
from lorameter.attach.launch import RUN
from lorameter.attach.observer import StepReading, TrainingInfo
from lorameter.attach.writer import Writer
from lorameter.records import store

CHECK = Check(path="mode", required=None, observed="train", status="active", reason="seen")
WATCHED = 8
"""One step, a warm-up of six, and the watched step."""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that reports steps on two ranks and returns the record; step n takes n seconds on rank 0, and a
    hundred times that on rank 1 if n is even."""
    monkeypatch.setenv(RUN, str(tmp_path / "run"))
    monkeypatch.setattr(measures, "WAIT_S", 0.2)

    def run(steps, *, other=None, watched=(WATCHED,)):
        training = TrainingInfo(
            source="loop", model=None, planned_steps=None, trainable_parameters=6,
            total_parameters=6, accumulation=1, ranks=2,
        )  # fmt: skip
        writers = [Writer(require={}), Writer(require={})]
        for rank, writer in enumerate(writers):
            writer.begin(dataclasses.replace(training, rank=rank))
            for number in range(1, (steps if other is None or not rank else other) + 1):
                time_s = number * (100.0 if rank and not number % 2 else 1.0) if number > WATCHED else 1.0
                checks = (CHECK,) if number in watched and not rank else None
                writer.step(StepReading(
                    number=number, step_time_s=time_s, cpu_time_s=0.0, checks=checks, sequences=1,
                    real_tokens=number * (rank + 1), padded_tokens=3 * number,
                ))  # fmt: skip
        writers[1].end(None)
        writers[0].end(None)
        (record,) = store.read_run(str(tmp_path / "run"), tmp_path).records
        return record

    return run


@pytest.mark.parametrize("watched", [(8,), (8, 9), (8, 10)])
def test_first_warm_up_and_watched_steps_are_left_out_of_both(measure, watched):
    """Steps of both ranks are matched by their number."""
    timed = [number for number in range(WATCHED + 1, 14) if number not in watched]
    record = measure(13, watched=watched)
    assert record.samples["step_time_s"] == tuple(n * (1.0 if n % 2 else 100.0) for n in timed)
    assert record.samples["turn_tokens"] == tuple(3.0 * n for n in timed)
    assert record.samples["turn_sequences"] == (2.0,) * len(timed)


def test_a_rank_that_saw_fewer_steps_was_not_seen(measure):
    """Its steps may not match; a notice names the rank, and the tokens of all ranks are unknown."""
    record = measure(12, other=11)
    assert [notice.code for notice in record.notices] == ["rank-unseen"]
    assert record.samples["step_time_s"] == (9.0, 10.0, 11.0, 12.0)
    assert not [name for name in record.samples if name.startswith("turn_")]
