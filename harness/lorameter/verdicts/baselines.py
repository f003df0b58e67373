"""Manages the baseline: the accepted run for a fingerprint and a study.

A run never becomes the baseline automatically: the newest run may be the slow one, and a baseline that follows every
run hides a slow-down in small steps. A user must accept a run, and an invalid run cannot be accepted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import codec, fileio, store
from lorameter.records.fileio import write_document
from lorameter.records.packed import is_packed
from lorameter.studies.from_run import read_study
from lorameter.verdicts.comparison_input import ComparisonInput, comparison_input
from lorameter.verdicts.sites import refuse_mixed
from lorameter.verdicts.validity import run_validity

WORD = "baseline"
"""Names the accepted run of the candidate's fingerprint and study, in place of a base."""
FILE = "baselines.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One accepted run."""

    fingerprint: str
    study: str
    run: str
    accepted_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """The content of the file: one baseline for each fingerprint and study."""

    schema: int = 1
    baselines: tuple[Baseline, ...] = ()

    def of(self, fingerprint: str | None, study: str | None) -> Baseline | None:
        """The accepted run; None if there is none."""
        for baseline in self.baselines:
            if (baseline.fingerprint, baseline.study) == (fingerprint, study):
                return baseline
        return None


def read_baselines(runs: Path) -> Baselines:
    """Read the accepted runs of this runs directory. Raises `UsageError` for a damaged file."""
    path = runs / FILE
    if not fileio.is_there(path):
        return Baselines()
    try:
        data = fileio.read_json(path, fileio.CONFIG_BYTES)
    except fileio.NotReadableError as error:
        raise UsageError(f"{path}: cannot be read: {error}. Restore it, or remove it and accept again.") from None
    read = codec.from_json(Baselines, data, str(path))
    if read.schema != 1:
        raise UsageError(f"{path}: schema {read.schema}, and this version reads 1. Use the version that wrote it.")
    return read


@contextlib.contextmanager
def lock_baselines(runs: Path) -> Iterator[None]:
    """Hold the lock under which runs of this directory are accepted or removed, so that no baseline is removed."""
    import filelock

    with filelock.FileLock(runs / f".{FILE}.lock"):
        yield


def accept(name: str, runs: Path) -> tuple[Baseline, Baseline | None]:
    """Make a run the baseline of its fingerprint and study; returns the new baseline and the one that it replaces.

    Raises:
        UsageError: the run does not exist, or is not in this runs directory.
        InvalidRunError: the run is not completely valid.
    """
    run = store.read_run(name, runs)
    if run.path.resolve().parent != runs.resolve():
        raise UsageError(
            f"run {name!r}: is outside of {runs}, where its baseline would be kept. Give --runs-dir {run.path.parent}."
        )
    if run.manifest.sides:
        raise UsageError(f"run {run.path.name}: an A/B run has two sides and is no baseline. Accept an ordinary run.")
    refuse_mixed(run, "a baseline")
    validity = run_validity(run, read_study(run))
    if validity.invalid:
        raise InvalidRunError(
            f"run {run.path.name}: not valid, so it was not accepted: {validity.invalid}. "
            f"See `lorameter report {run.path.name}`."
        )
    accepted = Baseline(
        fingerprint=run.manifest.fingerprint,
        study=str(run.manifest.study["name"]),
        run=run.path.name,
        accepted_unix_s=time.time(),
    )
    with lock_baselines(runs):
        if not fileio.is_there(run.path):
            raise UsageError(f"run {run.path.name}: it was removed while it was read. Accept another run.")
        known = read_baselines(runs)
        replaced = known.of(accepted.fingerprint, accepted.study)
        others = tuple(baseline for baseline in known.baselines if baseline != replaced)
        write_document(runs / FILE, Baselines(baselines=(*others, accepted)))
    return accepted, replaced


def read_base(name: str, runs: Path, *, fingerprint: str | None, study: str | None) -> ComparisonInput:
    """Read a base by name, or the accepted run for this fingerprint and study if the name is `baseline`.

    If no run was accepted, the side is absent, and every comparison with it has the verdict `no_baseline`.
    """
    if name != WORD:
        return read_comparand(name, runs)
    baseline = read_baselines(runs).of(fingerprint, study) if fingerprint and study else None
    if baseline is None:
        about = f"study {study!r} with fingerprint {fingerprint}" if fingerprint else "a side without a fingerprint"
        return ComparisonInput(
            name=WORD, absent=f"no run was accepted for {about} in {runs}: `lorameter accept RUN` accepts one"
        )
    try:
        return comparison_input(store.read_run(baseline.run, runs))
    except UsageError as error:
        raise UsageError(f"the accepted baseline cannot be read: {error} Accept another run.") from None


def read_comparand(name: str, runs: Path) -> ComparisonInput:
    """Read a run by id, directory or packed file, a pytest-benchmark file, or several such files by folder or pattern.

    Raises:
        UsageError: the name is none of these, or cannot be read.
    """
    if fileio.is_file(name) and not is_packed(Path(name)):
        from lorameter.verdicts.benchmark_files import read_benchmark_json

        return read_benchmark_json(Path(name))
    if not store.is_run(Path(name)) and not store.is_run(runs / name):
        from lorameter.verdicts.benchmark_files import list_benchmarks, read_benchmarks

        if list_benchmarks(name):
            return read_benchmarks(name)
    try:
        return comparison_input(store.read_run(name, runs))
    except UsageError as error:
        if fileio.is_folder(runs / name) or fileio.is_there(name):
            raise
        raise UsageError(
            f"{error} A pytest-benchmark .json file, or a folder or quoted pattern of several, works too; there is "
            f"none at {name!r}."
        ) from None
