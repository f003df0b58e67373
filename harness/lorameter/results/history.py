"""The history of a metric over runs: a line per fingerprint, its level changes, and the differences between runs.

A line contains comparable runs, with the same fingerprint and variant content. A new line begins at a known break,
without a ratio across it. A level change inside a line (`lorameter.stats.changes`) is only a suspicion, because the
runs have only the machine in common; an A/B of the two revisions can confirm it. Runs at different times are never
called equivalent; a line without a change reports the smallest change that it would have shown.

The runs of a folder are read one by one, for `list runs`, `history` and `lorameter.load_all`.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from lorameter.errors import LorameterError, UsageError
from lorameter.machine.provenance import MAIN_LIBRARIES
from lorameter.measurements.metrics import PRIMARY
from lorameter.records import codec, fileio, store
from lorameter.records.store import Run
from lorameter.records.units import Unit
from lorameter.results.prune import folder_bytes
from lorameter.results.rows import Row, estimate_rows
from lorameter.stats.changes import Course, Level, LevelShift, find_changes
from lorameter.studies.study_file import builtin_studies, read_study
from lorameter.terminal import print_stderr
from lorameter.verdicts.ab import build_report
from lorameter.verdicts.compare import EXIT_OF, PRECEDENCE, Difference, find_differences
from lorameter.verdicts.gate import read_baselines
from lorameter.verdicts.same_training import training_facts
from lorameter.verdicts.series import is_mixed
from lorameter.verdicts.validity import run_validity

DEFAULT_METRIC = PRIMARY["train"]
Direction = Literal["slower", "faster", "worse", "better"]
_OMITTED = ("worker", "packages")
"""Fields of the provenance that are large and cannot cause a change."""


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One run's value, with its time and software; `why_not` is the reason why it does not count, else None."""

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


class Suspicion(msgspec.Struct, frozen=True, kw_only=True):
    """A level change inside a line, between the last run of one level and the first run of the next.

    `ratio` is the new level over the previous one; above 1 is worse, also for rates. `low` and `high` are its 95 %
    interval, as if the position of the change had been known. `differing` are the known differences between the two
    runs, and `confirm` is the command that would confirm the change, empty if no difference is known.
    """

    before: Moment
    after: Moment
    level_before: float
    level_after: float
    ratio: float
    low: float
    high: float
    direction: Direction
    differing: tuple[Difference, ...]
    confirm: str


class Plateau(msgspec.Struct, frozen=True, kw_only=True):
    """A level of a line, in the unit of the metric."""

    first: Moment
    last: Moment
    runs: int
    value: float
    low: float | None
    high: float | None


class HistorySeries(msgspec.Struct, frozen=True, kw_only=True):
    """Runs with one fingerprint and one variant content, including those that do not count.

    `scatter` is the standard deviation between runs around the levels, as a fraction, None if fewer than 10 runs count;
    `detectable` is the smallest change, as a fraction, that three more runs would show with 80 % power.
    """

    fingerprint: str
    variant_id: str
    moments: tuple[Moment, ...]
    plateaus: tuple[Plateau, ...]
    suspicions: tuple[Suspicion, ...]
    scatter: float | None
    detectable: float | None

    @property
    def counting(self) -> tuple[Moment, ...]:
        """The runs that count."""
        return tuple(moment for moment in self.moments if moment.why_not is None)


class Break(msgspec.Struct, frozen=True, kw_only=True):
    """The start of a line that is not comparable with the previous one; `confirm` is the command that measures the
    effect of the difference, empty if there is none."""

    before: Moment
    after: Moment
    fingerprint_before: str
    fingerprint_after: str
    differing: tuple[Difference, ...]
    confirm: str


class Track(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one variant of one study."""

    study: str
    variant: str
    metric: str
    unit: Unit
    higher_is_better: bool
    lines: tuple[HistorySeries, ...]
    breaks: tuple[Break, ...]


class History(msgspec.Struct, frozen=True, kw_only=True):
    """A metric over the runs of a folder; `unreadable` has the reasons for unreadable runs, by folder name."""

    metric: str
    tracks: tuple[Track, ...]
    unreadable: Mapping[str, str]


class MeasuredRun(NamedTuple):
    """An estimate of a run: its row of the table of estimates, with the facts of the run."""

    moment: Moment
    row: Row
    facts: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """The key of a line: fingerprint and content of the variant."""
        return self.row["fingerprint"], self.row["variant_id"]


def read_history(
    runs: Path, metric: str = DEFAULT_METRIC, *, study: str | None = None, variant: str | None = None
) -> History:
    """The history of a metric, or of a kind of memory, in the selected studies and variants.

    Raises:
        UsageError: there is no run with the metric, study or variant; the message lists the existing ones.
    """
    measured, unreadable = read_estimates(runs, metric)
    tracks: dict[tuple[str, str], list[MeasuredRun]] = {}
    for one in measured:
        if study in (None, one.row["study"]) and variant in (None, one.row["variant"]):
            tracks.setdefault((one.row["study"], one.row["variant"]), []).append(one)
    if tracks:
        found_tracks = tuple(_track(tracks[key]) for key in sorted(tracks))
        return History(metric=metric, tracks=found_tracks, unreadable=unreadable)
    if measured:
        known = sorted({f"{one.row['variant']} of {one.row['study']}" for one in measured})
        selection = " ".join(f"--{name} {value}" for name, value in (("study", study), ("variant", variant)) if value)
        raise UsageError(f"history: no run here has {metric} with {selection}. There are {', '.join(known[:12])}.")
    if known := sorted({one.row["metric"] for one in read_estimates(runs, None)[0]}):
        raise UsageError(f"history: no run here has the metric {metric!r}. They have {', '.join(known)}.")
    raise UsageError("history: no run here has a value. Measure some with `lorameter run`, or give --runs-dir.")


def read_estimates(runs: Path, metric: str | None) -> tuple[list[MeasuredRun], dict[str, str]]:
    """The estimates of a metric (None: of all metrics) in the runs of a folder, oldest first; and the reasons for
    unreadable runs, by folder name. An A/B and a run with different sites have no estimates."""
    measured: list[MeasuredRun] = []
    unreadable = {}
    for path, content, error in read_each(runs, lambda run: list(_measured(run, metric))):
        if content is None:
            unreadable[path.name] = error
        else:
            measured += content
    return sorted(measured, key=lambda one: (one.moment.created_unix_s, one.moment.folder)), unreadable


def _measured(run: Run, metric: str | None) -> Iterator[MeasuredRun]:
    if run.manifest.sides or is_mixed(run):
        return
    provenance = training_facts(run.manifest.provenance, run.records)
    facts = {name: value for name, value in provenance.items() if name not in _OMITTED}
    facts = codec.to_json(facts | {"harness": provenance.get("worker", {}).get("harness")})
    for row in estimate_rows(run, read_study(run), metric):
        if row["role"] != "variant":
            continue
        positive = row["value"] > 0 and math.isfinite(row["value"])
        moment = Moment(
            run=run.manifest.run,
            folder=run.path.name,
            created_unix_s=run.manifest.created_unix_s,
            **{name: row[name] for name in ("value", "low", "high", "replicates", "commit")},
            dirty=bool(row["dirty"]),
            versions={name: row[name] for name in MAIN_LIBRARIES},
            why_not=row.get("invalid_message") or (None if positive else "it has no logarithm"),
        )
        yield MeasuredRun(moment, row, facts)


def _track(measured: Sequence[MeasuredRun]) -> Track:
    lines: dict[tuple[str, str], list[MeasuredRun]] = {}
    breaks = []
    for before, after in zip([None, *measured], measured, strict=False):
        if before is not None and after.key not in lines:
            breaks.append(_break(before, after))
        lines.setdefault(after.key, []).append(after)
    first = measured[0].row
    about = {name: first[name] for name in ("study", "variant", "metric", "unit", "higher_is_better")}
    return Track(**about, lines=tuple(map(_line, lines.values())), breaks=tuple(breaks))


def _line(measured: Sequence[MeasuredRun]) -> HistorySeries:
    counting = [one for one in measured if one.moment.why_not is None]
    course: Course = find_changes([math.log(one.moment.value) for one in counting])
    fingerprint, variant_id = measured[0].key
    levels = itertools.pairwise(course.levels)
    return HistorySeries(
        fingerprint=fingerprint,
        variant_id=variant_id,
        moments=tuple(one.moment for one in measured),
        plateaus=tuple(
            Plateau(
                first=counting[level.first].moment,
                last=counting[level.end - 1].moment,
                runs=level.end - level.first,
                value=math.exp(level.value),
                low=None if level.low is None else math.exp(level.low),
                high=None if level.high is None else math.exp(level.high),
            )
            for level in course.levels
        ),
        suspicions=tuple(
            _suspicion(change, *pair, counting) for change, pair in zip(course.changes, levels, strict=True)
        ),
        scatter=None if course.scatter is None else math.expm1(course.scatter),
        detectable=None if course.detectable is None else math.expm1(course.detectable),
    )


def _suspicion(change: LevelShift, old: Level, new: Level, counting: Sequence[MeasuredRun]) -> Suspicion:
    before, after = counting[change.first - 1], counting[change.first]
    ends = (change.log_ratio, change.low, change.high)
    if after.row["higher_is_better"]:
        ends = (-change.log_ratio, -change.high, -change.low)
    ratio, low, high = map(math.exp, ends)
    timed = after.row["unit"] in ("s", "1/s")
    words: tuple[Direction, Direction] = ("slower", "faster") if timed else ("worse", "better")
    return Suspicion(
        before=before.moment,
        after=after.moment,
        level_before=math.exp(old.value),
        level_after=math.exp(new.value),
        ratio=ratio,
        low=low,
        high=high,
        direction=words[0] if ratio > 1 else words[1],
        differing=tuple(find_differences(before.facts, after.facts)),
        confirm=confirm_command(before, after),
    )


def _break(before: MeasuredRun, after: MeasuredRun) -> Break:
    """The break between the last run of a line and the first run with another fingerprint or variant."""
    (fingerprint_before, old), (fingerprint_after, new) = before.key, after.key
    differing = find_differences(before.facts, after.facts)
    if old != new:
        differing.insert(0, Difference(field=f"variant {after.row['variant']}", base=old, candidate=new))
    return Break(
        before=before.moment,
        after=after.moment,
        fingerprint_before=fingerprint_before,
        fingerprint_after=fingerprint_after,
        differing=tuple(differing),
        confirm=confirm_command(before, after),
    )


def confirm_command(before: MeasuredRun, after: MeasuredRun) -> str:
    """The A/B that would confirm a change between two runs: of their versions if they differ, else of their commits.

    Empty if no nameable difference exists, or if a run was made with uncommitted changes.
    """
    moments, study = (before.moment, after.moment), after.row["study"]
    changed = [name for name in MAIN_LIBRARIES if len({moment.versions.get(name) for moment in moments}) > 1]
    if changed:
        versions = [{name: moment.versions.get(name) for name in changed} for moment in moments]
        if any(None in side.values() for side in versions):
            return ""
        sides = [" ".join(f"{name}=={str(one).partition('+')[0]}" for name, one in side.items()) for side in versions]
    else:
        commits = [moment.commit or "" for moment in moments]
        if not all(commits) or commits[0] == commits[1] or any(moment.dirty for moment in moments):
            return ""
        sides = [commit[:12] for commit in commits]
    named = study if study in builtin_studies() else f"{study}.toml"
    words = ["lorameter", "ab", named, "--base", sides[0], "--candidate", sides[1], "--variant", after.row["variant"]]
    return shlex.join(words)


T = TypeVar("T")


def read_each(runs: Path, read: Callable[[Run], T]) -> Iterator[tuple[Path, T | None, str]]:
    """Read each run of a folder by name, then the packed runs; yields path, content, and the error for an unreadable
    run.

    A run that is removed during the reading is left out.

    Args:
        runs: the folder of runs.
        read: extracts the content of a run, which is then freed.
    """
    for path in (*store.list_runs(runs), *store.list_packed(runs)):
        content, error = None, ""
        try:
            content = read(store.read_run(str(path), path.parent))
        except (LorameterError, UnicodeError) as unreadable:  # one unreadable run must not hide the others
            error = str(unreadable)
        if fileio.is_file(path) or store.is_run(path):
            yield path, content, error


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """A row for each run, as `lorameter list runs --json` prints it; the title of a damaged run is the reason."""
    accepted: Collection[str] = ()
    try:
        accepted = {baseline.run for baseline in read_baselines(runs).baselines}
    except LorameterError as error:  # the runs are listed without their baselines
        print_stderr(f"lorameter: {error}")
    rows = []
    for path, row, why in sorted(read_each(runs, _summarize_run), key=lambda one: one[0].name):
        size = {"size_bytes": folder_bytes(path)}
        if row is None:
            rows.append({"run": path.name, "status": "damaged", "title": why, **size})
        else:
            rows.append({**row, "baseline": not {row["run"], path.name}.isdisjoint(accepted), **size})
    return rows


def _summarize_run(run: Run) -> dict[str, Any]:
    manifest, study = run.manifest, read_study(run)
    trials = dict(sorted(Counter(record.status for record in run.records).items()))
    unrecorded = len(manifest.order) - len(run.records)
    if manifest.sides:  # the worst verdict
        verdicts = [compared.verdict for compared in build_report(run).comparisons]
        verdict = min(verdicts, key=lambda verdict: PRECEDENCE.index(EXIT_OF[verdict]), default="invalid")
    else:
        verdict = "valid" if run_validity(run, study).valid else "invalid"
    return {
        "run": manifest.run,
        "status": run.state,
        "study": study.name,
        "verdict": verdict,
        "created_unix_s": manifest.created_unix_s,
        "trials": trials | ({"no record": unrecorded} if unrecorded > 0 else {}),
        "title": study.headline,
    }
