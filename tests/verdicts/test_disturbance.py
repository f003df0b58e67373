"""A trial is invalid by its surroundings and never by its times; what is not past a limit stays as it was."""

from __future__ import annotations

import pytest

from harness.records.record import TrialRecord
from harness.verdicts.disturbance import judged


def record(*, status="ok", interleaving="replicates", step_s=1.0, **values):
    return TrialRecord(
        trial="r0-a", status=status, name="a", variant="a", role="variant", replicate=0, position=0,
        interleaving=interleaving, seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={"step_time_s": (step_s,) * 3, "step_cpu_time_s": (step_s,) * 3},
        values={"host_watched_train_s": 10.0, "device_samples_train": 10.0} | values,
    )  # fmt: skip


HOT = {"device_throttled_samples_train": 5.0}


def test_a_trial_past_a_limit_is_invalid_with_its_samples():
    """The reason has both numbers, the phase is named, and nothing that was measured is lost."""
    found = judged(record(**HOT), on_cpu=False)
    assert (found.status, found.disturbed, found.failure.phase) == ("invalid", True, "train")
    assert "5 of 10 samples (50%; from 1% it is said, above 10% the trial does not count)" in found.failure.message
    assert found.samples == record().samples


@pytest.mark.parametrize("step_s", [1e-3, 1.0, 1e3])
def test_its_times_say_nothing(step_s):
    """However fast or slow it was."""
    assert judged(record(step_s=step_s), on_cpu=False).status == "ok"
    assert judged(record(step_s=step_s, **HOT), on_cpu=False).status == "invalid"


@pytest.mark.parametrize("other", [record(device_throttled_samples_train=1.0), record(), record(status="oom", **HOT)])
def test_other_trials_stay_as_they_are(other):
    """What is only worth a notice, what was quiet, and what has ended otherwise."""
    assert judged(other, on_cpu=False) == other
    assert not other.disturbed
