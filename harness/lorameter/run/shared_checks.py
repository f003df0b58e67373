"""What is a property of a base, found out by one of the trials that stand on it and told of all.

Whether packed records see each other is decided by the base and its attention, and the loss before training is that of
the base alone: an adapter that is switched off is not there. Both take several forwards of a real model, so the first
trial of a run on each base makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lorameter.records.record import PartialRecord, TrialRecord
from lorameter.records.requirements import judge_required
from lorameter.run.plan import Slot
from lorameter.studies.variant import ADAPTER_FIELDS, Variant

OF_BASE = "packing.isolated"
"""The path that the base decides."""
INITIAL_LOSS = "held_out_loss_initial"
_BARE = {name: getattr(Variant(), name) for name in ADAPTER_FIELDS}


def find_askers(slots: Iterable[Slot]) -> dict[str, str]:
    """For each trial the one that finds out for it what is its base's: itself, or one that differs in its adapter only.

    Sides of an A/B find out by themselves, as do trials of several ranks and those whose adapter rewrites the base.
    """
    first: dict[Any, str] = {}
    found = {}
    for slot in sorted(slots, key=lambda slot: slot.instrument != "profile"):  # the spy cannot tell
        variant = dataclasses.replace(slot.variant, name="", **_BARE)
        own = slot.variant.rewrites_base or slot.variant.bias != "none" or slot.workload.ranks > 1
        alone = slot.side or slot.variant.command or own or "steps" not in slot.measures
        key = slot.trial if alone else (variant, slot.workload)
        found[slot.trial] = first.setdefault(key, slot.trial)
    return found


def told_by(record: TrialRecord, slot: Slot, *, allow_fallback: bool, word: str) -> PartialRecord:
    """What a trial's record adds to that of another on the same base, after a command."""
    if word == "build":
        return PartialRecord(values={name: value for name, value in record.values.items() if name == INITIAL_LOSS})
    profiled = slot.instrument == "profile"  # the spy cannot tell
    checks = tuple(_of_another(check, record) for check in record.checks if profiled and check.get("path") == OF_BASE)
    if profiled and not checks and record.status != "ok" and slot.workload.layout == "packed":
        reason = f"{record.name}, which was to find it out for all on this base, is {record.status}"
        checks = ({"path": OF_BASE, "required": True, "observed": None, "status": "unknown", "reason": reason},)
    fragment = PartialRecord(checks=checks)
    required = {str(check["path"]): check["required"] for check in checks if check.get("required") is not None}
    return judge_required(fragment, required, name=slot.variant.name, allow_fallback=allow_fallback)


def _of_another(check: Mapping[str, Any], record: TrialRecord) -> dict[str, Any]:
    return {**check, "reason": f"{check.get('reason')}; found by {record.name}, which stands on the same base"}
