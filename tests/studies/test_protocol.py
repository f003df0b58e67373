"""How often things are measured: the dial, and the least there is."""

from __future__ import annotations

import dataclasses

from lorameter.studies.protocol import Protocol


def test_the_least_is_once_of_everything():
    """Whatever a protocol asks for: no field that counts or limits anything is left as it was."""
    kept = {"phases", "merged", "seed", "step_timeout_s", "memory_limit_bytes", "on", "sites", "mixed"}
    large = {
        field.name: 0.4 if field.type in ("float", "float | None") else 9
        for field in dataclasses.fields(Protocol)
        if field.name not in kept | {"allow_disturbed"}
    }
    least = Protocol(**large).least()
    assert least == Protocol().least()
    assert {name for name, value in large.items() if getattr(least, name) == value} == set()
