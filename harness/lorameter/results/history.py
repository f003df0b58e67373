"""How a number went from run to run: a line for each fingerprint, where it changed its level, and what changed between.

A line holds runs that may be compared: one fingerprint, one content of the variant. Where another begins is a known
break, and no ratio is taken across it. Inside a line changes are looked for (`lorameter.stats.changes`), and one that
is found is a suspicion: the runs shared nothing but the machine, so what confirms it is an A/B of the two revisions.
Runs of different times are never called equivalent; a line without a change says what it would have shown.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from lorameter.errors import UsageError
from lorameter.records.metrics import PRIMARY
from lorameter.results.columns import VERSIONS
from lorameter.results.points import Night, Point, read_nights
from lorameter.stats.changes import Course, LevelShift, find_changes
from lorameter.studies.study_file import builtin_studies
from lorameter.verdicts.comparison_input import Difference, differences

DEFAULT_METRIC = PRIMARY["train"]
Direction = Literal["slower", "faster", "worse", "better"]


class Moment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run's number, with when and with what it was measured."""

    run: str
    folder: str
    created_unix_s: float
    value: float
    low: float | None
    high: float | None
    replicates: int
    commit: str | None
    dirty: bool
    versions: Mapping[str, str | None]
    why_not: str | None
    """Why it does not count; None where it does."""


class Suspicion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of level inside a line."""

    before: Moment
    """The last run of the level before."""
    after: Moment
    """The first run of the new level."""
    level_before: float
    level_after: float
    ratio: float
    """The new level over the one before, above 1 is worse, for rates too."""
    low: float
    """Lower end of its 95 % interval, as if the night had been known before."""
    high: float
    direction: Direction
    differing: tuple[Difference, ...]
    """What is known to have changed between the two runs."""
    confirm: str
    """The command that would confirm it; empty where nothing known differs."""


class Plateau(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A level of a line, in the unit of the metric."""

    first: Moment
    last: Moment
    runs: int
    value: float
    low: float | None
    high: float | None


class HistorySeries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Runs of one fingerprint and one content of the variant."""

    fingerprint: str
    variant_id: str
    moments: tuple[Moment, ...]
    """All of them, those that do not count included."""
    plateaus: tuple[Plateau, ...]
    suspicions: tuple[Suspicion, ...]
    scatter: float | None
    """Standard deviation from run to run around the levels, as a fraction; None of fewer than 10 that count."""
    detectable: float | None
    """The smallest change, as a fraction, that three runs more would show with 80 % power."""

    @property
    def counting(self) -> tuple[Moment, ...]:
        """The runs that count."""
        return tuple(moment for moment in self.moments if moment.why_not is None)


class Break(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a line begins that may not be compared with what was before."""

    before: Moment
    after: Moment
    fingerprint_before: str
    fingerprint_after: str
    differing: tuple[Difference, ...]
    confirm: str
    """The command that measures what it did; empty where none could."""


class Track(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One metric of one variant of one study."""

    study: str
    variant: str
    metric: str
    unit: str
    higher_is_better: bool
    lines: tuple[HistorySeries, ...]
    breaks: tuple[Break, ...]


class History(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the runs of a folder say of a metric over time."""

    metric: str
    tracks: tuple[Track, ...]
    unreadable: Mapping[str, str]
    """Why runs are in no line, by the names of their folders."""


Measured = tuple[Night, Point]
"""A run with its number for one variant."""
Nights = Mapping[str, Night]
"""Runs by the names of their folders."""


def history_of(
    runs: Path, metric: str = DEFAULT_METRIC, *, study: str | None = None, variant: str | None = None
) -> History:
    """The history of a metric, or of a kind of memory, in the studies and variants that are asked for.

    Raises:
        UsageError: a metric, study or variant of which there is no run, with those that there are.
    """
    nights, unreadable = read_nights(runs, metric)
    tracks: dict[tuple[str, str], list[Measured]] = {}
    for night in nights:
        for point in night.points:
            if study in (None, point.study) and variant in (None, point.variant):
                tracks.setdefault((point.study, point.variant), []).append((night, point))
    if not tracks:
        raise UsageError(_nothing(runs, nights, metric, study, variant))
    return History(metric=metric, tracks=tuple(_track(tracks[key]) for key in sorted(tracks)), unreadable=unreadable)


def _nothing(runs: Path, nights: Sequence[Night], metric: str, study: str | None, variant: str | None) -> str:
    found = sorted({(point.study, point.variant) for night in nights for point in night.points})
    if not found:
        known = sorted({point.metric for night in read_nights(runs, None)[0] for point in night.points})
        if not known:
            return "history: no run here has a number. Measure some with `lorameter run`, or give --runs-dir."
        return f"history: no run here has the metric {metric!r}. They have {', '.join(known)}."
    named = ", ".join(f"{name} of {of}" for of, name in found[:12])
    asked = " ".join(f"--{name} {value}" for name, value in (("study", study), ("variant", variant)) if value)
    return f"history: no run here has {metric} with {asked}. There are {named}."


def _track(measured: Sequence[Measured]) -> Track:
    lines: dict[tuple[str, str], list[Moment]] = {}
    keys: list[tuple[str, str]] = []
    nights = {night.folder: night for night, _ in measured}
    moments = [_moment(night, point) for night, point in measured]
    for (night, point), moment in zip(measured, moments, strict=True):
        key = (night.fingerprint, point.variant_id)
        keys.append(key)
        lines.setdefault(key, []).append(moment)
    first = measured[0][1]
    return Track(
        study=first.study,
        variant=first.variant,
        metric=first.metric,
        unit=first.unit,
        higher_is_better=first.higher_is_better,
        lines=tuple(_line(nights, key, found, first) for key, found in lines.items()),
        breaks=tuple(_breaks(nights, first, keys, moments)),
    )


def _moment(run: Night, point: Point) -> Moment:
    why_not = point.broken
    if why_not is None and not (point.value > 0 and math.isfinite(point.value)):
        why_not = "it has no logarithm"
    return Moment(
        run=run.run,
        folder=run.folder,
        created_unix_s=run.created_unix_s,
        value=point.value,
        low=point.low,
        high=point.high,
        replicates=point.replicates,
        commit=run.commit,
        dirty=run.dirty,
        versions=run.versions,
        why_not=why_not,
    )


def _line(nights: Nights, key: tuple[str, str], moments: Sequence[Moment], about: Point) -> HistorySeries:
    counting = [moment for moment in moments if moment.why_not is None]
    course = find_changes([math.log(moment.value) for moment in counting])
    return HistorySeries(
        fingerprint=key[0],
        variant_id=key[1],
        moments=tuple(moments),
        plateaus=tuple(_plateaus(course, counting)),
        suspicions=tuple(_suspicion(nights, change, course, counting, about) for change in course.changes),
        scatter=None if course.scatter is None else math.expm1(course.scatter),
        detectable=None if course.detectable is None else math.expm1(course.detectable),
    )


def _plateaus(course: Course, moments: Sequence[Moment]) -> Iterator[Plateau]:
    for level in course.levels:
        yield Plateau(
            first=moments[level.first],
            last=moments[level.end - 1],
            runs=level.end - level.first,
            value=math.exp(level.mean),
            low=None if level.low is None else math.exp(level.low),
            high=None if level.high is None else math.exp(level.high),
        )


def _suspicion(
    nights: Nights, change: LevelShift, course: Course, moments: Sequence[Moment], about: Point
) -> Suspicion:
    place = next(place for place, level in enumerate(course.levels) if level.first == change.first)
    before, after = moments[change.first - 1], moments[change.first]
    ends = (change.log_ratio, change.low, change.high)
    if about.higher_is_better:
        ends = (-change.log_ratio, -change.high, -change.low)
    worse = ends[0] > 0
    timed = about.unit in ("s", "1/s")
    words: tuple[Direction, Direction] = ("slower", "faster") if timed else ("worse", "better")
    return Suspicion(
        before=before,
        after=after,
        level_before=math.exp(course.levels[place - 1].mean),
        level_after=math.exp(course.levels[place].mean),
        ratio=math.exp(ends[0]),
        low=math.exp(ends[1]),
        high=math.exp(ends[2]),
        direction=words[0] if worse else words[1],
        differing=_differing(nights, before, after),
        confirm=confirming(about.study, about.variant, before, after),
    )


def _breaks(
    nights: Nights, about: Point, keys: Sequence[tuple[str, str]], moments: Sequence[Moment]
) -> Iterator[Break]:
    """One where each line but the first begins."""
    for place, key in enumerate(keys):
        if place and key not in keys[:place]:
            before, after = moments[place - 1], moments[place]
            differing = _differing(nights, before, after)
            if keys[place - 1][1] != key[1]:
                changed = Difference(field=f"variant {about.variant}", base=keys[place - 1][1], candidate=key[1])
                differing = (changed, *differing)
            yield Break(
                before=before,
                after=after,
                fingerprint_before=keys[place - 1][0],
                fingerprint_after=key[0],
                differing=differing,
                confirm=confirming(about.study, about.variant, before, after),
            )


def _differing(nights: Nights, before: Moment, after: Moment) -> tuple[Difference, ...]:
    """What is known of where and with what both were measured, and is not the same."""
    return tuple(differences(nights[before.folder].facts, nights[after.folder].facts))


def confirming(study: str, variant: str, before: Moment, after: Moment) -> str:
    """The A/B that would confirm what lies between two runs: of their versions where these differ, else their commits.

    Empty where nothing that can be named differs, or where a run was made with changes that no commit holds.
    """
    changed = [name for name in VERSIONS if before.versions.get(name) != after.versions.get(name)]
    if changed:
        sides = [" ".join(f"{name}=={moment.versions[name]}" for name in changed) for moment in (before, after)]
        if any(moment.versions.get(name) is None for moment in (before, after) for name in changed):
            return ""
        sides = [" ".join(word.partition("+")[0] for word in side.split()) for side in sides]
    else:
        if not before.commit or not after.commit or before.commit == after.commit or before.dirty or after.dirty:
            return ""
        sides = [moment.commit[:12] for moment in (before, after) if moment.commit]
    named = study if study in builtin_studies() else f"{study}.toml"
    words = ["lorameter", "ab", named, "--base", sides[0], "--candidate", sides[1], "--variant", variant]
    return shlex.join(words)
