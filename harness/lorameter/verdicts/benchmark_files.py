"""Reads pytest-benchmark files as sides of a comparison, including files of other projects.

A lorameter file stores the boundaries between trials with the raw samples, so it is equivalent to the run itself. Any
other file holds the rounds of one process, which form a single replicate however many there are: most of the scatter of
a duration is between processes (Kalibera & Jones 2013), so one file gives a ratio without an interval. Several files
are replicates and give an interval.

The format of pytest-benchmark lacks fields that a comparison needs, so lorameter's files add them: trial boundaries
split the raw samples into replicates, and the control and the failures are recorded, because a file without a failed
variant would hide the failure.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import statistics
from pathlib import Path
from typing import Any

import msgspec

from lorameter.errors import UsageError, refused_value, require
from lorameter.measurements.metrics import METRICS
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.form import AnyVariant
from lorameter.studies.study import Study
from lorameter.verdicts.compare import (
    ComparisonInput,
    Measurements,
    comparison_input,
    find_differences,
    session_differences,
)
from lorameter.verdicts.series import Series, Trials, is_memory

FOREIGN_METRIC = "round_time_s"
"""The metric that pytest-benchmark measures: the time of one round."""
NO_SAMPLES = "no samples were saved, only their summary: save again with --benchmark-save-data"
ONE_PROCESS = (
    "all rounds come from one process, which is one replicate and gives no interval: run the benchmarks several times "
    "on each side, with --benchmark-save=NAME --benchmark-save-data, and compare '.benchmarks/*/*_NAME.json'"
)
FOREIGN = "pytest-benchmark alone"
"""The writer of a file that is not lorameter's."""


class SavedTrial(msgspec.Struct):
    """A trial in the `extra_info` of a lorameter test."""

    samples: int
    """Number of its samples in `stats.data`."""


class ExtraInfo(msgspec.Struct, kw_only=True):
    """Facts that a lorameter test adds to its samples (`extra_info`)."""

    name: str
    """Name of the variant."""
    variant: str | None = None
    """Content id of the variant."""
    metric: str
    trials: tuple[SavedTrial, ...]
    medians: dict[str, tuple[float, ...]] = {}
    """Medians of other metrics, one per trial."""
    memory: dict[str, float] = {}
    """The largest peak by kind."""


class SavedStats(msgspec.Struct):
    """Rounds of a test as saved by pytest-benchmark."""

    data: tuple[float, ...] | None = None
    """Time of each round; None without --benchmark-save-data."""
    median: float | None = None


class SavedTest(msgspec.Struct, kw_only=True):
    """A test in a pytest-benchmark file."""

    fullname: str
    stats: SavedStats
    extra_info: dict[str, Any] = {}


class AboutRun(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the run in a lorameter file (`about_run`)."""

    fingerprint: str | None = None
    study: str | None = None
    variants: tuple[AnyVariant, ...] = ()
    control: dict[str, Comparison | None] = {}
    invalid: str | None
    """Why no number of the run counts."""
    failed: dict[str, str] = {}
    """Why no number of a variant counts, by variant."""


class SavedFile(msgspec.Struct, kw_only=True):
    """A pytest-benchmark file."""

    benchmarks: tuple[SavedTest, ...]
    machine_info: dict[str, Any] = {}
    lorameter: AboutRun | None = None


def read_benchmark_json(path: Path) -> ComparisonInput:
    """Read a file that pytest-benchmark wrote.

    Raises:
        UsageError: the file is not JSON, or not in the format of pytest-benchmark; the message names file, key and
            value.
    """
    try:
        data = fileio.read_json(path)
    except NotReadableError as error:
        raise UsageError(
            f"{path}: cannot be read as JSON: {error}. Give a file that pytest-benchmark wrote, or a run."
        ) from None
    return read_saved(data, str(path))


def read_saved(data: Any, where: str) -> ComparisonInput:
    """Read the content of such a file; `where` names it in errors. Raises `UsageError`."""
    try:
        saved = codec.from_json(SavedFile, data, where, strict=True)
    except UsageError as error:
        raise UsageError(
            f"{error} Give a file that pytest-benchmark wrote (--benchmark-save or --benchmark-json), or a run."
        ) from None
    is_lorameter_file = "lorameter" in saved.machine_info or any(
        "trials" in test.extra_info for test in saved.benchmarks
    )
    return _read_lorameter_file(where, saved) if is_lorameter_file else _read_foreign(where, saved)


def list_benchmarks(name: str) -> list[Path]:
    """The files that match a pattern, or those in a folder and its subfolders (pytest-benchmark makes one for each
    machine); empty if `name` is neither."""
    if glob.has_magic(name):
        return sorted(map(Path, glob.glob(name)))  # noqa: PTH207 - the pattern may be absolute
    return sorted(Path(name).rglob("*.json"))


def read_benchmarks(name: str) -> ComparisonInput:
    """Read all files of a folder or pattern as replicates of one side.

    Raises:
        UsageError: a file cannot be read, was written by lorameter, or is from another machine than the first one.
    """
    sides = [read_benchmark_json(path) for path in list_benchmarks(name)]
    trials: dict[str, Trials] = {}
    for side in sides:
        require(
            side.facts and side.facts.get("written_by") == FOREIGN,
            f"{side.name}: it was written by lorameter and contains all replicates. Name it alone.",
        )
        differing = find_differences(sides[0].facts or {}, side.facts or {})
        listed = ", ".join(f"{one.field} ({one.base!r} and {one.candidate!r})" for one in differing)
        require(
            not differing,
            f"{side.name}: differs from {sides[0].name} in {listed}, and the files of one side are replicates of one "
            "machine. Move it to a separate folder.",
        )
        for test, measured in side.variants.items():
            trials.setdefault(test, []).extend(measured.trials(FOREIGN_METRIC))
    return dataclasses.replace(
        sides[0],
        name=name,
        variants={
            test: Measurements(
                name=test,
                samples={FOREIGN_METRIC: samples} if samples else {},
                no_interval=ONE_PROCESS if len(samples) < 2 else None,
            )
            for test, samples in trials.items()
        },
    )


def _read_foreign(where: str, saved: SavedFile) -> ComparisonInput:
    variants: dict[str, Measurements] = {}
    for index, test in enumerate(saved.benchmarks):
        name, why = test.fullname, "a second benchmark of that name"
        if name in variants:
            raise refused_value(where, f"benchmarks[{index}].fullname", name, why, "Save them separately.")
        summary = () if test.stats.median is None else (test.stats.median,)
        samples = test.stats.data or summary
        variants[name] = Measurements(
            name=name,
            samples={FOREIGN_METRIC: [samples]} if samples else {},
            no_interval=ONE_PROCESS if test.stats.data else NO_SAMPLES,
        )
    machine, cpu = saved.machine_info, saved.machine_info.get("cpu")
    return ComparisonInput(
        name=where,
        variants=variants,
        facts={
            "written_by": FOREIGN,
            "cpu": cpu.get("brand_raw", cpu.get("brand")) if isinstance(cpu, dict) else None,
            **{key: machine.get(key) for key in ("machine", "system", "python_implementation", "python_version")},
        },
    )


def _read_lorameter_file(where: str, saved: SavedFile) -> ComparisonInput:
    about = saved.lorameter or AboutRun(invalid="it does not say whether its run is valid. Save it again")
    facts = saved.machine_info.get("lorameter")
    variants = {name: Measurements(name=name, broken=f"{where}: {why}") for name, why in about.failed.items()}
    known = {variant.name: variant for variant in about.variants}
    phases: dict[str, None] = {}
    for index, test in enumerate(saved.benchmarks):
        if "trials" not in test.extra_info:  # an unrelated benchmark of the same session
            continue
        place = f"{where}: benchmarks[{index}]"
        info = codec.from_json(ExtraInfo, test.extra_info, f"{place}.extra_info", strict=True)
        if info.metric not in METRICS:
            raise refused_value(place, "extra_info.metric", info.metric, "not a metric", "Save it again.")
        phases[METRICS[info.metric].phase] = None
        samples, fault = _split_samples(place, test.stats.data or (), info)
        earlier = variants.get(info.name, Measurements(name=info.name))
        variants[info.name] = Measurements(
            name=info.name,
            id=info.variant,
            variant=known.get(info.name),
            samples={**samples, **earlier.samples},
            broken="; ".join(filter(None, (earlier.broken, fault))) or None,
        )
    return ComparisonInput(
        name=where,
        variants=variants,
        facts=facts if isinstance(facts, dict) and facts else None,
        fingerprint=about.fingerprint,
        study=about.study,
        phases=tuple(phases),
        control=about.control,
        broken=f"{where}: {about.invalid}" if about.invalid else None,
    )


def _split_samples(place: str, data: tuple[float, ...], info: ExtraInfo) -> tuple[dict[str, Trials], str | None]:
    """The samples of one test, split at the trial boundaries; and why they do not count, if so."""
    # An unpaired comparison uses only one median of each trial.
    samples: dict[str, Trials] = {
        name: [(value,) for value in values] for name, values in info.medians.items() if name in METRICS
    }
    samples |= {kind: [(size,)] for kind, size in info.memory.items() if is_memory(kind)}
    counts = [trial.samples for trial in info.trials]
    if min(counts, default=0) < 1 or sum(counts) != len(data):
        return samples, f"{place}: its trials hold {counts} samples and {len(data)} were saved"
    ends = itertools.accumulate(counts)
    samples[info.metric] = [data[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return samples, None


def extra_info(run: Run, series: Series, phase: str, metric: str) -> dict[str, Any]:
    """The `extra_info` of one test, in addition to its samples: trial boundaries, other metrics of the phase, memory,
    checks."""
    measured = [name for name, item in METRICS.items() if item.phase == phase and series.measuring(name)]
    trials = series.measured(metric)
    last = trials[-1][0]
    checked = [record for record in series.ok if record.checks]
    kinds = dict.fromkeys(kind for record in series.ok for kind in record.memory)
    return {
        "run": run.manifest.run,
        "name": series.name,
        "variant": last.variant,
        "metric": metric,
        "interleaving": last.interleaving,
        "trials": [
            {
                "trial": record.trial,
                "replicate": record.replicate,
                "samples": len(samples),
                "turn_lengths": list(record.turn_lengths) if phase == "train" else [],
            }
            for record, samples in trials
        ],
        "medians": {
            name: [statistics.median(samples) for samples in series.trials(name)] for name in measured if name != metric
        },
        "estimates": {name: codec.to_json(series.estimate(name)) for name in measured},
        "memory": {kind: max(record.memory.get(kind, 0) for record in series.ok) for kind in kinds},
        "checks": [codec.to_json(check) for check in checked[-1].checks] if checked else [],
        "tokens_hash": last.tokens.get("hash"),
    }


def differences_from_saved(study: Study, session_facts: dict[str, Any], saved: dict[str, Any], where: str) -> list[str]:
    """The differences between this session and a saved file that make the two not comparable.

    Args:
        study: study of this session.
        session_facts: facts of this session that must agree (`provenance.fingerprint_fields`).
        saved: the content of the file.
        where: names the file in errors.

    Raises:
        UsageError: the file was not written by lorameter, or its content is damaged.
    """
    side = read_saved(saved, where)
    require(
        side.facts is not None and side.facts.get("written_by") != FOREIGN,
        f"{where}: the saved run was not written by lorameter. Compare another.",
    )
    found = session_differences(side, study, session_facts)
    return [f"{one.field}: {one.base!r} saved, {one.candidate!r} now" for one in found]


def about_run(run: Run) -> dict[str, Any]:
    """Facts about the whole file: the run, its fingerprint and variants, its control, and reasons for invalidity."""
    side = comparison_input(run)
    return {
        "schema": run.manifest.schema,
        "run": run.manifest.run,
        "fingerprint": run.manifest.fingerprint,
        "study": side.study,
        "variants": [codec.to_json(measured.variant) for measured in side.variants.values() if measured.variant],
        "control": codec.to_json(side.control),
        "invalid": side.broken,
        "failed": {name: measured.broken for name, measured in side.variants.items() if measured.broken},
    }
