"""Reads the study of a stored run, and the workloads of variants that have their own."""

from __future__ import annotations

from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.studies.study import Study
from lorameter.studies.workload import Workload


def read_study(run: Run) -> Study:
    """The study that a run measured. Raises `UsageError` if the manifest contains no valid study."""
    return codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")


def read_own_workloads(run: Run) -> dict[str, Workload]:
    """The workloads of variants that do not use the study's, by name. Raises `UsageError` as `read_study` does."""
    return codec.from_json(dict[str, Workload], run.manifest.own_workloads, f"run {run.manifest.run}")


def read_workload_of(run: Run, name: str) -> Workload:
    """The workload of one variant. Raises `UsageError` as `read_study` does."""
    return read_own_workloads(run).get(name) or read_study(run).workload
