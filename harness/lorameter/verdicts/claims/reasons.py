"""One sentence for each part of a claim: the ratio with its interval, and what followed from which interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorameter.records.units import decimals, format_count, format_ratio
from lorameter.stats import MOST_ADVISED
from lorameter.stats.effect import from_log, paired_effect
from lorameter.stats.statement import Conclusion
from lorameter.studies.claim import Rule
from lorameter.verdicts.claims.questions import Question

_SHOWN_TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """What a conclusion is in words; `{limit}` is the rule's limit."""

    supported: str
    refuted: str
    equal: str
    """Where it is decided by equality, whichever way."""
    open: str


_WORDS: dict[Rule, _Words] = {
    "trend-up": _Words(
        supported="a rise of more than {limit}",
        refuted="no rise of more than {limit}",
        equal="no change of more than {limit}",
        open="open whether that is a rise of more than {limit}",
    ),
    "trend-down": _Words(
        supported="a fall of more than {limit}",
        refuted="no fall of more than {limit}",
        equal="no change of more than {limit}",
        open="open whether that is a fall of more than {limit}",
    ),
    "no-trend": _Words(
        supported="",
        refuted="a change of more than {limit}",
        equal="no change of more than {limit}",
        open="open whether that is a change of more than {limit}",
    ),
    "equal": _Words(
        supported="",
        refuted="they differ by more than {limit}",
        equal="no level differs from another by more than {limit}",
        open="open whether all levels are within {limit} of each other",
    ),
    "differs": _Words(
        supported="they differ by more than {limit}",
        refuted="",
        equal="they differ by no more than {limit}",
        open="open whether they differ by more than {limit}",
    ),
    "highest": _Words(
        supported="above every other by more than {limit}",
        refuted="not above that one by more than {limit}",
        equal="it differs from no other by more than {limit}",
        open="open whether it is above every other by more than {limit}",
    ),
    "lowest": _Words(
        supported="below every other by more than {limit}",
        refuted="not below that one by more than {limit}",
        equal="it differs from no other by more than {limit}",
        open="open whether it is below every other by more than {limit}",
    ),
    "faster": _Words(
        supported="more than {limit} faster",
        refuted="not more than {limit} faster",
        equal="not more than {limit} faster",
        open="open whether that is more than {limit} faster",
    ),
    "lowers": _Words(
        supported="a fall of more than {limit}",
        refuted="no fall of more than {limit}",
        equal="no change of more than {limit}",
        open="open whether that is a fall of more than {limit}",
    ),
    "costs-at-most": _Words(
        supported="a rise of {limit} at most",
        refuted="a rise of more than {limit}",
        equal="no change of more than {limit}",
        open="open whether that is a rise of more than {limit}",
    ),
    "best": _Words(
        supported="below every other",
        refuted="not below that one",
        equal="",
        open="open whether it is below every other",
    ),
    "largest-effect": _Words(
        supported="larger than along every other axis",
        refuted="not larger than along that one",
        equal="",
        open="open whether it is larger than along every other axis",
    ),
}


def reason_of(question: Question, conclusion: Conclusion) -> str:
    """The sentence; for an open question it names the contrast that is undecided."""
    begin = [f"{words} ×{_centre(values)}" for words, values in question.context]
    begin.append(f"{question.says[conclusion.contrast]} ×{format_ratio(*ratio_of(question, conclusion))}")
    interval = f"{100 * conclusion.level:.4g} % interval {_interval(question, conclusion)}"
    said = f"{'; '.join(begin)}: {_decision(question, conclusion)} ({interval})"
    return f"{said}{_needed(conclusion)}{format_skipped(question.skipped)}"


def _needed(conclusion: Conclusion) -> str:
    """What it would take to decide an open question."""
    if conclusion.status != "inconclusive":
        return ""
    count = conclusion.replicates_needed
    if count is None or count > MOST_ADVISED:
        return "; no practical number of replicates would decide it"
    more = f", of which there are {conclusion.replicates}" if count > conclusion.replicates else ""
    return f"; {count} replicates would decide it{more}, if it is what it looks like"


def ratio_of(question: Question, conclusion: Conclusion) -> tuple[float, float | None, float | None]:
    """The ratio that it is about, with its 95 % interval; None where an end is larger than a float holds."""
    low, high = _turned(question, conclusion.low, conclusion.high)
    return math.exp(question.sign * conclusion.estimate), low, high


def format_skipped(count: int) -> str:
    """What to say of replicates that do not count."""
    return f"; {format_count(count, 'replicate')} left out, where a level is missing" if count else ""


def _turned(question: Question, low: float, high: float) -> tuple[float | None, float | None]:
    ends = (low, high) if question.sign > 0 else (-high, -low)
    return from_log(ends[0]), from_log(ends[1])


def _decision(question: Question, conclusion: Conclusion) -> str:
    words = _WORDS[question.part.rule]
    if conclusion.by == "equality":
        said = words.equal
    else:
        said = {"supported": words.supported, "refuted": words.refuted, "inconclusive": words.open}[conclusion.status]
    return said.format(limit=f"{100 * question.part.limit[1]:.3g} %")


def _centre(values: object) -> str:
    effect = paired_effect(values, "replicate")  # type: ignore[arg-type]
    if effect.spread is None:
        return format_ratio(from_log(effect.log_ratio), None, None)
    half = effect.spread.half_width(_SHOWN_TAIL)
    return format_ratio(
        from_log(effect.log_ratio), from_log(effect.log_ratio - half), from_log(effect.log_ratio + half)
    )


def _interval(question: Question, conclusion: Conclusion) -> str:
    """The interval that decided, or failed to."""
    low, high = _turned(question, conclusion.decided_low, conclusion.decided_high)
    if low is None or high is None:
        return f"[{'no bound' if low is None else f'{low:.3g}'}, no bound]"
    places = min(decimals((high - low) / 2), 4)
    return f"[{low:.{places}f}, {high:.{places}f}]"
