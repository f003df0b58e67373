"""The settings of machine and card as one document: what a number was measured under, each with why it is not known.

A limit of 400 W on a card of 700, an ECC mode or a governor moves times more than most changes that one looks for, and
is gone from every log when somebody asks for it. So a run writes them down once. What changes from moment to moment
(load, free memory, heat) is left to the readings around what is timed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.machine.host import ROOT, HostWatch
from harness.machine.nvml import open_device
from harness.machine.reading import Reading, unavailable
from harness.machine.system import system_facts

MOMENTARY = ("load", "memory_available_bytes", "swap_used_bytes")
"""Facts of the system that are no settings."""


def settings(*, card: bool, root: Path = ROOT) -> dict[str, Any]:
    """Of the machine (`system`), of its `card`, and which `host_counters_missing` there are, with the reason.

    Values are those of `SystemFacts` and `CardFacts`, or "not available: REASON".

    Args:
        card: whether trials run on a card; if not, none is asked.
        root: where the files of the kernel are.
    """
    watch = HostWatch(root)
    watch.begin()
    watch.end()
    system = {name: value for name, value in _told(system_facts(root)).items() if name not in MOMENTARY}
    return {
        "system": system,
        "card": _card() if card else unavailable("trials do not run on a card"),
        "host_counters_missing": watch.missing,
    }


def _card() -> dict[str, Any] | str:
    opened = open_device()
    if opened.value is None:
        return unavailable(opened.reason)
    facts = opened.value.facts()
    opened.value.close()
    return _told(facts)


def _told(facts: Any) -> dict[str, Any]:
    values = {one.name: getattr(facts, one.name) for one in dataclasses.fields(facts)}
    return {name: value.told() if isinstance(value, Reading) else value for name, value in values.items()}
