"""What belongs to a verdict on an engine in addition to its numbers: the machine, the versions, and the proof that it
ran.

And what must hold before there is a verdict: that it ran where it was to run and not where it was not, and that what is
compared did the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.records.metrics import METRICS
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.studies.claim import ClaimPart
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant
from lorameter.verdicts.claims.proof import Shown, obstacle_of, proof_of
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
