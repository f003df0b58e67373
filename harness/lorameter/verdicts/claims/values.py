"""What a claim is judged from: one metric along one axis as a table of logs, replicates × levels.

Every level stands against the study's reference, which lies on every axis: paired turn by turn where they took turns,
else by replicate. A replicate counts only if every level of the axis has a trial that is ok, so that no level is judged
by replicates that another did not see; how many were left out is said. Values are those measured, not turned over where
more is better: a claim says "rises" of the quantity that it names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from lorameter.records.metrics import METRICS, SCRIPT_ONLY_METRICS, samples_of
from lorameter.records.record import TrialRecord
from lorameter.stats import ShareEstimate, explained_share
from lorameter.stats.effect import log_ratios
from lorameter.stats.samples import checked_trials
from lorameter.studies.claim import ENGINE, ClaimPart, Level, say_level
from lorameter.studies.study import Study, is_of_tokens
from lorameter.verdicts.series import Groups, Series, pairing_of

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

LEAST_SHARED = 2


class NotJudgedError(Exception):
    """Why a part of a claim cannot be judged, with what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLogs:
    """Logs of one metric over the reference's, replicates × levels."""

    axis: str
    levels: tuple[Level, ...]
    replicates: tuple[int, ...]
    skipped: int
    """Replicates in which some level was measured and another was not."""
    logs: NDArray[float64]

    def keep(self, replicates: Collection[int]) -> AxisLogs:
        """The table of these replicates only."""
        rows = [index for index, replicate in enumerate(self.replicates) if replicate in replicates]
        return dataclasses.replace(
            self,
            replicates=tuple(self.replicates[row] for row in rows),
            skipped=self.skipped + len(self.replicates) - len(rows),
            logs=self.logs[rows],
        )


def axis_logs(groups: Groups, study: Study, axis: str, metric: str, planned: Collection[str]) -> AxisLogs:
    """The table of a metric along an axis; `planned` are the variants that the run set out to measure.

    Raises `NotJudgedError` for a loss of other tokens, for levels or a metric that were not measured, for fewer than
    two replicates in which every level is ok, and for values that have no logarithm.
    """
    import numpy as np

    if METRICS[metric].is_loss and is_of_tokens(axis):
        raise NotJudgedError(
            f"{METRICS[metric].title}: along {axis} it is that of other tokens. Claim a time, or memory."
        )
    levels = study.levels(axis)
    series = [found for _, name in levels if (found := groups.get((name, "variant")))]
    _check_selected(axis, levels, groups, planned)
    if not any(one.measuring(metric) for one in series):
        raise NotJudgedError(_unmeasured(metric, study))
    reference = groups[study.reference, "variant"]
    by_replicate = [{record.replicate: record for record in one.measuring(metric)} for one in (reference, *series)]
    by_turn = pairing_of(reference, metric) == "turn"
    seen = set().union(*by_replicate)
    replicates = tuple(
        sorted(one for one in seen if _complete([table.get(one) for table in by_replicate], metric, by_turn))
    )
    _check_count(len(replicates), axis, levels, groups)
    base, *others = ([samples_of(table[one], metric) for one in replicates] for table in by_replicate)
    try:
        ours = checked_trials("reference", base, positive=True)
        columns = [
            log_ratios(ours, checked_trials(name, trials, positive=True), "turn" if by_turn else "replicate")
            for (_, name), trials in zip(levels, others, strict=True)
        ]
    except ValueError as error:
        raise NotJudgedError(f"{METRICS[metric].title}: {error}.") from None
    return AxisLogs(
        axis=axis,
        levels=tuple(level for level, _ in levels),
        replicates=replicates,
        skipped=len(seen) - len(replicates),
        logs=np.stack(columns, axis=1),
    )


def counts(
    groups: Groups, study: Study, axis: str, quantity: str, planned: Collection[str]
) -> tuple[list[set[float]], int]:
    """The values that a counted quantity took, a set a level, and in how many replicates every level is ok.

    Raises `NotJudgedError` as `axis_logs` does. Counts of memory come from trials that were alone, of which a run may
    have few; it is the run that must have two replicates.
    """
    levels = study.levels(axis)
    _check_selected(axis, levels, groups, planned)
    series = [groups[name, "variant"] for _, name in levels]
    complete = set.intersection(*({record.replicate for record in one.ok} for one in series))
    _check_count(len(complete), axis, levels, groups)
    found = [
        {source[quantity] for record in one.ok for source in (record.values, record.memory) if quantity in source}
        for one in series
    ]
    if not all(found):
        raise NotJudgedError(f"{quantity} was not measured at every level of {axis}. Measure with the phase train.")
    return found, len(complete)


def pair_of(part: ClaimPart, study: Study) -> tuple[str, str]:
    """The variants that a rule for pairs compares: what it starts from, and what is promised of."""
    levels = dict(study.levels(part.axis))
    before, after = part.levels or tuple(levels)
    return levels[before], levels[after]


def common(tables: Sequence[AxisLogs]) -> list[AxisLogs]:
    """The tables on the replicates that all of them have. Raises `NotJudgedError` where fewer than two are left."""
    shared = set.intersection(*(set(table.replicates) for table in tables))
    if len(shared) < LEAST_SHARED:
        raise NotJudgedError(_too_few(len(shared)))
    return [table.keep(shared) for table in tables]


def _check_count(count: int, axis: str, levels: Sequence[tuple[Level, str]], groups: Groups) -> None:
    if count >= LEAST_SHARED:
        return
    for level, name in levels:
        series = groups[name, "variant"]
        if not series.ok:
            statuses = ", ".join(sorted({record.status for record in series.records}))
            said = name if axis == ENGINE else f"{axis} {say_level(level)}"
            raise NotJudgedError(f"{said}: no trial is ok ({statuses}). See the report of the run.")
    raise NotJudgedError(_too_few(count))


def _too_few(count: int) -> str:
    if count == 1:
        return "1 replicate: a claim is never judged from one. Measure on, or again with --replicates 5."
    return "no replicate has every level. Measure on, or see the report for what failed."


def _check_selected(axis: str, levels: Sequence[tuple[Level, str]], groups: Groups, planned: Collection[str]) -> None:
    absent = [(level, name) for level, name in levels if (name, "variant") not in groups]
    if not absent:
        return
    said = ", ".join(name if axis == ENGINE else say_level(level) for level, name in absent)
    if all(name in planned for _, name in absent):
        raise NotJudgedError(f"{axis} {said}: not measured yet. Measure on.")
    raise NotJudgedError(
        f"{axis} {said}: not selected in this run. Measure every level of {axis}: leave --variant out."
    )


def _unmeasured(metric: str, study: Study) -> str:
    known = METRICS[metric]
    if metric in SCRIPT_ONLY_METRICS and not study.of_scripts:
        return f"{known.title}: seen in scripts alone. Measure one: --command 'python train.py ...'."
    if metric.startswith("open_ended") and not study.workload.open_ended_tokens:
        return f"{known.title}: not measured, as open_ended_tokens is 0. Set it in the study's [workload]."
    return f"{known.title}: not measured in this run. Measure with the phase {known.phase}."


def _complete(records: Sequence[TrialRecord | None], metric: str, by_turn: bool) -> bool:
    """Whether all of them are there, and by turn also of one length: turns are paired one by one."""
    present = [record for record in records if record is not None]
    if len(present) < len(records):
        return False
    return not by_turn or len({len(samples_of(record, metric)) for record in present}) == 1


TOKENS, TIME = "open_ended_tokens", "open_ended_request_time_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Shares of the variance of request time that the number of tokens explains (R²), over replicates."""

    requests: ShareEstimate | None
    """Between the requests of all variants; None where it was not measured or every answer had one length."""
    variants: ShareEstimate | None
    """Between the means of the variants; None as well with fewer than three of them."""


def answers_of(groups: Groups) -> Answers:
    """The shares of a run, from its variants without the control, which is one of them measured twice."""
    trials = [record for (_, role), series in groups.items() if role == "variant" for record in _measuring(series)]
    replicates = sorted({record.replicate for record in trials})
    blocks = [
        [_lengths_and_times(record) for record in trials if record.replicate == replicate] for replicate in replicates
    ]
    return Answers(
        requests=explained_share([_join(block) for block in blocks]),
        variants=explained_share(
            [([fmean(tokens) for tokens, _ in block], [fmean(times) for _, times in block]) for block in blocks]
        ),
    )


def _measuring(series: Series) -> Iterable[TrialRecord]:
    return (record for record in series.measuring(TIME) if samples_of(record, TOKENS))


def _lengths_and_times(record: TrialRecord) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return samples_of(record, TOKENS), samples_of(record, TIME)


def _join(block: Iterable[tuple[tuple[float, ...], tuple[float, ...]]]) -> tuple[list[float], list[float]]:
    points = [point for tokens, times in block for point in zip(tokens, times, strict=True)]
    return [tokens for tokens, _ in points], [time for _, time in points]
