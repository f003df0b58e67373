"""What the data says of a study's claims: supported, refuted, inconclusive, or not judged, each with its reason.

A claim is the conjunction of its parts: supported if every part is, refuted if one is, not judged if one was not and
none is refuted, else inconclusive. All parts of a run that assert a difference share one error rate of 5 % (Holm); that
there is none is asserted at 5 % each, as everywhere (`lorameter.stats.statement`).

`lorameter.verdicts.claims.questions` says what the control allows. A run can be judged at any moment, by what it holds
then.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.stats import step_down
from lorameter.stats.statement import Conclusion
from lorameter.studies.claim import ENGINE, Claim, ClaimPart, say_level
from lorameter.studies.from_run import read_study
from lorameter.studies.study import Study
from lorameter.verdicts.claims.engines import EngineShown, check_comparable, engine_of
from lorameter.verdicts.claims.peaks import judge_peaks
from lorameter.verdicts.claims.questions import (
    Controls,
    Question,
    controls_of,
    doubt,
    doubt_of_equality,
    failed,
    metrics_of,
    question_of,
    ratio_of,
    reason_of,
    spoken,
)
from lorameter.verdicts.claims.values import Answers, NotJudgedError, answers_of, counts, pair_of
from lorameter.verdicts.series import Groups, group_trials
from lorameter.verdicts.sites import refuse_mixed

Judgement = Literal["supported", "refuted", "inconclusive", "not judged"]
PartKey = tuple[str, int]
"""Id of a claim and the place of a part in it."""


class PartResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one part."""

    rule: str
    axis: str
    metric: str
    about: str = ""
    """What `ratio` is: "256 / 16"; empty where there is none."""
    verdict: Judgement
    ratio: float | None = None
    """With its 95 % interval, which is corrected for nothing; the verdict may rest on a wider or narrower one."""
    low: float | None = None
    high: float | None = None
    tolerance: float | None = None
    """None where the rule has none."""
    margin: float | None = None
    by: float | None = None
    """What was promised of an engine."""
    replicates: int = 0
    """With every level; 0 where the part was not judged."""
    skipped: int = 0
    """Replicates in which a level is missing."""
    reason: str


class ClaimResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of a claim."""

    id: str
    says: str
    original: str
    verdict: Judgement
    parts: tuple[PartResult, ...]
    source: str = ""


class ClaimsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is said of a run's claims."""

    run: str
    title: str
    status: str
    """Of the run: one that is running or was interrupted is judged by what it holds."""
    claims: tuple[ClaimResult, ...]
    replicates: int
    """Replicates that hold a trial that is ok."""
    trials: Mapping[str, int]
    """Trials by status; "planned" are all of the plan."""
    control: Controls
    deviations: tuple[str, ...]
    notes: tuple[str, ...]
    answers: Answers
    engine: EngineShown | None = None
    """Of a study about an engine: what is needed to publish the verdicts."""
    invalid: str | None = None
    """Why none of them counts: no trial is ok, or the reference differs from itself."""

    @property
    def valid(self) -> bool:
        """Whether the verdicts count."""
        return self.invalid is None


def judge_claims(run: Run) -> ClaimsReport:
    """Judge the claims of the study that a run measured.

    Raises:
        UsageError: a study without claims, or the run of an A/B, whose trials have sides.
    """
    study = read_study(run)
    if not study.claims:
        raise UsageError(f"run {run.manifest.run}: study {study.name} claims nothing. Add [[claim]] and measure again.")
    if run.manifest.sides:
        raise UsageError(
            f"run {run.manifest.run}: an A/B compares two sides of each variant, and a claim compares variants. "
            "Measure the study with `lorameter run`."
        )
    refuse_mixed(run, "a claim")
    groups = group_trials(run.records)
    controls = controls_of(groups, study, run.manifest.phases)
    engine = engine_of(run, study, groups)
    results = _judge_parts(run, study, groups, controls, engine)
    ok = [record for record in run.records if record.status == "ok"]
    statuses = [record.status for record in run.records]
    return ClaimsReport(
        run=run.manifest.run,
        title=study.title,
        status=run.manifest.status,
        claims=tuple(
            _claim(claim, [results[claim.id, index] for index in range(len(claim.parts))]) for claim in study.claims
        ),
        replicates=len({record.replicate for record in ok}),
        trials={"planned": len(run.manifest.order)}
        | {status: statuses.count(status) for status in sorted(set(statuses))},
        control=controls,
        deviations=study.deviations,
        notes=study.notes,
        answers=answers_of(groups),
        engine=engine,
        invalid=_invalid(ok, controls),
    )


def _invalid(ok: Sequence[TrialRecord], controls: Controls) -> str | None:
    if not ok:
        return "no trial of the run is ok, so there is nothing to judge by. See the report of the run"
    differing = [spoken(name) for name, control in controls.items() if failed(control)]
    return f"the reference differs from itself: its control in {', '.join(differing)}" if differing else None


def _judge_parts(
    run: Run, study: Study, groups: Groups, controls: Controls, engine: EngineShown | None
) -> dict[PartKey, PartResult]:
    planned = {trial.partition("-")[2].removesuffix("-isolated") for trial in run.manifest.order}
    random_weights = any(notice.code == "random-weights" for notice in run.manifest.notices)
    results: dict[PartKey, PartResult] = {}
    questions: dict[PartKey, Question] = {}
    for claim in study.claims:
        for index, part in enumerate(claim.parts):
            key = claim.id, index
            try:
                if claim.pretrained and random_weights:
                    raise NotJudgedError("random weights: losses and answers say nothing. Measure a pretrained model.")
                if engine is not None and part.axis == ENGINE:
                    check_comparable(part, run, study, engine)
                if part.rule == "rises":
                    results[key] = _rises(part, groups, study, planned)
                elif part.of_memory:
                    results[key] = _peaks(part, groups, study)
                else:
                    questions[key] = question_of(part, groups, study, planned)
            except NotJudgedError as error:
                results[key] = _result(part, "not judged", str(error))
    doubts = {key: said for key, question in questions.items() if (said := doubt(question.part, controls))}
    # What cannot be asserted is not of the family: it costs the others nothing.
    conclusions = step_down(
        (key for key in questions if key not in doubts),
        lambda key, left: questions[key].judged(left),
        is_decided=lambda conclusion: conclusion.by == "difference",
    )
    for key, said in doubts.items():
        results[key] = _answered(questions[key], questions[key].judged(1), said)
    for key, conclusion in conclusions.items():
        said = doubt_of_equality(questions[key].part, controls) if conclusion.by == "equality" else ""
        results[key] = _answered(questions[key], conclusion, said)
    return results


def _answered(question: Question, conclusion: Conclusion, said: str) -> PartResult:
    """The result of a conclusion; where a doubt is said, it asserts nothing."""
    ratio, low, high = ratio_of(question, conclusion)
    reason = reason_of(question, conclusion)
    result = _result(
        question.part,
        "inconclusive" if said else conclusion.status,
        f"{said}; {reason}" if said else reason,
        replicates=conclusion.replicates,
        skipped=question.skipped,
    )
    return msgspec.structs.replace(result, about=question.about[conclusion.contrast], ratio=ratio, low=low, high=high)


def _rises(part: ClaimPart, groups: Groups, study: Study, planned: set[str]) -> PartResult:
    """Counted, so exact: the smallest value of each level against the largest of the one before."""
    found, replicates = counts(groups, study, part.axis, part.metric, planned)
    texts = [" to ".join(f"{value:,.0f}" for value in sorted({min(values), max(values)})) for values in found]
    levels = [say_level(level) for level, _ in study.levels(part.axis)]
    named = (f"{text} at {level}" for text, level in zip(texts, levels, strict=True))
    said = (
        f"{texts[0]} at every level of {part.axis}" if len(set(texts)) == 1 else f"by {part.axis}, {', '.join(named)}"
    )
    rises = all(max(before) < min(after) for before, after in itertools.pairwise(found))
    return _result(part, "supported" if rises else "refuted", f"{part.metric}: {said}", replicates=replicates)


def _peaks(part: ClaimPart, groups: Groups, study: Study) -> PartResult:
    found = judge_peaks(part, groups, study)
    result = _result(part, found.verdict, found.reason, replicates=found.replicates)
    about = " / ".join(reversed(pair_of(part, study)))
    return msgspec.structs.replace(result, about=about, ratio=found.ratio, low=found.low, high=found.high)


def _result(part: ClaimPart, verdict: Judgement, reason: str, *, replicates: int = 0, skipped: int = 0) -> PartResult:
    name, limit = part.limit
    return PartResult(
        rule=part.rule,
        axis=part.axis,
        metric=" + ".join(metrics_of(part)),
        verdict=verdict,
        replicates=replicates,
        skipped=skipped,
        tolerance=limit if name == "tolerance" else None,
        margin=limit if name == "margin" else None,
        by=limit if name == "by" else None,
        reason=reason,
    )


def _claim(claim: Claim, parts: Sequence[PartResult]) -> ClaimResult:
    return ClaimResult(
        id=claim.id,
        says=claim.says,
        original=claim.original,
        verdict=conjunction([part.verdict for part in parts]),
        parts=tuple(parts),
        source=claim.source,
    )


def conjunction(verdicts: Sequence[Judgement]) -> Judgement:
    """The verdict on a claim from those on its parts."""
    strongest: tuple[Judgement, ...] = ("refuted", "not judged", "inconclusive")
    return next((verdict for verdict in strongest if verdict in verdicts), "supported")


def document(report: ClaimsReport) -> dict[str, Any]:
    """The report as JSON data, without its `schema`."""
    return dict(codec.to_json(report))
