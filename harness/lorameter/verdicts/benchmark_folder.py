"""A folder of pytest-benchmark files as one side of a comparison.

The rounds of one file are of one process, which is one replicate. Several files of the same benchmarks, each of a
session of its own, are replicates and give an interval.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.verdicts.benchmark_json import FOREIGN, FOREIGN_METRIC, ONE_PROCESS, read_benchmark_json
from lorameter.verdicts.comparison_input import ComparisonInput, Measurements, differences
from lorameter.verdicts.series import Trials


def list_benchmarks(folder: Path) -> list[Path]:
    """The files of a folder and of those below it, as pytest-benchmark has one for each machine."""
    return sorted(folder.rglob("*.json"))


def read_benchmark_folder(folder: Path) -> ComparisonInput:
    """All files of a folder as replicates of one side.

    Raises:
        UsageError: a file that cannot be read, that lorameter wrote, or that is of another machine than the first.
    """
    sides = [read_benchmark_json(path) for path in list_benchmarks(folder)]
    trials: dict[str, Trials] = {}
    for side in sides:
        _check_alike(sides[0], side)
        for name, measured in side.sides.items():
            trials.setdefault(name, []).extend(measured.trials.get(FOREIGN_METRIC, ()))
    return dataclasses.replace(
        sides[0],
        name=str(folder),
        sides={
            name: Measurements(
                name=name,
                trials={FOREIGN_METRIC: found} if found else {},
                no_interval=ONE_PROCESS if len(found) < 2 else None,
            )
            for name, found in trials.items()
        },
    )


def _check_alike(first: ComparisonInput, side: ComparisonInput) -> None:
    if not side.facts or side.facts.get("written_by") != FOREIGN:
        raise UsageError(f"{side.name}: it was written by lorameter and has all of its replicates. Name it by itself.")
    if found := differences(first.facts or {}, side.facts):
        one = found[0]
        raise UsageError(
            f"{side.name}: {one.field} is {one.candidate!r}, and {one.base!r} in {first.name}: the files of a folder "
            "are replicates of one machine. Move it to a folder of its own."
        )
