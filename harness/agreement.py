"""What must agree before two sides may be compared, and how a disagreement reads.

Another GPU, another torch or another batch size moves a step time by more than most changes that one looks for, so a
ratio across them answers no question. Which field differs, and both of its values, is what a user needs to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.machine.provenance import POWER_LIMIT
from harness.records import codec
from harness.records.record import Notice
from harness.verdicts.comparand import Comparand
from harness.verdicts.outcome import Difference


def machine_differences(base: Comparand, candidate: Comparand) -> list[Difference]:
    """Facts of machine, libraries and workload that must agree and do not; unknown facts agree with nothing."""
    if base.absent is not None:
        return []
    ours, theirs = base.facts, candidate.facts
    if ours is None or theirs is None:
        words = ["unknown" if facts is None else "known" for facts in (ours, theirs)]
        return [Difference(field="fingerprint", base=words[0], candidate=words[1])]
    return fact_differences(codec.to_json(ours), codec.to_json(theirs))


def fact_differences(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[Difference]:
    """Facts of machine, libraries and workload that differ. A power limit that one side did not record differs from
    nothing: it was not recorded at first, and such runs stay comparable. `unknown_power_limit` says so."""
    found = differences(base, candidate)
    return [one for one in found if one.field != POWER_LIMIT or None not in (one.base, one.candidate)]


def unknown_power_limit(base: Comparand, candidate: Comparand) -> Notice | None:
    """That only one of two runs on a card says under which power limit it was measured."""
    sides = [(side.name, side.facts) for side in (base, candidate) if side.facts and side.facts.get("device") == "cuda"]
    limits = [facts[POWER_LIMIT] for _, facts in sides if POWER_LIMIT in facts]
    silent = [name for name, facts in sides if POWER_LIMIT not in facts]
    if not (limits and silent):
        return None
    return Notice(
        code="power-limit-unknown",
        message=f"{silent[0]} does not say under which power limit its card was, and the other side was under "
        f"{limits[0]} W: what differs may be the limit's doing.",
        remedy="Measure it again, or make sure that the limit was the same then.",
    )


def variant_differences(name: str, base: Comparand, candidate: Comparand) -> list[Difference]:
    """How a variant changed under its name."""
    ours, theirs = base.sides.get(name), candidate.sides.get(name)
    if ours is None or theirs is None or ours.id == theirs.id or None in (ours.id, theirs.id):
        return []
    if ours.variant is None or theirs.variant is None or ours.variant == theirs.variant:
        return [Difference(field=f"variant {name}", base=ours.id, candidate=theirs.id)]
    return [
        Difference(
            field=f"variant {name}: {key}",
            base=codec.to_json(getattr(ours.variant, key)),
            candidate=codec.to_json(getattr(theirs.variant, key)),
        )
        for key in theirs.variant.differences(ours.variant)
    ]


def differences(base: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Fields of two tables that differ, by dotted name; what one lacks is None there."""
    found: list[Difference] = []
    for key in dict.fromkeys((*base, *candidate)):
        ours, theirs = base.get(key), candidate.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs or (key in base) != (key in candidate):
            found.append(Difference(field=f"{prefix}{key}", base=ours, candidate=theirs))
    return found


def disagreement(found: Sequence[Difference], *, force: bool = True) -> str:
    """The reason of the verdict `not_comparable`; `force`: whether that option is there to be named."""
    remedy = "Measure the base again under the same conditions" + (", or see a ratio with --force" if force else "")
    return f"{'; '.join(map(str, found))}. {remedy}"
