"""Every run of a folder, read one after the other: what `list runs`, `history` and `lorameter.load_all` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lorameter.errors import LorameterError
from lorameter.records import fileio, store
from lorameter.records.packed import list_packed
from lorameter.records.store import Run
from lorameter.studies.from_run import read_study
from lorameter.studies.study import Study
from lorameter.verdicts.ab import report_of
from lorameter.verdicts.compare import EXIT_OF, worst
from lorameter.verdicts.validity import run_validity

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Generic[T]):
    """What was read of one run."""

    path: Path
    """Its folder, or its packed file."""
    content: T | None = None
    error: str | None = None
    """Why it cannot be read; None where it can."""


def read_each(runs: Path, read: Callable[[Run], T]) -> Iterator[Read[T]]:
    """Each run of a folder by name, then each packed one. A run that is removed meanwhile is left out.

    Args:
        runs: the folder of runs.
        read: what to take of a run. The run itself is not kept.
    """
    for path in (*store.list_runs(runs), *list_packed(runs)):
        found: Read[T]
        try:
            found = Read(path=path, content=read(store.read_run(str(path), path.parent)))
        except (LorameterError, UnicodeError) as error:  # one that cannot be read must not hide the others
            found = Read(path=path, error=str(error))
        if fileio.is_file(path) or store.is_run(path):
            yield found


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run as a row of a list."""

    run: str
    study: str
    title: str
    created_unix_s: float
    state: str
    verdict: str
    """`valid` or `invalid`; of an A/B its worst verdict."""
    trials: Mapping[str, int]
    """How many ended in which way."""
    planned: int


def summary_of(run: Run) -> Summary:
    """The state of a run, in a row."""
    manifest, study, counts = run.manifest, read_study(run), dict[str, int]()
    for record in run.records:
        counts[record.status] = counts.get(record.status, 0) + 1
    return Summary(
        run=manifest.run,
        study=study.name,
        title=study.title,
        created_unix_s=manifest.created_unix_s,
        state=run.state,
        verdict=_verdict(run, study),
        trials=dict(sorted(counts.items())),
        planned=len(manifest.order),
    )


def _verdict(run: Run, study: Study) -> str:
    if not run.manifest.sides:
        return "valid" if run_validity(run, study).valid else "invalid"
    found = [compared.verdict for compared in report_of(run).comparisons]
    if not found:
        return "invalid"
    decided = worst(EXIT_OF[verdict] for verdict in found)
    return next(verdict for verdict in found if EXIT_OF[verdict] == decided)
