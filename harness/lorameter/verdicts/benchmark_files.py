"""pytest-benchmark files as a side of a comparison, those of other projects included.

A file of ours keeps the boundaries between trials with the raw samples, so it says as much as the run itself. Any
other file holds the rounds of one process. However many they are, they are one replicate: most of the scatter of a
duration lies between processes (Kalibera & Jones 2013), so one file gives a ratio and no interval. Several files
are replicates and give an interval.

pytest-benchmark's files have no field for enough to compare two of them as well as the runs themselves, so ours adds
it: trial boundaries make the raw samples replicates again, and the control and the failures are written down too,
because a file in which a failed variant is merely absent would hide it.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, impossible
from lorameter.records import codec, fileio
from lorameter.records.metrics import METRICS
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.study import Study
from lorameter.studies.variant import AnyVariant
from lorameter.verdicts.comparison_input import (
    ComparisonInput,
    Measurements,
    comparison_input,
    differences,
    fact_differences,
    is_memory,
)
from lorameter.verdicts.series import Series, Trials
from lorameter.verdicts.validity import control_faults, say_faults

FOREIGN_METRIC = "round_time_s"
"""What pytest-benchmark itself measures: the time of one round, whatever it held."""
NO_SAMPLES = "no samples were saved, only their summary: save again with --benchmark-save-data"
ONE_PROCESS = (
    "all rounds come from one process, which is one replicate and gives no interval: run the benchmarks several times "
    "on each side, with --benchmark-save=NAME --benchmark-save-data, and compare '.benchmarks/*/*_NAME.json'"
)
FOREIGN = "pytest-benchmark alone"
"""What wrote a file that is not ours."""


def read_benchmark_json(path: Path) -> ComparisonInput:
    """A file that pytest-benchmark wrote.

    Raises:
        UsageError: not JSON, or not of pytest-benchmark's shape; file, key and value are named.
    """
    try:
        data = fileio.read_json(path, fileio.BENCHMARK_BYTES)
    except fileio.NotReadableError as error:
        raise UsageError(
            f"{path}: cannot be read as JSON: {error}. Give a file that pytest-benchmark wrote, or a run."
        ) from None
    where = str(path)
    entries = _expect(where, "benchmarks", data.get("benchmarks") if isinstance(data, dict) else None, list)
    machine = _expect(where, "machine_info", data.get("machine_info", {}), dict)
    rows = [_expect(where, f"benchmarks[{index}]", entry, dict) for index, entry in enumerate(entries)]
    ours = "lorameter" in machine or any("trials" in _info(where, row) for row in rows)
    return _ours(where, rows, machine, data) if ours else _foreign(where, rows, machine)


def list_benchmarks(name: str) -> list[Path]:
    """The files that a pattern names, or those of a folder and of the folders in it, of which pytest-benchmark has one
    for each machine; empty for anything else."""
    if glob.has_magic(name):
        return sorted(map(Path, glob.glob(name)))  # noqa: PTH207 - the pattern may be absolute
    return sorted(Path(name).rglob("*.json"))


def read_benchmarks(name: str) -> ComparisonInput:
    """All files of a folder or pattern as replicates of one side.

    Raises:
        UsageError: a file that cannot be read, that lorameter wrote, or that is of another machine than the first.
    """
    sides = [read_benchmark_json(path) for path in list_benchmarks(name)]
    trials: dict[str, Trials] = {}
    for side in sides:
        _check_alike(sides[0], side)
        for name, measured in side.sides.items():
            trials.setdefault(name, []).extend(measured.trials.get(FOREIGN_METRIC, ()))
    return dataclasses.replace(
        sides[0],
        name=name,
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
            f"{side.name}: {one.field} is {one.candidate!r}, and {one.base!r} in {first.name}: the files of one "
            "side are replicates of one machine. Move it to a folder of its own."
        )


def _foreign(where: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> ComparisonInput:
    sides: dict[str, Measurements] = {}
    for index, row in enumerate(rows):
        place = f"benchmarks[{index}]"
        name: str = _expect(where, f"{place}.fullname", row.get("fullname", row.get("name")), str)
        if name in sides:
            raise impossible(
                where, f"{place}.fullname", name, "a second benchmark of that name", "Save them separately."
            )
        stats = _expect(where, f"{place}.stats", row.get("stats"), dict)
        samples = stats.get("data") or []
        trial = _numbers(where, f"{place}.stats.data", samples)
        median = _numbers(where, f"{place}.stats.median", [stats["median"]] if "median" in stats else [])
        trials = [trial] if trial else [median] if median else []
        sides[name] = Measurements(
            name=name,
            trials={FOREIGN_METRIC: trials} if trials else {},
            no_interval=ONE_PROCESS if trial else NO_SAMPLES,
        )
    cpu = machine.get("cpu")
    return ComparisonInput(
        name=where,
        sides=sides,
        facts={
            "written_by": FOREIGN,
            "cpu": cpu.get("brand_raw", cpu.get("brand")) if isinstance(cpu, dict) else None,
            **{key: machine.get(key) for key in ("machine", "system", "python_implementation", "python_version")},
        },
        phases=(),
    )


def _ours(where: str, rows: list[dict[str, Any]], machine: dict[str, Any], data: dict[str, Any]) -> ComparisonInput:
    about = _expect(where, "lorameter", data.get("lorameter", {}), dict)
    facts = machine.get("lorameter")
    variants = _variants(where, about)
    failed = _expect(where, "lorameter.failed", about.get("failed", {}), dict)
    sides = {str(name): Measurements(name=str(name), broken=f"{where}: {why}") for name, why in failed.items()}
    phases: list[str] = []
    for index, row in enumerate(rows):
        info = _info(where, row)
        if "trials" not in info:  # another benchmark of the same session, none of ours
            continue
        name, metric = _name(where, index, row, info), info.get("metric")
        if not isinstance(metric, str) or metric not in METRICS:
            raise impossible(where, f"benchmarks[{index}].extra_info.metric", metric, "not a metric", "Save it again.")
        phases.append(METRICS[metric].phase)
        side = _measured(where, index, row, info, name, metric, variants.get(name))
        sides[name] = _united(sides.get(name), side)
    control = _control(where, about)
    invalid = _optional(where, about, "invalid") or say_faults(tuple(control_faults(control.items())))
    if "control" not in about:
        invalid = "it does not say how its control came out. Save it again"
    return ComparisonInput(
        name=where,
        sides=sides,
        facts=facts if isinstance(facts, dict) and facts else None,
        fingerprint=_optional(where, about, "fingerprint"),
        study=_optional(where, about, "study"),
        phases=tuple(dict.fromkeys(phases)),
        control=control,
        broken=f"{where}: {invalid}" if invalid else None,
    )


def _measured(
    where: str,
    index: int,
    row: dict[str, Any],
    info: dict[str, Any],
    name: str,
    metric: str,
    variant: AnyVariant | None,
) -> Measurements:
    place = f"benchmarks[{index}]"
    trials = [
        _expect(where, f"{place}.extra_info.trials[{number}]", trial, dict)
        for number, trial in enumerate(_expect(where, f"{place}.extra_info.trials", info["trials"], list))
    ]
    stats = _expect(where, f"{place}.stats", row.get("stats"), dict)
    samples = _numbers(where, f"{place}.stats.data", stats.get("data") or [])
    counts = [trial.get("samples") for trial in trials]
    broken = None
    split: Trials = []
    if not all(isinstance(count, int) and count > 0 for count in counts) or sum(counts) != len(samples):
        broken = f"{where}: {place}: its trials hold {counts} samples and {len(samples)} were saved"
    else:
        split = list(_split(samples, counts))
    measured: dict[str, Trials] = {metric: split} if split else {}
    medians = _expect(where, f"{place}.extra_info.medians", info.get("medians", {}), dict)
    for other, values in medians.items():  # one a trial: all that an unpaired comparison takes of a metric
        if other in METRICS and other != metric:
            measured[other] = [(value,) for value in _numbers(where, f"{place}.extra_info.medians.{other}", values)]
    peaks: dict[str, tuple[float, ...]] = {}
    memory = _expect(where, f"{place}.extra_info.memory", info.get("memory", {}), dict)
    for kind, value in memory.items():
        if is_memory(kind):
            peaks[kind] = tuple(_numbers(where, f"{place}.extra_info.memory.{kind}", [value]))
    identity = info.get("variant")
    return Measurements(
        name=name,
        id=identity if isinstance(identity, str) else None,
        variant=variant,
        trials=measured,
        peaks=peaks,
        broken=broken,
    )


def _united(first: Measurements | None, second: Measurements) -> Measurements:
    """The phases of one variant stand in one entry each; what both hold is the same."""
    if first is None:
        return second
    broken = [reason for reason in (first.broken, second.broken) if reason]
    if first.id is not None and first.id != second.id:
        broken.append(f"two variants, {first.id} and {second.id}, have the name {second.name!r}")
    return Measurements(
        name=second.name,
        id=second.id,
        variant=second.variant,
        trials={**second.trials, **first.trials},
        peaks={**second.peaks, **first.peaks},
        broken="; ".join(broken) or None,
    )


def _split(samples: tuple[float, ...], counts: list[Any]) -> Iterator[tuple[float, ...]]:
    start = 0
    for count in counts:
        yield samples[start : start + count]
        start += count


def _name(where: str, index: int, row: dict[str, Any], info: dict[str, Any]) -> str:
    params = row.get("params")
    for name in (info.get("name"), params.get("variant_name") if isinstance(params, dict) else None, row.get("param")):
        if isinstance(name, str):
            return name
    raise impossible(where, f"benchmarks[{index}].param", row.get("param"), "names no variant", "Save it again.")


def _variants(where: str, about: dict[str, Any]) -> dict[str, AnyVariant]:
    variants = _expect(where, "lorameter.variants", about.get("variants", []), list)
    read = [codec.from_json(AnyVariant, variant, f"{where}, lorameter.variants") for variant in variants]
    return {variant.name: variant for variant in read}


def _control(where: str, about: dict[str, Any]) -> dict[str, Comparison | None]:
    control = _expect(where, "lorameter.control", about.get("control", {}), dict)
    return {
        str(phase): None if result is None else codec.from_json(Comparison, result, f"{where}, lorameter.control")
        for phase, result in control.items()
    }


def _optional(where: str, about: dict[str, Any], key: str) -> str | None:
    value = about.get(key)
    return None if value is None else str(_expect(where, f"lorameter.{key}", value, str))


def _info(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_expect(where, "extra_info", row.get("extra_info", {}), dict))


def _numbers(where: str, key: str, values: Any) -> tuple[float, ...]:
    _expect(where, key, values, list)
    for value in values:
        if type(value) is not float and (type(value) is not int or not math.isfinite(_float(value))):
            raise impossible(where, key, value, "a number is expected", "Save the benchmarks again.")
    return tuple(map(float, values))


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _expect(where: str, key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        said = "nothing" if value is None else f"a {type(value).__name__}"
        words: dict[type, str] = {list: "a list", dict: "a table", str: "a text"}
        raise UsageError(
            f"{where}: {key}: {words[kind]} is expected and {said} is there. "
            "Give a file that pytest-benchmark wrote (--benchmark-save or --benchmark-json), or a run."
        )
    return value


def extra_info(run: Run, series: Series, phase: str, metric: str) -> dict[str, Any]:
    """What a file holds of one test in addition to its samples: trial boundaries, other metrics of the phase, memory,
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


def unlike(study: Study, ours: dict[str, Any], saved: dict[str, Any], where: str) -> list[str]:
    """What differs between this session and a saved file, as far as two runs must agree to be compared.

    Args:
        study: of this session.
        ours: what must agree of this session (`provenance.comparable`).
        saved: the content of the file.
        where: names the file in errors.

    Raises:
        UsageError: it was not written by lorameter, or has not the shape of what was.
    """
    theirs = _expect(where, "machine_info", saved.get("machine_info"), dict).get("lorameter")
    if theirs is None:
        raise UsageError(f"{where}: the saved run was not written by lorameter. Compare another.")
    theirs = _expect(where, "machine_info.lorameter", theirs, dict)
    different = [
        f"{difference.field}: {difference.base!r} saved, {difference.candidate!r} now"
        for difference in fact_differences(codec.to_json(theirs), codec.to_json(ours))
    ]
    variants = {variant.name: variant.id for variant in study.variants}
    for index, entry in enumerate(_expect(where, "benchmarks", saved.get("benchmarks"), list)):
        bench = _expect(where, f"benchmarks[{index}]", entry, dict)
        name, measured = bench.get("param"), _info(where, bench).get("variant")
        if isinstance(name, str) and name in variants and measured != variants[name]:
            different.append(f"variant {name}: {measured} saved, {variants[name]} now")
    return different


def about_run(run: Run) -> dict[str, Any]:
    """What a file holds once: the run, its fingerprint and variants, its control, and what does not count."""
    side = comparison_input(run)
    return {
        "schema": run.manifest.schema,
        "run": run.manifest.run,
        "fingerprint": run.manifest.fingerprint,
        "study": side.study,
        "variants": [codec.to_json(measured.variant) for measured in side.sides.values() if measured.variant],
        "control": codec.to_json(side.control),
        "invalid": side.broken,
        "failed": {name: measured.broken for name, measured in side.sides.items() if measured.broken},
    }
