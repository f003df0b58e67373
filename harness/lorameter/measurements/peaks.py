"""Peaks of memory, first times, and the energy of a GPU, which need a process without other trials."""

from __future__ import annotations

from collections.abc import Callable

from lorameter.measurements.declaration import TRAIN, Command, Measurement, Metric, Samples
from lorameter.records.record import TrialRecord

RSS_AT_START = "host_rss_at_start_bytes"
"""The kind of memory that a process held at its start; it is a part of a host's peak."""


def _energy_per(count: str) -> Callable[[TrialRecord], Samples]:
    """The device's energy per step or token; empty if either was not measured."""

    def derive(record: TrialRecord) -> Samples:
        energy, counted = record.values.get("device_energy_train_j"), record.values.get(count)
        return (energy / counted,) if energy is not None and counted else ()

    return derive


PEAKS = Measurement(
    name="peaks",
    title="memory peaks",
    phase=TRAIN,
    implementation="lorameter.trial.measurements.peaks",
    isolated_at=frozenset({"shared-base", "lockstep"}),
    needs_requests=True,
    end=(Command(name="end_generate", label="peaks of generation", ends="generate"),),
    metrics=(
        Metric(name="first_step_time_s", title="first step", unit="s"),
        Metric(name="first_call_time_s", title="first call", unit="s", phase="generate"),
        Metric(
            name="energy_per_step_j",
            title="energy per step",
            unit="J",
            derive=_energy_per("energy_steps"),
            of_trial="mean",
        ),
        Metric(
            name="energy_per_token_j",
            title="energy per real token",
            unit="J",
            derive=_energy_per("energy_tokens"),
            of_trial="mean",
            per_token=True,
        ),
    ),
    memory={
        "train": ("device_peak_allocated_train_bytes", "host_peak_train_bytes"),
        "generate": ("device_peak_allocated_generate_bytes", "host_peak_generate_bytes"),
    },
)
