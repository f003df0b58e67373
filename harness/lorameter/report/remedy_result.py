"""What a remedy gained, and the expected cost of the finding."""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.profile.remedy import Tried
from lorameter.records.metrics import METRICS
from lorameter.records.units import format_interval
from lorameter.report.blocks import Document, Line, Section, Span, say, say_invalid, write_ratio
from lorameter.report.notices import describe_notices
from lorameter.report.phrases import verdict_cell
from lorameter.verdicts.compare_pairs import MARGIN
from lorameter.verdicts.series import is_difference


def describe_tried(tried: Tried) -> Document:
    """The verdict on the remedy, what it gained, and what casts doubt on it."""
    changes = ", ".join(f"{key} = {value}" for key, value in tried.finding.suggestion.items())
    section = Section(
        title=f"Tried: {tried.finding.code}",
        beside=f" by {changes} ({tried.interleaving})",
        lines=tuple(_lines(tried)),
    )
    return section, *describe_notices(tried.notices)


def _lines(tried: Tried) -> Iterator[Line]:
    finding, comparison, control = tried.finding, tried.comparison, tried.control
    title = METRICS[tried.metric].title
    yield from say_invalid(_invalid(tried))
    if comparison is not None:
        ratio = f"{title} with the remedy over without: {write_ratio(comparison).line} "
        found = verdict_cell(comparison, tried.metric, MARGIN, "variants")
        yield say(ratio, Span(text=found.said or found.verdict if tried.valid else "invalid", tone="strong"))
        yield say(Span(text=comparison.reason, tone="faint"))
    if finding.cost_share is not None and comparison is not None and comparison.ratio is not None:
        of = "a step" if tried.metric == "step_time_s" else f"the {title}"
        part = "a step" if finding.metric == "step_time_s" else f"the {METRICS[finding.metric].title}"
        seen = f"the diagnosis had seen {finding.cost_share:.1%} of {part} hang on it"
        yield say(f"gained {_gain(comparison.ratio, comparison.low, comparison.high)} of {of}; {seen}")
    if control is not None:
        cell = verdict_cell(control, tried.metric, MARGIN, "variants")
        said = f"{write_ratio(control).line} {cell.said or cell.verdict}"
        yield say(f"control (the present variant measured twice): {said}")
    for failure in tried.failures:
        yield say(Span(text=failure, tone="bad"))
    yield say(f"run {tried.run}")


def _invalid(tried: Tried) -> str | None:
    """Why the comparison does not count; None where it does."""
    if tried.valid:
        return None
    if tried.failures:
        return tried.failures[0]
    if tried.control is not None and is_difference(tried.control):
        return "the control differs from itself"
    return f"see `lorameter report {tried.run}`"


def _gain(ratio: float, low: float | None, high: float | None) -> str:
    """What a ratio of times leaves of the time, in per cent; the interval's ends change places."""
    ends = [None if end is None else 100 * (1 - end) for end in (high, low)]
    return f"{format_interval(100 * (1 - ratio), ends[0], ends[1], '1')} %"
