"""The history of a metric over runs: a line for each fingerprint, its changes of level, and what differs between runs.

A line holds runs that may be compared: one fingerprint, one content of the variant. Where another begins is a known
break, and no ratio is taken across it. Inside a line changes are looked for (`lorameter.stats.changes`), and one that
is found is a suspicion: the runs shared nothing but the machine, so what confirms it is an A/B of the two revisions.
Runs of different times are never called equivalent; a line without a change says what it would have shown.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.metrics import PRIMARY
from lorameter.records.store import Run
from lorameter.results.columns import VERSIONS, names_of
from lorameter.results.folder import read_each
from lorameter.results.rows import estimate_rows
from lorameter.stats.changes import Course, LevelShift, find_changes
from lorameter.studies.from_run import read_study
from lorameter.studies.study_file import builtin_studies
from lorameter.verdicts.comparison_input import Difference, differences
from lorameter.verdicts.sites import is_mixed
from lorameter.verdicts.software import facts_of

DEFAULT_METRIC = PRIMARY["train"]
Direction = Literal["slower", "faster", "worse", "better"]
_LEFT_OUT = ("worker", "packages")
"""Fields of the provenance that are large and say nothing of what changed."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One estimate of one run."""

    moment: Moment
    row: Mapping[str, Any]
    """Of the table of estimates."""
    facts: Mapping[str, Any]
    """Where and with what the run was measured."""

    @property
    def key(self) -> tuple[str, str]:
        """What agrees in one line: fingerprint and content of the variant."""
        return self.row["fingerprint"], self.row["variant_id"]


def history_of(
    runs: Path, metric: str = DEFAULT_METRIC, *, study: str | None = None, variant: str | None = None
) -> History:
    """The history of a metric, or of a kind of memory, in the studies and variants that are asked for.

    Raises:
        UsageError: a metric, study or variant of which there is no run, with those that there are.
    """
    found, unreadable = read_estimates(runs, metric)
    tracks: dict[tuple[str, str], list[Measured]] = {}
    for one in found:
        if study in (None, one.row["study"]) and variant in (None, one.row["variant"]):
            tracks.setdefault((one.row["study"], one.row["variant"]), []).append(one)
    if not tracks:
        raise UsageError(_nothing(runs, found, metric, study, variant))
    return History(metric=metric, tracks=tuple(_track(tracks[key]) for key in sorted(tracks)), unreadable=unreadable)


def read_estimates(runs: Path, metric: str | None) -> tuple[list[Measured], dict[str, str]]:
    """The estimates of a metric (None: of all) in the runs of a folder, oldest first; and why others cannot be read, by
    the names of their folders. An A/B and a run of unlike sites have none."""
    found: list[Measured] = []
    unreadable = {}
    for one in read_each(runs, lambda run: list(_measured(run, metric))):
        if one.content is None:
            unreadable[one.path.name] = str(one.error)
        else:
            found += one.content
    return sorted(found, key=lambda one: (one.moment.created_unix_s, one.moment.folder)), unreadable


def _measured(run: Run, metric: str | None) -> Iterator[Measured]:
    if run.manifest.sides or is_mixed(run):
        return
    provenance = facts_of(run.manifest.provenance, run.records)
    facts = {name: value for name, value in provenance.items() if name not in _LEFT_OUT}
    facts = codec.to_json(facts | {"harness": provenance.get("worker", {}).get("harness")})
    for values in estimate_rows(run, read_study(run), metric):
        row = dict(zip(names_of("estimates"), values, strict=True))
        if row["role"] != "variant":
            continue
        positive = row["value"] > 0 and math.isfinite(row["value"])
        moment = Moment(
            run=run.manifest.run,
            folder=run.path.name,
            created_unix_s=run.manifest.created_unix_s,
            **{name: row[name] for name in ("value", "low", "high", "replicates", "commit")},
            dirty=bool(row["dirty"]),
            versions={name: row[name] for name in VERSIONS},
            why_not=row["invalid_message"] or (None if positive else "it has no logarithm"),
        )
        yield Measured(moment=moment, row=row, facts=facts)


def _nothing(runs: Path, found: Sequence[Measured], metric: str, study: str | None, variant: str | None) -> str:
    if not found:
        known = sorted({one.row["metric"] for one in read_estimates(runs, None)[0]})
        if not known:
            return "history: no run here has a number. Measure some with `lorameter run`, or give --runs-dir."
        return f"history: no run here has the metric {metric!r}. They have {', '.join(known)}."
    there = sorted({(one.row["study"], one.row["variant"]) for one in found})
    named = ", ".join(f"{name} of {of}" for of, name in there[:12])
    asked = " ".join(f"--{name} {value}" for name, value in (("study", study), ("variant", variant)) if value)
    return f"history: no run here has {metric} with {asked}. There are {named}."


def _track(measured: Sequence[Measured]) -> Track:
    lines: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        lines.setdefault(one.key, []).append(one)
    first = measured[0].row
    return Track(
        **{name: first[name] for name in ("study", "variant", "metric", "unit", "higher_is_better")},
        lines=tuple(map(_line, lines.values())),
        breaks=tuple(_breaks(measured)),
    )


def _line(measured: Sequence[Measured]) -> HistorySeries:
    counting = [one for one in measured if one.moment.why_not is None]
    course = find_changes([math.log(one.moment.value) for one in counting])
    fingerprint, variant_id = measured[0].key
    return HistorySeries(
        fingerprint=fingerprint,
        variant_id=variant_id,
        moments=tuple(one.moment for one in measured),
        plateaus=tuple(_plateaus(course, counting)),
        suspicions=tuple(_suspicion(change, course, counting) for change in course.changes),
        scatter=None if course.scatter is None else math.expm1(course.scatter),
        detectable=None if course.detectable is None else math.expm1(course.detectable),
    )


def _plateaus(course: Course, counting: Sequence[Measured]) -> Iterator[Plateau]:
    for level in course.levels:
        yield Plateau(
            first=counting[level.first].moment,
            last=counting[level.end - 1].moment,
            runs=level.end - level.first,
            value=math.exp(level.mean),
            low=None if level.low is None else math.exp(level.low),
            high=None if level.high is None else math.exp(level.high),
        )


def _suspicion(change: LevelShift, course: Course, counting: Sequence[Measured]) -> Suspicion:
    place = next(place for place, level in enumerate(course.levels) if level.first == change.first)
    before, after = counting[change.first - 1], counting[change.first]
    ends = (change.log_ratio, change.low, change.high)
    if after.row["higher_is_better"]:
        ends = (-change.log_ratio, -change.high, -change.low)
    timed = after.row["unit"] in ("s", "1/s")
    words: tuple[Direction, Direction] = ("slower", "faster") if timed else ("worse", "better")
    return Suspicion(
        before=before.moment,
        after=after.moment,
        level_before=math.exp(course.levels[place - 1].mean),
        level_after=math.exp(course.levels[place].mean),
        ratio=math.exp(ends[0]),
        low=math.exp(ends[1]),
        high=math.exp(ends[2]),
        direction=words[0] if ends[0] > 0 else words[1],
        differing=tuple(differences(before.facts, after.facts)),
        confirm=_confirm(before, after),
    )


def _breaks(measured: Sequence[Measured]) -> Iterator[Break]:
    """One where each line but the first begins."""
    seen = {measured[0].key}
    for before, after in itertools.pairwise(measured):
        if after.key in seen:
            continue
        seen.add(after.key)
        differing = tuple(differences(before.facts, after.facts))
        if before.key[1] != after.key[1]:
            variant = f"variant {after.row['variant']}"
            differing = (Difference(field=variant, base=before.key[1], candidate=after.key[1]), *differing)
        yield Break(
            before=before.moment,
            after=after.moment,
            fingerprint_before=before.key[0],
            fingerprint_after=after.key[0],
            differing=differing,
            confirm=_confirm(before, after),
        )


def _confirm(before: Measured, after: Measured) -> str:
    return confirming(after.row["study"], after.row["variant"], before.moment, after.moment)


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
