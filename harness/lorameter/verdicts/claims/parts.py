"""Turns a part of a claim into a statistical test, and the test's result into a sentence.

A metric along an axis is a table of logs, replicates × levels. Every level is divided by the study's reference, which
lies on every axis: paired turn by turn if the trials took turns, else by replicate. A replicate counts only if every
level of the axis has an ok trial, so that all levels are judged by the same replicates. Values are not inverted, even
if higher is better: "rises" in a claim refers to the quantity that it names. A loss whose untrained value is known is
judged by the inverse of its gain: 5 % of the gain is a difference, and 5 % of the loss may be all of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from lorameter.measurements.declaration import Samples
from lorameter.measurements.metrics import METRICS
from lorameter.records.units import count_decimals, format_count, format_ratio
from lorameter.stats import MAX_ADVISED, Pairing
from lorameter.stats.effect import from_log, log_ratios, paired_effect
from lorameter.stats.samples import Array, checked_trials
from lorameter.stats.trend import (
    Conclusion,
    Scale,
    change_magnitudes,
    judge_above,
    judge_within,
    line_change,
    negate,
)
from lorameter.studies.claim import ENGINE, OF_PAIRS, ClaimPart, Level, Rule, format_level, is_number
from lorameter.studies.study import Study, is_of_tokens
from lorameter.verdicts.series import Groups, choose_pairing

Judgement = Literal["supported", "refuted", "inconclusive", "not judged"]
MIN_SHARED = 2
"""Minimum number of replicates for judging a claim."""
_INVERTED: tuple[Rule, ...] = ("trend-down", "lowest", "best", "lowers")
"""Rules about a small ratio: its inverse is judged."""
_OF_EQUALITY: tuple[Rule, ...] = ("no-trend", "equal", "differs")
_NEGATED: tuple[Rule, ...] = ("differs", "costs-at-most")
"""Rules that state the opposite of the tested statement: not within the limit, not beyond it."""
_SHOWN_TAIL = 0.025


class NotJudgedError(Exception):
    """Raised if a part of a claim cannot be judged; the message has the reason and a remedy."""


def require_data(holds: object, message: str) -> None:
    """Raise `NotJudgedError` with the message if a condition does not hold."""
    if not holds:
        raise NotJudgedError(message)


class PartResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The judgement of one part."""

    rule: str
    axis: str
    metric: str
    about: str = ""
    """The ratio in words, such as "256 / 16"; empty if there is none."""
    verdict: Judgement
    ratio: float | None = None
    """The ratio with its uncorrected 95 % interval; the verdict may use a wider or narrower one."""
    low: float | None = None
    high: float | None = None
    tolerance: float | None = None
    """The tolerance; None if the rule has none."""
    margin: float | None = None
    by: float | None = None
    """The claimed share."""
    replicates: int = 0
    """Replicates with every level; 0 if the part was not judged."""
    skipped: int = 0
    """Replicates without some level."""
    reason: str


def make_result(part: ClaimPart, verdict: Judgement, reason: str, **found: Any) -> PartResult:
    """The result of a part, with its limit; `found` are further fields."""
    name, limit = part.limit
    limits: dict[str, Any] = {name: limit} if name else {}
    metric = " + ".join(part_metrics(part))
    return PartResult(rule=part.rule, axis=part.axis, metric=metric, verdict=verdict, reason=reason, **limits, **found)


def part_metrics(part: ClaimPart) -> tuple[str, ...]:
    """The metrics of a part."""
    return tuple(part.metrics) or (part.metric,)


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisTable:
    """Logs of one metric relative to the reference, replicates × levels."""

    axis: str
    title: str
    """The metric as text in a sentence."""
    levels: tuple[Level, ...]
    replicates: tuple[int, ...]
    skipped: int
    """Replicates in which some levels were measured and others were not."""
    logs: Array

    @property
    def names(self) -> list[str]:
        """The levels as text."""
        return [format_level(level) for level in self.levels]

    @property
    def change_phrase(self) -> str:
        """The beginning of a sentence about the change from the first level to the last."""
        return f"from {self.axis} {self.names[0]} to {self.names[-1]} {self.title} changes by"

    def keep(self, replicates: Sequence[int]) -> AxisTable:
        """The table with only these replicates."""
        logs = self.logs[[self.replicates.index(replicate) for replicate in replicates]]
        skipped = self.skipped + len(self.replicates) - len(replicates)
        return dataclasses.replace(self, replicates=tuple(replicates), skipped=skipped, logs=logs)

    def line(self, scale: Scale) -> Array:
        """The change of a straight line through the levels, from the first to the last, for each replicate."""
        return line_change(self.logs, [float(level) for level in self.levels], scale)

    def change(self, low: int, high: int) -> Array:
        """The log ratio of two levels, given by index, for each replicate."""
        return self.logs[:, high] - self.logs[:, low]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A ratio to which a part of a claim refers."""

    about: str
    """The ratio in words, such as "256 / 16"."""
    phrase: str
    """The beginning of the sentence about it."""
    logs: Array
    """Its logarithm in each replicate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One part of a claim with its data, ready to be tested at any level."""

    part: ClaimPart
    contrasts: tuple[Contrast, ...]
    skipped: int
    context: tuple[tuple[str, Array], ...]
    """Changes at the beginning of the sentence, which do not affect the decision: a text and one log ratio per
    replicate."""

    @property
    def sign(self) -> int:
        """-1 if the inverse of each ratio is judged."""
        return -1 if self.part.rule in _INVERTED else 1

    def judge(self, family: int, alpha: float) -> Conclusion:
        """The conclusion, as one of `family` statements that share the error rate `alpha`."""
        import numpy as np

        rule, by = self.part.rule, self.part.by
        limit = -math.log1p(-by) if rule == "lowers" else math.log1p(self.part.limit[1])
        values = self.sign * np.stack([contrast.logs for contrast in self.contrasts], axis=1)
        found = (judge_within if rule in _OF_EQUALITY else judge_above)(values, limit, alpha=alpha, family=family)
        return negate(found) if rule in _NEGATED else found

    def ratio(self, conclusion: Conclusion) -> tuple[float, float | None, float | None]:
        """The ratio that decided, with its 95 % interval; None for an end beyond the range of a float."""
        effect = conclusion.effect
        return math.exp(self.sign * effect.log_ratio), *self._ends(*effect.interval(_SHOWN_TAIL))

    def reason(self, conclusion: Conclusion) -> str:
        """The sentence; if inconclusive, it names the undecided contrast."""
        begin = [f"{words} ×{_centre(values)}" for words, values in self.context]
        ratio = format_ratio(*self.ratio(conclusion))
        begin.append(f"{self.contrasts[conclusion.contrast].phrase} ×{ratio}")
        low, high = self._ends(*conclusion.effect.interval(conclusion.tail))
        places = 4 if low is None or high is None else min(count_decimals((high - low) / 2), 4)
        ends = ["no bound" if end is None else f"{end:.{places}f}" for end in (low, high)]
        decision = describe_decision(self.part, "equal" if conclusion.by == "equality" else conclusion.status)
        interval = f"{100 * (1 - 2 * conclusion.tail):.4g} % interval [{', '.join(ends)}]"
        sentence = f"{'; '.join(begin)}: {decision} ({interval}){_needed(conclusion)}"
        left_out = f"; {format_count(self.skipped, 'replicate')} left out, where a level is missing"
        return sentence + (left_out if self.skipped else "")

    def _ends(self, low: float, high: float) -> tuple[float | None, float | None]:
        return (from_log(low), from_log(high)) if self.sign > 0 else (from_log(-high), from_log(-low))


def make_question(part: ClaimPart, groups: Groups, study: Study) -> Question:
    """The question of a part, for any rule except "rises".

    Raises `NotJudgedError` for losses over different tokens, for levels or a metric that were not measured, for fewer
    than two replicates in which every level is ok, and for values without a logarithm.
    """
    axes = (part.axis, *part.against)
    tables = [_tabulate(groups, study, axis, metric) for axis in axes for metric in part_metrics(part)]
    shared = sorted(set.intersection(*(set(table.replicates) for table in tables)))
    check_count(len(shared))
    tables = [table.keep(shared) for table in tables]
    of_numbers = len(tables[0].levels) > 2 and all(map(is_number, tables[0].levels))
    has_lines = part.rule == "largest-effect" or (part.rule == "equal" and of_numbers)
    lines = zip(tables, _lines(part, tables), strict=True) if has_lines else ()
    return Question(
        part=part,
        contrasts=tuple(_list_contrasts(part, tables, study)),
        skipped=max(table.skipped for table in tables),
        context=tuple((table.change_phrase, line) for table, line in lines),
    )


def _lines(part: ClaimPart, tables: Sequence[AxisTable]) -> list[Array]:
    """The line through each table; axes other than the part's own use logarithms of their levels if possible."""
    own, *others = tables
    scales: list[Scale] = ["log" if min(map(float, table.levels)) > 0 else "linear" for table in others]
    return [own.line(part.scale), *(table.line(scale) for table, scale in zip(others, scales, strict=True))]


def _list_contrasts(part: ClaimPart, tables: Sequence[AxisTable], study: Study) -> Iterator[Contrast]:
    """The ratios to which a part refers; if there are several, all of them must hold."""
    table = _add_up(part, tables) if part.rule == "best" else tables[0]
    names, places = table.names, [table.levels.index(level) for level in part.levels]
    if part.rule in ("trend-up", "trend-down", "no-trend"):
        yield Contrast(about=f"{names[-1]} / {names[0]}", phrase=table.change_phrase, logs=table.line(part.scale))
        return
    if part.rule == "largest-effect":
        own, *others = map(change_magnitudes, _lines(part, tables))
        for axis, changes in zip(part.against, others, strict=True):
            phrase = f"the change along {part.axis} over that along {axis} is"
            yield Contrast(about=f"{part.axis} / {axis}", phrase=phrase, logs=own - changes)
        return
    pairs: Iterable[Sequence[int]]
    sign, about = 1, ""
    if part.rule == "equal":
        pairs = itertools.combinations(range(len(names)), 2)
        phrase = "the largest difference is between {low} and {high},"
    elif part.rule == "differs":
        pairs, phrase = [sorted(places)], f"from {part.axis} {{low}} to {{high}} {table.title} changes by"
    elif part.rule in OF_PAIRS:
        names = [name for _, name in study.levels(part.axis)]
        pairs, phrase = [places or (0, 1)], f"{table.title} of {{high}} over that of {{low}} is"
        if part.rule == "faster":
            sign, about, phrase = -1, "speed, ", f"the speed of {{high}} over that of {{low}}, by {table.title}, is"
    else:
        pairs = [(other, places[0]) for other in range(len(names)) if other != places[0]]
        phrase = f"{table.title} at {part.axis} {{high}} over that at {{low}} is"
    for low, high in pairs:
        yield Contrast(
            about=f"{about}{names[high]} / {names[low]}",
            phrase=phrase.format(low=names[low], high=names[high]),
            logs=sign * table.change(low, high),
        )


def _add_up(part: ClaimPart, tables: Sequence[AxisTable]) -> AxisTable:
    """The weighted sum of logs, which is the log of a product of powers and is compared like any metric."""
    import numpy as np

    weights = list(part.metrics.values())
    weighted_tables = zip(weights, tables, strict=True)
    terms = (table.title if weight == 1 else f"{weight:g} × {table.title}" for weight, table in weighted_tables)
    logs = np.tensordot(weights, np.stack([table.logs for table in tables]), axes=1)
    return dataclasses.replace(tables[0], title=f"the score ({', '.join(terms)})", logs=logs)


def metric_phrase(metric: str) -> str:
    """The name of a metric in a sentence: "request" in a table is "time of request"."""
    known = METRICS[metric]
    return f"time of {known.title}" if known.unit == "s" and "time" not in known.title else known.title


def part_pair(part: ClaimPart, study: Study) -> tuple[str, str]:
    """The two variants that a rule for pairs compares: the base of the ratio, and the variant of the claim."""
    levels = dict(study.levels(part.axis))
    before, after = part.levels or tuple(levels)
    return levels[before], levels[after]


def _tabulate(groups: Groups, study: Study, axis: str, metric: str) -> AxisTable:
    import numpy as np

    known, levels = METRICS[metric], study.levels(axis)
    require_data(
        not (known.is_loss and is_of_tokens(axis)),
        f"{known.title}: levels of {axis} train on different tokens. Claim a time, or memory.",
    )
    check_levels(axis, levels, groups)
    series = [groups[name, "variant"] for name in (study.reference, *(name for _, name in levels))]
    require_data(
        any(one.measured(metric) for one in series[1:]),
        f"{known.title}: not measured in this run. Measure with the phase {known.phase}; answers until EOS need "
        "open_ended_tokens in [workload], and metrics of scripts a --command.",
    )
    pairing, untrained = choose_pairing(series[0], metric), series[0].untrained(metric)
    found = [
        {record.replicate: _invert_gains(samples, untrained) for record, samples in level.measured(metric)}
        for level in series
    ]
    replicates = set[int]().union(*found)
    complete = [one for one in sorted(replicates) if _is_complete([trials.get(one, ()) for trials in found], pairing)]
    check_count(len(complete))
    try:
        base, *others = (
            checked_trials(name, [trials[number] for number in complete], positive=True)
            for name, trials in zip(("reference", *(name for _, name in levels)), found, strict=True)
        )
        logs = np.stack([log_ratios(base, other, pairing) for other in others], axis=1)
    except ValueError as error:
        gain = "" if untrained is None else f" (1 / gain, from {untrained:.4f} before training)"
        raise NotJudgedError(f"{known.title}{gain}: {error}.") from None
    return AxisTable(
        axis=axis,
        title=metric_phrase(metric) if untrained is None else f"1 / gain in {known.title}",
        levels=tuple(level for level, _ in levels),
        replicates=tuple(complete),
        skipped=len(replicates) - len(complete),
        logs=logs,
    )


def _invert_gains(losses: Samples, untrained: float | None) -> Samples:
    """The inverse of each gain, which rises and falls as the loss does; 0, which is refused, without a gain."""
    if untrained is None:
        return losses
    return tuple(1 / (untrained - loss) if loss < untrained else 0.0 for loss in losses)


def _is_complete(trials: Sequence[Samples], pairing: Pairing) -> bool:
    """Whether every level was measured in a replicate; turns are paired one by one, so their numbers must be equal."""
    return all(trials) and (pairing != "turn" or len(set(map(len, trials))) == 1)


def check_levels(axis: str, levels: Sequence[tuple[Level, str]], groups: Groups) -> None:
    """Raise `NotJudgedError` for levels without a trial."""
    absent = [
        name if axis == ENGINE else format_level(level) for level, name in levels if (name, "variant") not in groups
    ]
    require_data(
        not absent, f"{axis} {', '.join(absent)}: no trial in this run. Measure every level: leave --variant out."
    )


def check_count(count: int) -> None:
    """Raise `NotJudgedError` if fewer than two replicates have a value at every level."""
    require_data(
        count >= MIN_SHARED,
        f"{format_count(count, 'replicate')} with every level: a claim is never judged from fewer than "
        f"{MIN_SHARED}. Measure more replicates; the report says which trials failed.",
    )


def _centre(values: Array) -> str:
    effect = paired_effect(values, "replicate")
    return format_ratio(*map(from_log, (effect.log_ratio, *effect.interval(_SHOWN_TAIL))))


def _needed(conclusion: Conclusion) -> str:
    """The replicates that would decide an inconclusive part, as text."""
    if conclusion.status != "inconclusive":
        return ""
    count = conclusion.replicates_needed
    if count is None or count > MAX_ADVISED:
        return "; no practical number of replicates would decide it"
    measured = conclusion.effect.replicates
    more = f", of which there are {measured}" if count > measured else ""
    return f"; {count} replicates would decide it{more}, if the true effect is the estimated one"


def describe_decision(part: ClaimPart, decision: str) -> str:
    """The words of a decision: supported, refuted, equal (decided by equality) or inconclusive."""
    place = ("supported", "refuted", "equal", "inconclusive").index(decision)
    return _WORDS[part.rule][place].format(limit=f"{100 * part.limit[1]:.3g} %")


_FALL = (
    "a fall of more than {limit}",
    "no fall of more than {limit}",
    "no change of more than {limit}",
    "open whether that is a fall of more than {limit}",
)
_WORDS: dict[Rule, tuple[str, str, str, str]] = {
    "trend-up": (
        "a rise of more than {limit}",
        "no rise of more than {limit}",
        "no change of more than {limit}",
        "open whether that is a rise of more than {limit}",
    ),
    "trend-down": _FALL,
    "lowers": _FALL,
    "no-trend": (
        "",
        "a change of more than {limit}",
        "no change of more than {limit}",
        "open whether that is a change of more than {limit}",
    ),
    "equal": (
        "",
        "they differ by more than {limit}",
        "no level differs from another by more than {limit}",
        "open whether all levels are within {limit} of each other",
    ),
    "differs": (
        "they differ by more than {limit}",
        "",
        "they differ by no more than {limit}",
        "open whether they differ by more than {limit}",
    ),
    "highest": (
        "above every other by more than {limit}",
        "not above that one by more than {limit}",
        "it differs from no other by more than {limit}",
        "open whether it is above every other by more than {limit}",
    ),
    "lowest": (
        "below every other by more than {limit}",
        "not below that one by more than {limit}",
        "it differs from no other by more than {limit}",
        "open whether it is below every other by more than {limit}",
    ),
    "faster": (
        "more than {limit} faster",
        "not more than {limit} faster",
        "not more than {limit} faster",
        "open whether that is more than {limit} faster",
    ),
    "costs-at-most": (
        "a rise of {limit} at most",
        "a rise of more than {limit}",
        "no change of more than {limit}",
        "open whether that is a rise of more than {limit}",
    ),
    "best": ("below every other", "not below that one", "", "open whether it is below every other"),
    "largest-effect": (
        "larger than along every other axis",
        "not larger than along that one",
        "",
        "open whether it is larger than along every other axis",
    ),
}
"""Sentences for a conclusion: supported, refuted, decided by equality (in either sense), inconclusive; `{limit}` is the
rule's limit."""
