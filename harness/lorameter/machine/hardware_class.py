"""What makes machines that have the same installed be of different kinds."""

from __future__ import annotations

from lorameter.machine.provenance import POWER_LIMIT, Machine

OF_A_KIND = ("device_name", "driver", "cpu_model", POWER_LIMIT)
"""Fields of the fingerprint in which they differ."""


def say_kind(machine: Machine) -> str:
    """For a reader: its CPU, or its GPU and CPU."""
    return machine.cpu_model if machine.device == "cpu" else f"{machine.device_name} and {machine.cpu_model}"
