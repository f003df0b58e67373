"""Phrases for verdicts and notices in reports; programs get the documented machine-readable words.

Variants are slower or faster than each other, larger or smaller, higher or lower; a candidate has regressed or improved
compared with its base. An inconclusive verdict is a sentence with the range of the effect, the smallest detectable
difference, and advice, which never asks for hundreds of replicates.

Notices of the same kind form one line with their remedy, which expands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from lorameter.measurements.metrics import METRICS, PHASE_WORDS, PHASES, is_difference_metric
from lorameter.records.record import Interleaving, Notice
from lorameter.records.units import format_percent
from lorameter.report.blocks import Cell, Collapsible, Document, Line, Section, Span, to_line, write_ratio, write_share
from lorameter.stats import MAX_ADVISED, Comparison, VerdictRule
from lorameter.studies.workload import Workload
from lorameter.verdicts.compare import ComparisonRow
from lorameter.verdicts.series import is_memory

_LIMITS = VerdictRule()

_KIND = re.compile(rf"(host|device)_(peak|peak_allocated|peak_reserved)_({'|'.join(PHASES)})_bytes")


def _direction_words(metric: str) -> tuple[str, str]:
    """The words for a worse and a better metric; an unknown metric counts as a time."""
    if is_memory(metric):
        return "larger", "smaller"
    if metric not in METRICS or METRICS[metric].unit in ("s", "1/s"):
        return "slower", "faster"
    return ("lower", "higher") if METRICS[metric].higher_is_better else ("higher", "lower")


def metric_title(metric: str) -> str:
    """The title of a metric or of a kind of memory; for an unknown one its name."""
    if metric in METRICS:
        return METRICS[metric].title
    if found := _KIND.fullmatch(metric):
        return f"{found[1]} {found[2].replace('_', ' ')}, {PHASE_WORDS[found[3]]}"
    return metric


def ratio_title(metric: str) -> str:
    """The title of a metric's ratio; for a rate the ratio is inverted, so that above 1 is a slow-down."""
    turned = metric in METRICS and METRICS[metric].higher_is_better and not is_difference_metric(metric)
    return f"{metric_title(metric)}, slow-down" if turned else metric_title(metric)


def describe_request(workload: Workload) -> str:
    """Tokens of a request: of its prompt and new ones, times the number of prompts."""
    tokens = f"{workload.prompt_tokens} + {workload.new_tokens}"
    return tokens if workload.request_batch == 1 else f"{workload.request_batch} × ({tokens})"


def verdict_cell(
    comparison: Comparison,
    metric: str,
    kind: Literal["variants", "sides"],
    limits: VerdictRule | ComparisonRow = _LIMITS,
) -> Cell:
    """The verdict on two variants of a study, or on a candidate and its base, as one word; equivalence with its
    margin."""
    margin = limits.tolerance if is_memory(metric) else limits.margin
    of_gain = " of the gain" if comparison.share is not None else ""
    within = f"{margin:g} {METRICS[metric].unit}" if comparison.difference is not None else format_percent(margin)
    words = {
        "equivalent": f"equivalent ±{within}{of_gain}" if margin else "equal",
        "no_baseline": "no baseline",
        "not_comparable": "not comparable",
    }
    if kind == "variants":
        words["regressed"], words["improved"] = _direction_words(metric)
    return Cell(verdict=comparison.verdict, verdict_text=words.get(comparison.verdict, ""))


def format_verdict(comparison: Comparison | None, metric: str = "") -> str:
    """A ratio or difference between variants with its interval, and its verdict; the reason if there is none."""
    if comparison is None or comparison.value is None:
        return "not measured" if comparison is None else f"not measured: {comparison.reason}"
    return f"{write_ratio(comparison).line} {verdict_cell(comparison, metric, 'variants').words}"


def explain_inconclusive(comparison: Comparison, metric: str, interleaving: Interleaving = "replicates") -> str:
    """The range of an inconclusive effect, the smallest detectable difference, and advice, which depends on whether
    both sides were measured in one run; for a loss its reason."""
    if (metric in METRICS and METRICS[metric].is_loss) or comparison.difference is not None:
        return f"{comparison.reason}."
    if comparison.low is None or comparison.high is None:
        return "one replicate gives no interval. Measure 5."
    detectable = (
        "" if comparison.mde80 is None else f"; smallest detectable difference: {format_percent(comparison.mde80)}"
    )
    between = " and ".join(_effect(end, metric) for end in (comparison.low, comparison.high))
    return f"between {between}{detectable}. {_advice(comparison, interleaving)}"


def _advice(comparison: Comparison, interleaving: Interleaving) -> str:
    if interleaving == "separate":
        return "Use `lorameter ab`, or stop other work."
    if comparison.replicates_needed is not None and comparison.replicates_needed <= MAX_ADVISED:
        return f"Measure {comparison.replicates_needed} replicates, or stop other work."
    return "Stop other work, or measure more turns (turns in [protocol])."


def format_effect(comparison: Comparison, metric: str) -> tuple[str, str]:
    """The effect in per cent, and its interval: "3.9 % slower", " [+3.7 %, +4.2 %]". Empty without a ratio; the
    interval is omitted if both ends look the same, as for computed bytes."""
    if comparison.share is not None:
        share, interval = write_share(comparison.share, comparison.low, comparison.high)
        return f"learned {share} of the gain", f" {interval}"
    if comparison.difference is not None:
        cell = write_ratio(comparison)
        return f"{cell.text} {METRICS[metric].unit}", f" {cell.interval}"
    if comparison.ratio is None:
        return "", ""
    found = [end for end in (comparison.low, comparison.high) if end is not None]
    ends = [f"{'+' if end >= 1 else '−'}{format_percent(abs(end - 1))}" for end in found]
    interval = f" [{', '.join(ends)}]" if len(set(ends)) == 2 else ""
    return _effect(comparison.ratio, metric), interval


def _effect(ratio: float, metric: str) -> str:
    worse, better = _direction_words(metric)
    return f"{format_percent(abs(ratio - 1))} {worse if ratio >= 1 else better}"


def describe_notices(notices: Sequence[Notice]) -> Document:
    """A line for each kind of notice, in order; empty without notices."""
    collapsibles = []
    for code in dict.fromkeys(notice.code for notice in notices):
        same_kind = [notice for notice in notices if notice.code == code]
        more = f" (and {len(same_kind) - 1} more)" if len(same_kind) > 1 else ""
        summary = _write_notice(same_kind[0], more)
        collapsibles.append(Collapsible(summary=summary, lines=tuple(map(_write_notice, same_kind))))
    return (Section(title="Notices"), *collapsibles) if collapsibles else ()


def warn_before_run(notices: Sequence[Notice]) -> Document:
    """All notices in full, before the measurement, when the user can still act on them."""
    return (Section(title="Notices", lines=tuple(map(_write_notice, notices))),) if notices else ()


def _write_notice(notice: Notice, more: str = "") -> Line:
    code, remedy = Span(text=f"{notice.code}{more}", tone="warning"), Span(text=notice.remedy, tone="faint")
    return to_line(code, f"  {notice.message} ", remedy)
