"""The judgements of a study's claims: supported, refuted, inconclusive or not judged, each with its reason.

A claim is the conjunction of its parts: supported if every part is supported, refuted if any part is, not judged if
some part is not judged and none is refuted, else inconclusive. All parts of a run that assert a difference share one
error rate of 5 % (Holm); each assertion of equality has an error rate of 5 %, as everywhere
(`lorameter.stats.trend`).

If the reference differs from itself in a metric, or in the primary metric of its phase, nothing is asserted about that
metric. If it is not equivalent to itself, no equality is asserted. A run can be judged at any time, from its records so
far.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import msgspec

from lorameter.errors import require
from lorameter.records.metrics import METRICS, PHASES, PRIMARY, Samples, get_samples
from lorameter.records.store import Run
from lorameter.records.units import format_ratio
from lorameter.stats import Comparison, ShareEstimate, explained_share, holm_step_down
from lorameter.stats.trend import Conclusion
from lorameter.studies.claim import ENGINE, ClaimPart
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.verdicts.claims.counted import judge_counts, judge_peaks
from lorameter.verdicts.claims.engines import EngineEvidence, check_comparable, collect_evidence
from lorameter.verdicts.claims.parts import (
    Judgement,
    NotJudgedError,
    Question,
    make_question,
    make_result,
    metric_phrase,
    part_metrics,
)
from lorameter.verdicts.claims.parts import PartResult as PartResult
from lorameter.verdicts.series import Groups, compare_control, group_trials, is_difference

Controls = Mapping[str, Comparison | None]
"""The comparison of the reference with itself, by metric; None if it was not measured."""
TOKENS, TIME = "open_ended_tokens", "open_ended_request_time_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Shares of the variance of request time that the number of tokens explains (R²), over replicates."""

    requests: ShareEstimate | None
    """Between the requests of all variants; None if it was not measured or all answers had the same length."""
    variants: ShareEstimate | None
    """Between the means of the variants; None also with fewer than three variants."""


class ClaimResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The judgement of a claim."""

    id: str
    says: str
    original: str
    verdict: Judgement
    parts: tuple[PartResult, ...]
    source: str = ""


class ClaimsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The judgements of a run's claims, with the facts about the run that a reader needs."""

    run: str
    title: str
    status: str
    """Status of the run; a running or interrupted run is judged from its records so far."""
    claims: tuple[ClaimResult, ...]
    replicates: int
    """Replicates with at least one ok trial."""
    trials: Mapping[str, int]
    """Trials by status; "planned" counts all trials of the plan."""
    control: Controls
    deviations: tuple[str, ...]
    notes: tuple[str, ...]
    answers: Answers
    engine: EngineEvidence | None = None
    """For a study about an engine: the evidence that is published with the verdicts."""
    invalid: str | None = None
    """Why no verdict counts: no trial is ok, or the reference differs from itself."""

    @property
    def valid(self) -> bool:
        """Whether the verdicts count."""
        return self.invalid is None


def judge_claims(run: Run) -> ClaimsReport:
    """Judge the claims of the study that a run measured.

    Raises:
        UsageError: the study has no claims, or the run is an A/B run.
    """
    study = read_study(run)
    require(
        study.claims, f"run {run.manifest.run}: study {study.name} claims nothing. Add [[claim]] and measure again."
    )
    require(
        not run.manifest.sides,
        f"run {run.manifest.run}: an A/B compares two sides of each variant, and a claim compares variants. "
        "Measure the study with `lorameter run`.",
    )
    groups = group_trials(run.records)
    controls = compare_controls(groups, study, run.manifest.phases)
    engine = collect_evidence(run, study, groups)
    results = _judge_parts(run, study, groups, controls, engine)
    replicates = {record.replicate for record in run.records if record.status == "ok"}
    statuses = [record.status for record in run.records]
    differing = [
        metric_phrase(name) for name, control in controls.items() if control is not None and is_difference(control)
    ]
    invalid = f"the reference differs from itself: its control in {', '.join(differing)}" if differing else None
    if not replicates:
        invalid = "no trial of the run is ok, so there is nothing to judge by. See the report of the run"
    parts = {claim.id: tuple(results[claim.id, index] for index in range(len(claim.parts))) for claim in study.claims}
    claims = [
        ClaimResult(
            id=claim.id,
            says=claim.says,
            original=claim.original,
            verdict=combine_verdicts([part.verdict for part in parts[claim.id]]),
            parts=parts[claim.id],
            source=claim.source,
        )
        for claim in study.claims
    ]
    return ClaimsReport(
        run=run.manifest.run,
        title=study.title,
        status=run.manifest.status,
        claims=tuple(claims),
        replicates=len(replicates),
        trials={"planned": len(run.manifest.order)}
        | {status: statuses.count(status) for status in sorted(set(statuses))},
        control=controls,
        deviations=study.deviations,
        notes=study.notes,
        answers=collect_answers(groups),
        engine=engine,
        invalid=invalid,
    )


def _judge_parts(
    run: Run, study: Study, groups: Groups, controls: Controls, engine: EngineEvidence | None
) -> dict[tuple[str, int], PartResult]:
    """The result of each part, by the claim's id and the index of the part."""
    random_weights = any(notice.code == "random-weights" for notice in run.manifest.notices)
    results: dict[tuple[str, int], PartResult] = {}
    questions: dict[tuple[str, int], Question] = {}
    for claim in study.claims:
        for index, part in enumerate(claim.parts):
            key = claim.id, index
            try:
                if claim.pretrained and random_weights:
                    raise NotJudgedError("random weights: losses and answers say nothing. Measure a pretrained model.")
                if engine is not None and part.axis == ENGINE:
                    check_comparable(part, run, study, engine)
                if part.rule == "rises":
                    results[key] = judge_counts(part, groups, study)
                elif part.of_memory:
                    results[key] = judge_peaks(part, groups, study)
                else:
                    questions[key] = make_question(part, groups, study)
            except NotJudgedError as error:
                results[key] = make_result(part, "not judged", str(error))
    doubts = {key: doubt for key, question in questions.items() if (doubt := find_doubt(question.part, controls))}
    # A part that cannot be asserted is not in the family of tests, so it does not reduce the error rate of the
    # others.
    conclusions = holm_step_down(
        (key for key in questions if key not in doubts),
        lambda key, left: questions[key].judge(left),
        is_decided=lambda conclusion: conclusion.by == "difference",
    )
    for key, question in questions.items():
        conclusion = conclusions.get(key) or question.judge(1)
        doubt = doubts.get(key, "")
        if conclusion.by == "equality":
            doubt = doubt or why_not_equal(question.part, controls)
        results[key] = _answer(question, conclusion, doubt)
    return results


def _answer(question: Question, conclusion: Conclusion, doubt: str) -> PartResult:
    """The result of a conclusion; inconclusive if there is a doubt."""
    ratio, low, high = question.ratio(conclusion)
    reason = question.reason(conclusion)
    return make_result(
        question.part,
        "inconclusive" if doubt else conclusion.status,
        f"{doubt}; {reason}" if doubt else reason,
        about=question.contrasts[conclusion.contrast].about,
        ratio=ratio,
        low=low,
        high=high,
        replicates=conclusion.effect.replicates,
        skipped=question.skipped,
    )


def compare_controls(groups: Groups, study: Study, phases: Sequence[str]) -> Controls:
    """Control comparisons: the primary metric of each phase, as in the run's report, then every other claimed metric.

    Each group shares an error rate of 5 %, so identical code seldom fails.
    """
    primaries = [PRIMARY[phase] for phase in PHASES if phase in phases]
    claimed = dict.fromkeys(name for claim in study.claims for part in claim.parts for name in part_metrics(part))
    others = [name for name in claimed if name in METRICS and name not in primaries]
    found: dict[str, Comparison | None] = {}
    for family in (primaries, others):
        for name in family:
            found[name] = compare_control(groups, study.reference, name, family=len(family))
    return found


def find_doubt(part: ClaimPart, controls: Controls) -> str:
    """Why nothing may be asserted about a part, because its control or its phase's control differs; empty if it may."""
    for metric in part_metrics(part):
        for name in (metric, PRIMARY[METRICS[metric].phase]):
            found = controls.get(name)
            if found is not None and is_difference(found):
                ratio = format_ratio(found.ratio, found.low, found.high)
                return f"the control differs from itself in {metric_phrase(name)}, ×{ratio}, so the claim is not judged"
    return ""


def why_not_equal(part: ClaimPart, controls: Controls) -> str:
    """Why equality may not be asserted about a part; empty if it may."""
    for metric in part_metrics(part):
        found = controls.get(metric)
        if found is None or found.verdict != "equivalent":
            return f"the control is not equivalent to itself in {metric_phrase(metric)}, so nothing is called equal"
    return ""


def combine_verdicts(verdicts: Sequence[Judgement]) -> Judgement:
    """The verdict on a claim, from the verdicts on its parts."""
    strongest: tuple[Judgement, ...] = ("refuted", "not judged", "inconclusive")
    return next((verdict for verdict in strongest if verdict in verdicts), "supported")


def collect_answers(groups: Groups) -> Answers:
    """The shares for a run, from its variants without the control, which repeats one of them."""
    blocks: dict[int, list[tuple[Samples, Samples]]] = {}
    for (_, role), series in groups.items():
        for record, times in series.measured(TIME) if role == "variant" else ():
            if tokens := get_samples(record, TOKENS):
                blocks.setdefault(record.replicate, []).append((tokens, times))
    trials = [blocks[replicate] for replicate in sorted(blocks)]
    requests = [[[*itertools.chain.from_iterable(column)] for column in zip(*one, strict=True)] for one in trials]
    means = [[[*map(fmean, column)] for column in zip(*one, strict=True)] for one in trials]
    return Answers(
        requests=explained_share([(tokens, times) for tokens, times in requests]),
        variants=explained_share([(tokens, times) for tokens, times in means]),
    )
