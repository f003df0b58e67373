"""What belongs to a verdict on an engine in addition to its numbers: the machine, the versions, and the proof that it
ran.

And what must hold before there is a verdict: that it ran where it was to run and not where it was not, and that what is
compared did the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.records.metrics import METRICS
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.studies.claim import ClaimPart
from lorameter.studies.engine import ANY, LESS, SAFE
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant
from lorameter.verdicts.claims.values import NotJudgedError
from lorameter.verdicts.same_training import LOSS_DIFFERS, OTHER_PARAMETERS, ScriptPair, notices_of_sides, sides_of_run
from lorameter.verdicts.series import Groups
from lorameter.verdicts.software import say_threads, versions_of

_UNSEEN = "how many tokens a step holds was not seen, so whether both do the same work is not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShown:
    """Whose promises were judged, where, with what, and what kernels_check saw of it."""

    title: str
    variant: str
    reference: str
    commands: Mapping[str, str]
    """Of scripts: by variant what was started."""
    machine: str
    versions: Mapping[str, str | None]
    """Of scripts as their own processes tell them; None for what is not installed."""
    proof: tuple[Shown, ...]
    differs: tuple[str, ...]
    """What differs between two scripts in addition to the engine."""


def engine_of(run: Run, study: Study, groups: Groups) -> EngineShown | None:
    """What is to be shown of a run's engine; None for a study that is about none."""
    if study.engine is None:
        return None
    variants = [study.variant(study.reference), study.variant(study.engine.variant)]
    series = [groups[one.name, "variant"] for one in variants if (one.name, "variant") in groups]
    records = [record for one in series for record in one.ok]
    return EngineShown(
        title=study.engine.title,
        variant=study.engine.variant,
        reference=study.reference,
        commands={one.name: one.command for one in variants if isinstance(one, ScriptVariant)},
        machine=_machine(run.manifest.provenance, records),
        versions=versions_of(run.manifest.provenance, records),
        proof=proof_of(groups, study),
        differs=tuple(_differing(study.engine.variant, _sides(run, study))),
    )


def check_comparable(part: ClaimPart, run: Run, study: Study, engine: EngineShown) -> None:
    """Raises `NotJudgedError` where a part says nothing of the engine: it did not run in the one variant alone, or a
    step of the two does not hold the same."""
    if obstacle := obstacle_of(engine.proof, study):
        raise NotJudgedError(obstacle)
    if run.manifest.own_workloads and not _is_per_token(part):
        raise NotJudgedError(_other_tokens(part, study))
    if (sides := _sides(run, study)) is not None:
        _check_scripts(part, study, sides)


def _sides(run: Run, study: Study) -> ScriptPair | None:
    """Two scripts, as far as both were measured; None where the variants are none."""
    if not study.of_scripts or study.engine is None:
        return None
    found = sides_of_run(run, study).get(study.engine.variant)
    return found if found is not None and found.pairs else None


def _check_scripts(part: ClaimPart, study: Study, sides: ScriptPair) -> None:
    """Two scripts must be the same training, as far as that was observed."""
    assert study.engine is not None
    other = [
        notice.message
        for notice in notices_of_sides(study.engine.variant, sides)
        if notice.code in (OTHER_PARAMETERS, LOSS_DIFFERS)
    ]
    if other:
        raise NotJudgedError(f"they are not the same training: {other[0]} Give both the same one but for the engine.")
    if sides.tokens is None:
        raise NotJudgedError(
            f"{_UNSEEN}. Give the model "
            "its input_ids and labels, or measure with `lorameter ab`, which judges the time alone."
        )
    if _is_per_token(part):
        return
    if sides.tokens_differ or (part.of_memory and not sides.same_tokens):
        raise NotJudgedError(_other_tokens(part, study))


def _is_per_token(part: ClaimPart) -> bool:
    return part.metric in METRICS and METRICS[part.metric].per_token  # a peak of memory is none of them


def _other_tokens(part: ClaimPart, study: Study) -> str:
    assert study.engine is not None
    title = "peak memory" if part.of_memory else METRICS[part.metric].title
    return (
        f"a step of {study.engine.variant} holds another number of tokens than one of {study.reference}, so their "
        f"{title} says nothing. Give both the same batch, and a seed to what draws it."
    )


def _differing(variant: str, sides: ScriptPair | None) -> Iterator[str]:
    """What two scripts do not have in common, and whether that could be seen."""
    if sides is not None:
        yield from (notice.message for notice in notices_of_sides(variant, sides))
        if sides.tokens is None:
            yield f"{variant}: {_UNSEEN}."


def _machine(provenance: Mapping[str, Any], records: Sequence[TrialRecord]) -> str:
    """Device, threads and driver, as far as they are known."""
    name, device = (provenance.get(key, "unknown") for key in ("device_name", "device"))
    said = f"{name} ({device}, {say_threads(provenance, records)} a process)"
    return said + (f", driver {provenance['driver']}" if provenance.get("driver") else "")


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
        _show_path(path, wanted, *(_look(name, ok, path) for name, ok in zip(names, records, strict=True)))
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


def _show_path(path: str, wanted: Any, ours: _PathStatuses, theirs: _PathStatuses) -> Shown:
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
    return f"{said} ({against.reason}). {_proof_remedy(against)}"


def _proof_remedy(against: Shown) -> str:
    if against.found == "unknown":
        return "Measure again with a step that kernels_check can watch."
    if against.wanted != SAFE and against.with_engine is not None and against.with_engine == against.without:
        return "Where the reference has it as well, turn it off there; a command says so in braces: {off|on}."
    return "Mend what turns it on, and measure again."
