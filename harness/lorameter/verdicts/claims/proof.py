"""Whether an engine ran where it was to run, and nowhere else: without that no promise of it is judged.

A flag that a script does not know, a patch that came too late, a path that fell back: each leaves two variants that do
the same, and would refute a promise that was not tested. So what kernels_check saw in the watched steps of both is
asked first. What it could not see is unknown, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.records.record import TrialRecord
from lorameter.studies.engine import ANY, LESS, SAFE
from lorameter.studies.study import Study
from lorameter.verdicts.series import Groups

Found = Literal["active", "absent", "unknown"]
LEAST_FALL = 0.5
"""A share must fall below so much of what it is without the engine: steps are watched one by one, and batches that are
drawn anew differ by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one path of kernels_check says of the engine."""

    path: str
    wanted: Any
    """What it must show (`lorameter.studies.engine`)."""
    found: Found
    """active: as wanted, with the engine and not without it · absent: not so · unknown: it could not be seen."""
    with_engine: Any
    """What was observed in the variant with the engine; None for nothing."""
    without: Any
    """What was observed in the reference."""
    reason: str

    @property
    def speaks_against(self) -> bool:
        """Whether no promise can be judged for it."""
        return self.found == "absent" if self.wanted == SAFE else self.found != "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class _PathStatuses:
    """What all watched trials of a variant say of a path."""

    name: str
    values: tuple[Any, ...]
    unclear: str
    """Why it is not known; empty where it is."""

    @property
    def value(self) -> Any:
        """The one value, or all that there were."""
        return self.values[0] if len(set(map(repr, self.values))) == 1 else (list(self.values) or None)


def proof_of(groups: Groups, study: Study) -> tuple[Shown, ...]:
    """What every path of the engine's proof says; nothing for a study without an engine."""
    if study.engine is None:
        return ()
    names = study.engine.variant, study.reference
    records = [groups[name, "variant"].ok if (name, "variant") in groups else () for name in names]
    return tuple(
        _shown(path, wanted, *(_look(name, ok, path) for name, ok in zip(names, records, strict=True)))
        for path, wanted in study.engine.proof.items()
    )


def _look(name: str, records: Sequence[TrialRecord], path: str) -> _PathStatuses:
    checks = [check for record in records for check in record.checks if check.get("path") == path]
    unclear = [check for check in checks if check.get("status") == "unknown"]
    if not checks:
        return _PathStatuses(name=name, values=(), unclear=f"{name}: nothing that was observed shows it")
    if unclear:
        return _PathStatuses(name=name, values=(), unclear=f"{name}: {unclear[0].get('reason')}")
    return _PathStatuses(name=name, values=tuple(check.get("observed") for check in checks), unclear="")


def _shown(path: str, wanted: Any, ours: _PathStatuses, theirs: _PathStatuses) -> Shown:
    parts = [ours] if wanted == SAFE else [ours, theirs]
    unclear = [one.unclear for one in parts if one.unclear]
    if wanted == SAFE and not unclear and not any(isinstance(value, bool) for value in ours.values):
        unclear = [f"{ours.name}: neither true nor false was seen"]
    said = "; ".join(unclear) or ", ".join(f"{_word(one.value)} in {one.name}" for one in (ours, theirs) if one.values)
    found: Found = "unknown" if unclear else "active" if _holds(wanted, ours.values, theirs.values) else "absent"
    return Shown(path=path, wanted=wanted, found=found, with_engine=ours.value, without=theirs.value, reason=said)


def _holds(wanted: Any, ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    if wanted == SAFE:
        return False not in ours
    if wanted == ANY:
        return all(ours) and not any(theirs)
    if wanted == LESS:
        return _extreme_of(ours, max) < LEAST_FALL * _extreme_of(theirs, min)
    named = (str(one).split("+") for one in theirs)
    ran = all(type(one) is type(wanted) and one == wanted for one in ours)  # a share of 1.0 is not yes
    return ran and not any(str(wanted) in words for words in named)


def _extreme_of(values: Sequence[Any], pick: Any) -> float:
    """The largest or the smallest of shares; one that is none has no order, and `nan` is less than nothing."""
    numbers = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    return float(pick(numbers)) if len(numbers) == len(values) else float("nan")


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(dict.fromkeys(map(_word, value)))
    return "nothing" if value is None else ("yes" if value else "no") if isinstance(value, bool) else str(value)


def obstacle_of(proof: Sequence[Shown], study: Study) -> str:
    """Why no promise of the engine can be judged; empty where one can."""
    against = next((one for one in proof if one.speaks_against), None)
    if against is None or study.engine is None:
        return ""
    if against.wanted == SAFE:
        said = f"{against.path} is false with {study.engine.title}, so what is won is not won fairly"
    elif against.found == "unknown":
        said = f"whether {study.engine.title} ran is unknown by {against.path}"
    else:
        said = f"{study.engine.title} was not seen to run in {study.engine.variant} and there alone, by {against.path}"
    return f"{said} ({against.reason}). {_remedy(against)}"


def _remedy(against: Shown) -> str:
    if against.found == "unknown":
        return "Measure again with a step that kernels_check can watch."
    if against.wanted != SAFE and against.with_engine is not None and against.with_engine == against.without:
        return "Where the reference has it as well, turn it off there; a command says so in braces: {off|on}."
    return "Mend what turns it on, and measure again."
