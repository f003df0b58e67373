"""From a part of a claim to what the statistics are asked, what the control allows it to say, and its sentence.

If the reference differs from itself in a metric, or in the primary one of its phase, nothing is asserted on it.
If it is not equivalent to itself, no equality is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorameter.errors import InvalidRunError
from lorameter.records.metrics import METRICS, PHASES, PRIMARY
from lorameter.records.units import decimals, format_count, format_ratio
from lorameter.stats import MOST_ADVISED, Comparison
from lorameter.stats.effect import from_log, paired_effect
from lorameter.stats.statement import Conclusion, beyond, opposite, within
from lorameter.stats.trend import Scale, leads, line_change, pair_differences, pairs, scores, sizes
from lorameter.studies.claim import OF_PAIRS, ClaimPart, Rule, is_number, say_level
from lorameter.studies.study import Study
from lorameter.verdicts.claims.values import AxisLogs, axis_logs, common, pair_of
from lorameter.verdicts.series import Groups, control_of, is_difference

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One part of a claim, ready to be judged at any level."""

    part: ClaimPart
    asks: Literal["beyond", "within", "outside", "not beyond"]
    """Whether the contrasts are beyond the part's limit, all within it, not within it, or not beyond it."""
    contrasts: NDArray[float64]
    """Logs of ratios, replicates × contrasts."""
    sign: int
    """-1 where a contrast is turned over, so that `beyond` asks for the direction of the claim."""
    about: tuple[str, ...]
    """What ratio each contrast is, before it was turned over: "256 / 16"."""
    says: tuple[str, ...]
    """The beginning of the sentence that gives this ratio."""
    skipped: int
    context: tuple[tuple[str, NDArray[float64]], ...] = ()
    """Changes that the sentence begins with and that decide nothing: words, and log ratios one a replicate."""

    def judged(self, family: int) -> Conclusion:
        """The conclusion, as one of so many statements that share the error rate."""
        limit = log_limit(self.part)
        if self.asks in ("beyond", "not beyond"):
            found = beyond(self.contrasts, limit, family=family)
            return found if self.asks == "beyond" else opposite(found)
        found = within(self.contrasts, limit, family=family)
        return found if self.asks == "within" else opposite(found)


def log_limit(part: ClaimPart) -> float:
    """The limit of a part as the log of a ratio, above zero."""
    return -math.log1p(-part.by) if part.rule == "lowers" else math.log1p(part.limit[1])


def question_of(part: ClaimPart, groups: Groups, study: Study, planned: Collection[str]) -> Question:
    """The question of a part, any rule but "rises". Raises `NotJudgedError` as `values.axis_logs` does."""
    if part.rule == "best":
        return _best(part, [axis_logs(groups, study, part.axis, metric, planned) for metric in part.metrics])
    table = axis_logs(groups, study, part.axis, part.metric, planned)
    if part.rule == "largest-effect":
        others = [axis_logs(groups, study, axis, part.metric, planned) for axis in part.against]
        return _largest(part, [table, *others])
    if part.rule in ("trend-up", "trend-down", "no-trend"):
        return _trend(part, table)
    if part.rule == "equal":
        return _equal(part, table)
    if part.rule in OF_PAIRS:
        return _promised(part, table, study)
    return _differs(part, table) if part.rule == "differs" else _extreme(part, table, spoken(part.metric))


def spoken(metric: str) -> str:
    """What a metric is called in a sentence: a table's "request" is the time of one."""
    known = METRICS[metric]
    return f"time of {known.title}" if known.unit == "s" and "time" not in known.title else known.title


def _trend(part: ClaimPart, table: AxisLogs) -> Question:
    sign = -1 if part.rule == "trend-down" else 1
    return Question(
        part=part,
        asks="within" if part.rule == "no-trend" else "beyond",
        contrasts=sign * _line(table, part.scale)[:, None],
        sign=sign,
        about=(f"{say_level(table.levels[-1])} / {say_level(table.levels[0])}",),
        says=(_along(spoken(part.metric), table),),
        skipped=table.skipped,
    )


def _equal(part: ClaimPart, table: AxisLogs) -> Question:
    names = [say_level(level) for level in table.levels]
    lined = len(names) > 2 and all(map(is_number, table.levels))
    return Question(
        part=part,
        asks="within",
        contrasts=pair_differences(table.logs),
        sign=1,
        about=tuple(f"{names[high]} / {names[low]}" for low, high in pairs(len(names))),
        says=tuple(
            f"the largest difference is between {names[low]} and {names[high]}," for low, high in pairs(len(names))
        ),
        skipped=table.skipped,
        context=((_along(spoken(part.metric), table), _line(table, part.scale)),) if lined else (),
    )


def _differs(part: ClaimPart, table: AxisLogs) -> Question:
    low, high = sorted(part.levels, key=table.levels.index)
    change = table.logs[:, table.levels.index(high)] - table.logs[:, table.levels.index(low)]
    return Question(
        part=part,
        asks="outside",
        contrasts=change[:, None],
        sign=1,
        about=(f"{say_level(high)} / {say_level(low)}",),
        says=(f"from {part.axis} {say_level(low)} to {say_level(high)} {spoken(part.metric)} changes by",),
        skipped=table.skipped,
    )


def _promised(part: ClaimPart, table: AxisLogs, study: Study) -> Question:
    """The variant with the engine over the reference, or the second of a pair over the first; of a time that is to be
    shorter the speed, which is promised."""
    without, name = pair_of(part, study)
    places = [table.levels.index(level) for level in part.levels] or [0, 1]
    change = table.logs[:, places[1]] - table.logs[:, places[0]]
    title = spoken(part.metric)
    faster = part.rule == "faster"
    sign = -1 if part.rule == "lowers" else 1
    says = f"the speed of {name} over that of {without}, by {title}, is" if faster else (
        f"{title} of {name} over that of {without} is"
    )  # fmt: skip
    return Question(
        part=part,
        asks="not beyond" if part.rule == "costs-at-most" else "beyond",
        contrasts=(-change if faster else sign * change)[:, None],
        sign=sign,
        about=(f"speed, {name} / {without}" if faster else f"{name} / {without}",),
        says=(says,),
        skipped=table.skipped,
    )


def _extreme(part: ClaimPart, table: AxisLogs, title: str) -> Question:
    """A level against each other one: "highest", "lowest" and, of a score, "best"."""
    (level,) = part.levels
    sign = 1 if part.rule == "highest" else -1
    others = [say_level(other) for other in table.levels if other != level]
    return Question(
        part=part,
        asks="beyond",
        contrasts=sign * leads(table.logs, table.levels.index(level)),
        sign=sign,
        about=tuple(f"{say_level(level)} / {other}" for other in others),
        says=tuple(f"{title} at {part.axis} {say_level(level)} over that at {other} is" for other in others),
        skipped=table.skipped,
    )


def _best(part: ClaimPart, tables: Sequence[AxisLogs]) -> Question:
    """The weighted sum of logs is itself the log of a product of powers, so it is compared as any metric."""
    import numpy as np

    shared = common(tables)
    logs = np.tensordot(list(part.metrics.values()), np.stack([table.logs for table in shared]), axes=1)
    terms = (spoken(name) if weight == 1 else f"{weight:g} × {spoken(name)}" for name, weight in part.metrics.items())
    first = shared[0]
    score = AxisLogs(
        axis=first.axis,
        levels=first.levels,
        replicates=first.replicates,
        skipped=max(table.skipped for table in shared),
        logs=logs,
    )
    return _extreme(part, score, f"the score ({', '.join(terms)})")


def _largest(part: ClaimPart, tables: Sequence[AxisLogs]) -> Question:
    import numpy as np

    shared = common(tables)
    least = [min(map(float, table.levels)) for table in shared[1:]]
    scales: list[Scale] = [part.scale, *("log" if one > 0 else "linear" for one in least)]
    lines = [_line(table, scale) for table, scale in zip(shared, scales, strict=True)]
    own, *others = map(sizes, lines)
    title = spoken(part.metric)
    return Question(
        part=part,
        asks="beyond",
        contrasts=np.stack([own - other for other in others], axis=1),
        sign=1,
        about=tuple(f"{part.axis} / {axis}" for axis in part.against),
        says=tuple(f"the change along {part.axis} over that along {axis} is" for axis in part.against),
        skipped=max(table.skipped for table in shared),
        context=tuple((_along(title, table), line) for table, line in zip(shared, lines, strict=True)),
    )


def _line(table: AxisLogs, scale: Scale) -> NDArray[float64]:
    return line_change(table.logs, scores([float(level) for level in table.levels], scale))


def _along(title: str, table: AxisLogs) -> str:
    return f"from {table.axis} {say_level(table.levels[0])} to {say_level(table.levels[-1])} {title} changes by"


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


Controls = Mapping[str, Comparison | None]
"""By metric, the reference against itself; None where it was not measured."""


def controls_of(groups: Groups, study: Study, phases: Sequence[str]) -> Controls:
    """The primary metric of each phase as the report of the run has it, then every other metric that is claimed.

    Either group shares an error rate of 5 %, so identical code seldom fails.
    """
    primaries = [PRIMARY[phase] for phase in PHASES if phase in phases]
    claimed = dict.fromkeys(name for claim in study.claims for part in claim.parts for name in metrics_of(part))
    others = [name for name in claimed if name in METRICS and name not in primaries]
    return {
        name: _against_itself(groups, study.reference, name, len(family))
        for family in (primaries, others)
        for name in family
    }


def _against_itself(groups: Groups, reference: str, metric: str, family: int) -> Comparison | None:
    try:
        return control_of(groups, reference, metric, family=family)
    except InvalidRunError:  # values without a logarithm have no ratio, and what is claimed of them is not judged
        return None


def metrics_of(part: ClaimPart) -> tuple[str, ...]:
    """The metrics that a part is about."""
    return tuple(part.metrics) or (part.metric,)


def failed(control: Comparison | None) -> bool:
    """Whether the reference differs from itself."""
    return control is not None and is_difference(control)


def doubt(part: ClaimPart, controls: Controls) -> str:
    """Why nothing may be asserted of a part; empty where it may."""
    for metric in metrics_of(part):
        for name in dict.fromkeys((metric, PRIMARY[METRICS[metric].phase])):
            found = controls.get(name)
            if found is not None and failed(found):
                ratio = format_ratio(found.ratio, found.low, found.high)
                return f"the control differs from itself in {spoken(name)}, ×{ratio}, so the claim is not judged"
    return ""


def doubt_of_equality(part: ClaimPart, controls: Controls) -> str:
    """Why no equality may be asserted of a part; empty where it may."""
    for metric in metrics_of(part):
        found = controls.get(metric)
        if found is None or found.verdict != "equivalent":
            return f"the control is not equivalent to itself in {spoken(metric)}, so nothing is called equal"
    return ""
