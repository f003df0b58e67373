"""From a part of a claim to what the statistics are asked: a statement on contrasts, one number a replicate."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorameter.records.metrics import METRICS
from lorameter.stats.statement import Conclusion, beyond, opposite, within
from lorameter.stats.trend import Scale, leads, line_change, pair_differences, pairs, scores, sizes
from lorameter.studies.claim import OF_PAIRS, ClaimPart, is_number, say_level
from lorameter.studies.study import Study
from lorameter.verdicts.claims.values import AxisLogs, axis_logs, common, pair_of
from lorameter.verdicts.series import Groups

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
