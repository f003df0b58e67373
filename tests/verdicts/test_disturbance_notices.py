"""Tests of disturbance notices: one for each kind, with the worst trial, the affected number, and the trials to measure
again."""

from __future__ import annotations

from lorameter.records.record import TrialRecord
from lorameter.verdicts.validity import disturbance_notices


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
