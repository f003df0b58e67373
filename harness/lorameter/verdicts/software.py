"""The software that scripts used for training, as reported by their own processes.

A script has its own interpreter: that of its command, of a launcher in front of it, or of an environment that the
command activates. Before the start, lorameter can only resolve the word `python`, which may be another interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorameter.machine.software import KERNELS, kernel_libraries, normal_name
from lorameter.records.record import TrialRecord

OURS = "lorameter"
"""The measuring package; it is the same in every process, whatever the interpreter has installed."""
BETWEEN = " or "
"""Separates versions of one package if trials report several."""
REPORTED = ("python", "cuda", "libraries", KERNELS)
"""Fields of a run's provenance that a script's process reports when it starts; before, they are a guess."""
NONE = "none"
"""Replaces the version of a package that is not installed."""


def versions_by_name(records: Iterable[TrialRecord]) -> dict[str, str]:
    """The versions of each package that a script's trials report, without duplicates; {} if no trial reports any."""
    reported = [record.software for record in records if record.software]
    names = sorted({name for one in reported for name in one})
    return {name: BETWEEN.join(sorted({one.get(name, NONE) for one in reported})) for name in names}


def versions_of(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, str | None]:
    """Versions of Python, the libraries, and the packages of an engine: as reported by the trials, else from the
    provenance. None for a package that is not installed; if there are several versions, the text has all of them."""
    stated = {"python": provenance.get("python"), **provenance.get("libraries", {}), **provenance.get("engine", {})}
    stated |= {"cuda": provenance["cuda"]} if provenance.get("cuda") else {}
    reported = versions_by_name(records)
    if not reported:
        return stated
    names = dict.fromkeys([*stated, *(["cuda"] if "cuda" in reported else [])])
    found = {name: reported.get(normal_name(name), NONE) for name in names}
    versions = {name: None if seen == NONE else seen for name, seen in found.items()}
    return versions | ({OURS: stated[OURS]} if OURS in stated else {})


def differing_versions(base: Iterable[TrialRecord], candidate: Iterable[TrialRecord]) -> Iterator[tuple[str, str, str]]:
    """Each package whose version differs between trials, with the versions of both sides; nothing if a side reports
    none."""
    ours, theirs = versions_by_name(base), versions_by_name(candidate)
    for name in sorted({*ours, *theirs} - {OURS}) if ours and theirs else ():
        base_version, candidate_version = ours.get(name, NONE), theirs.get(name, NONE)
        if base_version != candidate_version or BETWEEN in base_version:
            yield name, base_version, candidate_version


def facts_of(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, Any]:
    """The provenance, with the facts that the trials report in place of those found before the start."""
    records = list(records)
    reported = versions_by_name(records)
    if not reported:
        return dict(provenance)
    versions = versions_of(provenance, records)
    libraries = {name: versions.get(name) for name in provenance.get("libraries", {})}
    found = {"libraries": libraries} | {name: versions[name] for name in ("python", "cuda") if name in versions}
    if kernels := provenance.get(KERNELS):
        found[KERNELS] = kernel_libraries(reported, versions.get("cuda"), kernels["switches"])
    return {**provenance, **found}


def say_threads(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> str:
    """The number of threads of a process, as reported by the trials of scripts."""
    reported = sorted({record.values["threads"] for record in records if "threads" in record.values})
    counts = [f"{count:g}" for count in reported] or [str(provenance.get("threads", "unknown"))]
    return f"{BETWEEN.join(counts)} thread{'' if counts == ['1'] else 's'}"
