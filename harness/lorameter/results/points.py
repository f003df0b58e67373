"""What a history takes of each run: its estimates of one metric, and with what it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.results.columns import VERSIONS, names_of
from lorameter.results.folder import read_each
from lorameter.results.rows import estimate_rows
from lorameter.studies.from_run import read_study
from lorameter.verdicts.sites import is_mixed
from lorameter.verdicts.software import facts_of
from lorameter.verdicts.validity import run_validity

_LEFT_OUT = ("worker", "packages")
"""Of the provenance: fields that are large and say nothing of what changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One estimate of one run."""

    study: str
    variant: str
    variant_id: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    replicates: int
    broken: str | None
    """Why it does not count; None where it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """One run of a history."""

    folder: str
    """Name of its folder, or of its file."""
    run: str
    fingerprint: str
    created_unix_s: float
    commit: str | None
    dirty: bool
    versions: Mapping[str, str | None]
    facts: Mapping[str, Any]
    """Where and with what it was measured."""
    points: tuple[Point, ...]
    """Its estimates of the metric, one for each variant; none of an A/B or of a run of unlike sites."""


def read_nights(runs: Path, metric: str | None) -> tuple[list[Night], dict[str, str]]:
    """The runs of a folder, oldest first, with their estimates of a metric (None: of all metrics); and why others
    cannot be read, by the names of their folders."""
    nights, unreadable = [], {}
    for one in read_each(runs, lambda run: _night(run, metric)):
        if one.content is None:
            unreadable[one.path.name] = str(one.error)
        else:
            nights.append(one.content)
    return sorted(nights, key=lambda night: (night.created_unix_s, night.folder)), unreadable


def _night(run: Run, metric: str | None) -> Night:
    provenance = facts_of(run.manifest.provenance, run.records)
    git, libraries = provenance.get("git", {}), provenance.get("libraries", {})
    facts = {name: value for name, value in provenance.items() if name not in _LEFT_OUT}
    return Night(
        folder=run.path.name,
        run=run.manifest.run,
        fingerprint=run.manifest.fingerprint,
        created_unix_s=run.manifest.created_unix_s,
        commit=git.get("commit"),
        dirty=bool(git.get("dirty")),
        versions={name: libraries.get(name) for name in VERSIONS},
        facts=codec.to_json(facts | {"harness": provenance.get("worker", {}).get("harness")}),
        points=tuple(_points(run, metric)),
    )


def _points(run: Run, metric: str | None) -> Iterator[Point]:
    if run.manifest.sides or is_mixed(run):
        return
    study = read_study(run)
    validity = run_validity(run, study)
    for values in estimate_rows(run, study, metric):
        row = dict(zip(names_of("estimates"), values, strict=True))
        if row["role"] != "variant":
            continue
        kept = ("study", "variant", "variant_id", "metric", "unit", "higher_is_better", "value", "low", "high")
        yield Point(
            **{name: row[name] for name in (*kept, "replicates")},
            broken=validity.broken or validity.broken_variant(row["variant"]),
        )
