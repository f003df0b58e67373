"""Collects the evidence for a verdict on an engine: the machine, the versions, and the proof that the engine ran.

A verdict requires that the engine ran in its variant and not in the reference, and that both did the same work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.measurements.metrics import METRICS
from lorameter.records.store import Run
from lorameter.studies.claim import ANY, LESS, SAFE, ClaimPart
from lorameter.studies.study import Study
from lorameter.verdicts.claims.parts import NotJudgedError, require_data
from lorameter.verdicts.same_training import (
    LOSS_DIFFERS,
    OTHER_PARAMETERS,
    ScriptPair,
    describe_script_differences,
    describe_threads,
    library_versions,
    pair_scripts,
)
from lorameter.verdicts.series import Groups

_UNSEEN = "the tokens of a step were not counted, so it is unknown whether both variants do the same work"
MIN_FALL = 0.5
"""With the engine, a share must be below this fraction of its value without it: single steps are watched, and their
batches differ by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathEvidence:
    """Evidence about the engine from one path of kernels_check."""

    path: str
    wanted: Any
    """The required value (`lorameter.studies.claim`)."""
    found: Literal["active", "absent", "unknown"]
    """active: as required, with and without the engine · absent: not as required · unknown: not observable."""
    with_engine: Any
    """The observed value in the variant with the engine; None if there is none."""
    without: Any
    """The observed value in the reference."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvidence:
    """An engine whose claims are judged, the machine and versions, and the observations of kernels_check."""

    title: str
    variant: str
    reference: str
    commands: Mapping[str, str]
    """The command of each variant, for scripts."""
    machine: str
    versions: Mapping[str, str | None]
    """Versions of packages, as reported by the scripts' processes; None if not installed."""
    proof: tuple[PathEvidence, ...]
    differs: tuple[str, ...]
    """Differences between the two scripts other than the engine."""


def collect_evidence(run: Run, study: Study, groups: Groups) -> EngineEvidence | None:
    """The evidence about a run's engine; None for a study without an engine."""
    engine, provenance = study.engine, run.manifest.provenance
    if engine is None:
        return None
    names = engine.variant, study.reference
    ok = {name: groups[name, "variant"].ok if (name, "variant") in groups else () for name in names}
    records = [*ok[study.reference], *ok[engine.variant]]
    name, device = (provenance.get(key, "unknown") for key in ("device_name", "device"))
    driver = f", driver {provenance['driver']}" if provenance.get("driver") else ""
    sides = _sides(run, study, engine.variant)
    differs = [notice.message for notice in describe_script_differences(engine.variant, sides)] if sides else []
    if sides and sides.tokens is None:
        differs.append(f"{engine.variant}: {_UNSEEN}.")
    variants = [study.variant(name) for name in (study.reference, engine.variant)]
    return EngineEvidence(
        title=engine.title,
        variant=engine.variant,
        reference=study.reference,
        commands={one.name: command for one in variants if (command := one.setting("command"))},
        machine=f"{name} ({device}, {describe_threads(provenance, records)} a process){driver}",
        versions=library_versions(provenance, records),
        proof=tuple(
            _judge_path(path, wanted, names, [[one for record in ok[name] for one in record.checks] for name in names])
            for path, wanted in engine.proof.items()
        ),
        differs=tuple(differs),
    )


def check_comparable(part: ClaimPart, run: Run, study: Study, engine: EngineEvidence) -> None:
    """Raise `NotJudgedError` if a part proves nothing about the engine: the engine did not run only in its variant, or
    steps of the two variants have different contents."""
    for evidence in engine.proof:
        _check_path(evidence, engine)
    known = METRICS.get(part.metric)  # memory peaks are not in METRICS
    per_token, title = (known.per_token, known.title) if known else (False, "peak memory")
    other_tokens = (
        f"a step of {engine.variant} has another number of tokens than a step of {engine.reference}, so their {title} "
        "cannot be compared. Give both the same batches, with the same seed."
    )
    require_data(per_token or not run.manifest.own_workloads, other_tokens)
    sides = _sides(run, study, engine.variant)
    if sides is None:
        return
    for notice in describe_script_differences(engine.variant, sides):
        require_data(
            notice.code not in (OTHER_PARAMETERS, LOSS_DIFFERS),
            f"they are not the same training: {notice.message} Let both train the same, except for the engine.",
        )
    require_data(
        sides.tokens is not None,
        f"{_UNSEEN}. Give the model "
        "its input_ids and labels, or measure with `lorameter ab`, which judges the time alone.",
    )
    other_contents = sides.tokens_differ or (part.of_memory and not sides.same_tokens)
    require_data(per_token or not other_contents, other_tokens)


def _sides(run: Run, study: Study, variant: str) -> ScriptPair | None:
    """The two scripts, as far as both were measured; None if the variants are not scripts."""
    found = pair_scripts(run, study).get(variant) if study.supports("own training") else None
    return found if found is not None and found.pairs else None


def _judge_path(
    path: str, wanted: Any, names: Sequence[str], checks: Sequence[Sequence[Mapping[str, Any]]]
) -> PathEvidence:
    """The evidence of one path from the checks of all watched trials, with and without the engine."""
    unclear: list[str] = []
    observed: list[list[Any]] = []
    for name, found in zip(names, checks, strict=True):
        of_path = [check for check in found if check.get("path") == path]
        unknown = [check for check in of_path if check.get("status") == "unknown"]
        observed.append([] if unknown else [check.get("observed") for check in of_path])
        if unknown or not of_path:
            why = unknown[0].get("reason") if unknown else "no observation shows it"
            unclear += [f"{name}: {why}"] if wanted != SAFE or name == names[0] else []
    ours, theirs = observed
    if wanted == SAFE and not unclear and not any(isinstance(value, bool) for value in ours):
        unclear = [f"{names[0]}: neither true nor false was observed"]
    words = (f"{_describe(_join(values))} in {name}" for name, values in zip(names, observed, strict=True) if values)
    return PathEvidence(
        path=path,
        wanted=wanted,
        found="unknown" if unclear else "active" if _holds(wanted, ours, theirs) else "absent",
        with_engine=_join(ours),
        without=_join(theirs),
        reason="; ".join(unclear) or ", ".join(words),
    )


def _join(values: list[Any]) -> Any:
    """The observed value, all values if there were several, None if there was none."""
    return values[0] if len(set(map(repr, values))) == 1 else (values or None)


def _holds(wanted: Any, ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    if wanted == SAFE:
        return False not in ours
    if wanted == ANY:
        return all(ours) and not any(theirs)
    if wanted == LESS:
        shares = [value for value in (*ours, *theirs) if isinstance(value, int | float) and not isinstance(value, bool)]
        return len(shares) == len(ours) + len(theirs) and max(ours) < MIN_FALL * min(theirs)
    named = (str(one).split("+") for one in theirs)
    ran = all(type(one) is type(wanted) and one == wanted for one in ours)  # 1.0 is not True
    return ran and not any(str(wanted) in words for words in named)


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(dict.fromkeys(map(_describe, value)))
    return {"None": "nothing", "True": "yes", "False": "no"}.get(str(value), str(value))


def _check_path(evidence: PathEvidence, engine: EngineEvidence) -> None:
    """Raise `NotJudgedError` if a path shows that no claim about the engine can be judged."""
    safe = evidence.wanted == SAFE
    if evidence.found == "active" or (safe and evidence.found == "unknown"):
        return
    remedy = "Correct its activation, and measure again."
    if safe:
        message = f"{evidence.path} is false with {engine.title}, so a gain may come from wrong results"
    elif evidence.found == "unknown":
        message = f"{evidence.path} does not show whether {engine.title} ran"
        remedy = "Measure again with a step that kernels_check can watch."
    else:
        message = f"{evidence.path} does not show that {engine.title} ran in {engine.variant} and only there"
        if evidence.with_engine is not None and evidence.with_engine == evidence.without:
            remedy = "If the reference uses it as well, turn it off there, in a command with braces: {off|on}."
    raise NotJudgedError(f"{message} ({evidence.reason}). {remedy}")
