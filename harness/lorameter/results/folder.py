"""Reads all runs of a folder one by one, for `list runs`, `history` and `lorameter.load_all`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kernels_check.terminal import print_stderr
from lorameter.errors import LorameterError
from lorameter.records import fileio, store
from lorameter.records.packed import list_packed
from lorameter.records.store import Run
from lorameter.results.prune import size_of
from lorameter.studies.from_run import read_study
from lorameter.verdicts.ab import report_of
from lorameter.verdicts.baselines import read_baselines
from lorameter.verdicts.compare import EXIT_OF, worst_exit_code
from lorameter.verdicts.validity import run_validity

T = TypeVar("T")


def read_each(runs: Path, read: Callable[[Run], T]) -> Iterator[tuple[Path, T | None, str]]:
    """Read each run of a folder by name, then the packed runs; yields path, content, and the error for an unreadable
    run.

    A run that is removed during the reading is left out.

    Args:
        runs: the folder of runs.
        read: extracts the content of a run, which is then freed.
    """
    for path in (*store.list_runs(runs), *list_packed(runs)):
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
    for path, row, why in sorted(read_each(runs, _row_of), key=lambda one: one[0].name):
        size = {"size_bytes": size_of(path)}
        if row is None:
            rows.append({"run": path.name, "status": "damaged", "title": why, **size})
        else:
            rows.append({**row, "baseline": not {row["run"], path.name}.isdisjoint(accepted), **size})
    return rows


def _row_of(run: Run) -> dict[str, Any]:
    manifest, study = run.manifest, read_study(run)
    trials = dict(sorted(Counter(record.status for record in run.records).items()))
    left = len(manifest.order) - len(run.records)
    return {
        "run": manifest.run,
        "status": run.state,
        "study": study.name,
        "verdict": _verdict_of(run),
        "created_unix_s": manifest.created_unix_s,
        "trials": trials | ({"no record": left} if left > 0 else {}),
        "title": study.title,
    }


def _verdict_of(run: Run) -> str:
    """ "valid" or "invalid"; for an A/B run, its worst verdict."""
    if not run.manifest.sides:
        return "valid" if run_validity(run, read_study(run)).valid else "invalid"
    verdicts = [compared.verdict for compared in report_of(run).comparisons]
    decided = worst_exit_code(EXIT_OF[verdict] for verdict in verdicts)
    return next((verdict for verdict in verdicts if EXIT_OF[verdict] == decided), "invalid")
