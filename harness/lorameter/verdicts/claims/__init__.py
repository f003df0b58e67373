"""The judgements of a study's claims: supported, refuted, inconclusive or not judged, each with its reason.

A claim is the conjunction of its parts: supported if every part is supported, refuted if any part is, not judged if
some part is not judged and none is refuted, else inconclusive. All parts of a run that assert a difference share one
error rate of 5 % (Holm); each assertion of equality has an error rate of 5 %, as everywhere
(`lorameter.stats.trend`).

If the reference differs from itself in a metric, or in the primary metric of its phase, nothing is asserted about that
metric. If it is not equivalent to itself, no equality is asserted. A run can be judged at any time, from its records so
far.

Two kinds of parts need no test: counted quantities, which are exact, and peaks of training memory. A peak takes one of
a few values (`lorameter.stats.compare_bytes`): the ratios of the replicates have a range, and a claim holds if the
whole range is below the claimed ratio, and fails if none of it is.

On a CPU the peak is the resident memory of the process, including the interpreter and the libraries. These are part of
both sides and dilute a saving: an observed saving is real, but its absence proves nothing. So on a CPU a claim is
supported or not judged, and never refuted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import msgspec

from lorameter.errors import require
from lorameter.measurements.declaration import Samples
from lorameter.measurements.metrics import METRICS, PEAKS, PHASES, PRIMARY, get_samples
from lorameter.measurements.peaks import RSS_AT_START
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_bytes, format_ratio
from lorameter.stats import Comparison, ShareEstimate, explained_share, holm_step_down
from lorameter.stats.trend import Conclusion
from lorameter.studies.claim import ENGINE, PEAK, ClaimPart, format_level
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.verdicts.claims.engines import EngineEvidence, check_comparable, collect_evidence
from lorameter.verdicts.claims.parts import (
    Judgement,
    NotJudgedError,
    Question,
    check_count,
    check_levels,
    describe_decision,
    make_question,
    make_result,
    metric_phrase,
    part_metrics,
    part_pair,
    require_data,
)
from lorameter.verdicts.claims.parts import PartResult as PartResult
from lorameter.verdicts.series import Groups, compare_control, group_trials, is_difference

Controls = Mapping[str, Comparison | None]
"""The comparison of the reference with itself, by metric; None if it was not measured."""
TOKENS, TIME = "open_ended_tokens", "open_ended_request_time_s"
_DEVICE, _HOST = PEAKS["train"]


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
        title=study.headline,
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
                require_data(
                    not (claim.pretrained and random_weights),
                    "random weights: losses and answers say nothing. Measure a pretrained model.",
                )
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
        lambda key, left: questions[key].judge(left, study.protocol.alpha),
        is_decided=lambda conclusion: conclusion.by == "difference",
    )
    for key, question in questions.items():
        conclusion = conclusions.get(key) or question.judge(1, study.protocol.alpha)
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
    return {
        name: compare_control(groups, study.reference, name, family=len(family), alpha=study.protocol.alpha)
        for family in (primaries, others)
        for name in family
    }


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


# --- parts without a test ---------------------------------------------------------------------------------------------


def judge_counts(part: ClaimPart, groups: Groups, study: Study) -> PartResult:
    """Judge whether the smallest value of each level is above the largest value of the previous level.

    Memory counts come from isolated trials, of which a run may have few; the requirement of two replicates applies to
    the run. Raises `NotJudgedError` if levels or the quantity were not measured.
    """
    axis, quantity, levels = part.axis, part.metric, study.levels(part.axis)
    check_levels(axis, levels, groups)
    series = [groups[name, "variant"].ok for _, name in levels]
    replicates = set.intersection(*({record.replicate for record in one} for one in series))
    check_count(len(replicates))
    found = [
        {source[quantity] for record in one for source in (record.values, record.memory) if quantity in source}
        for one in series
    ]
    require_data(all(found), f"{quantity} was not measured at every level of {axis}. Measure with the phase train.")
    texts = [" to ".join(f"{value:,.0f}" for value in sorted({min(values), max(values)})) for values in found]
    named = (f"{text} at {format_level(level)}" for text, (level, _) in zip(texts, levels, strict=True))
    values_text = f"{texts[0]} at every level of {axis}" if len(set(texts)) == 1 else f"by {axis}, {', '.join(named)}"
    rises = all(max(before) < min(after) for before, after in itertools.pairwise(found))
    reason = f"{quantity}: {values_text}"
    return make_result(part, "supported" if rises else "refuted", reason, replicates=len(replicates))


def judge_peaks(part: ClaimPart, groups: Groups, study: Study) -> PartResult:
    """Judge a part about memory, whose rule is "lowers" or "costs-at-most".

    Raises `NotJudgedError` unless both variants have peaks of two replicates, and on a CPU if the resident memory of
    the process may hide a saving or a cost.
    """

    def records_of(name: str, role: str = "variant") -> tuple[TrialRecord, ...]:
        return groups[name, role].ok if (name, role) in groups else ()  # type: ignore[index]

    without, name = part_pair(part, study)
    sides = [records_of(name), records_of(without)]
    on_device = any(_DEVICE in record.memory for side in sides for record in side)
    kind = part.metric if part.metric != PEAK else _DEVICE if on_device else _HOST
    resident = kind.startswith("host_")
    ours, theirs = (_peaks(side, kind) for side in sides)
    both = ours.keys() & theirs.keys()
    check_count(len(both))
    control, reference = _peaks(records_of(study.reference, "control"), kind), _peaks(records_of(study.reference), kind)
    # The difference of the reference from itself widens the range, because all trials are observed in the same way.
    control_ratios = [control[replicate] / reference[replicate] for replicate in control.keys() & reference.keys()]
    distance = max([1.0, *control_ratios, *(1 / ratio for ratio in control_ratios)])
    ratios = [ours[replicate] / theirs[replicate] for replicate in both]
    low, high = min(ratios) / distance, max(ratios) * distance
    ratio = max(ours[one] for one in both) / max(theirs[one] for one in both)
    what = f"{'device' if on_device else 'resident'} peak" if part.metric == PEAK else kind
    sentence = (
        f"{what} {_sizes(ours.values())} in {name}, {_sizes(theirs.values())} in {without}, "
        f"×{format_ratio(ratio, low, high)} by the range of the replicates"
    )
    require_data(
        control or not resident,
        f"{sentence}: the reference was not measured twice, so the scatter of resident peaks is not "
        "known. Measure its control too.",
    )
    verdict = _decide(part, low, high)
    words = describe_decision(part, verdict)
    if resident:
        start_sizes = [record.memory[RSS_AT_START] for record in sides[0] if RSS_AT_START in record.memory]
        start_note = f", {format_bytes(max(start_sizes))} of which it begins with" if start_sizes else ""
        saving = part.rule == "lowers"
        lost = "a saving can be lost, so it refutes" if saving else "a cost can be lost, so it supports"
        require_data(
            verdict == ("supported" if saving else "refuted"),
            f"{sentence}: on a CPU the peak is the resident memory of the process{start_note}, in which {lost} "
            "nothing. Measure on a GPU.",
        )
        words += f", although the process holds more (on a CPU the peak is its resident memory{start_note})"
    about = f"{name} / {without}"
    found = {"ratio": ratio, "low": low, "high": high, "replicates": len(both)}
    return make_result(part, verdict, f"{sentence}: {words}", about=about, **found)


def _decide(part: ClaimPart, low: float, high: float) -> Judgement:
    """Decide by the range of the ratios: completely on one side of the claimed ratio, or inconclusive."""
    lowers = part.rule == "lowers"
    limit = 1 - part.by if lowers else 1 + part.by
    if high < limit or (high == limit and not lowers):
        return "supported"
    return "refuted" if low > limit or (low == limit and lowers) else "inconclusive"


def _peaks(records: Iterable[TrialRecord], kind: str) -> dict[int, int]:
    """The peak of each replicate, if measured."""
    return {record.replicate: record.memory[kind] for record in records if record.memory.get(kind)}


def _sizes(peaks: Iterable[int]) -> str:
    low, high = format_bytes(min(peaks)), format_bytes(max(peaks))
    return high if low == high else f"{low} to {high}"
