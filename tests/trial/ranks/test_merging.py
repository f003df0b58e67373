"""Tests of merging the values of the ranks of a trial into those of one trial."""

from __future__ import annotations

from lorameter.trial.ranks.trial import merge_values

FIRST = {
    "device_energy_train_j": 900.0, "energy_tokens": 300.0, "energy_steps": 10.0, "device_samples_train": 4.0,
    "device_throttled_samples_train": 0.0, "device_others_train": 0.0, "device_sm_clock_min_train_hz": 1.9e9,
    "device_sm_clock_max_train_hz": 1.9e9, "host_load_train": 1.0,
}  # fmt: skip
SECOND = FIRST | {
    "device_energy_train_j": 1100.0, "energy_tokens": 340.0, "device_throttled_samples_train": 4.0,
    "device_others_train": 1.0, "device_sm_clock_min_train_hz": 1.1e9, "host_load_train": 3.0,
}  # fmt: skip


def test_energy_and_its_tokens_are_summed():
    """Energy is left out if one rank has no counter; the number of steps is the same on each rank."""
    merged = merge_values([FIRST, SECOND])
    assert (merged["device_energy_train_j"], merged["energy_tokens"], merged["energy_steps"]) == (2000.0, 640.0, 10.0)
    without = {key: value for key, value in SECOND.items() if "energy_train_j" not in key}
    assert "device_energy_train_j" not in merge_values([FIRST, without])


def test_the_worst_gpu_counts():
    """The slowest GPU counts; the host is the same for all."""
    merged = merge_values([FIRST, SECOND])
    assert (merged["device_throttled_samples_train"], merged["device_samples_train"]) == (4.0, 4.0)
    assert merged["device_others_train"] == 1.0
    assert (merged["device_sm_clock_min_train_hz"], merged["device_sm_clock_max_train_hz"]) == (1.1e9, 1.9e9)
    assert merged["host_load_train"] == 1.0
