"""The software that scripts trained with, as their own processes report it.

A script has an interpreter of its own: that of its command, of a launcher in front of it, or of an environment that the
command turns on. What lorameter found before the start is what the word python means, which may be another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorameter.machine.software import KERNELS, kernel_libraries, normal_name
from lorameter.records.record import TrialRecord

OURS = "lorameter"
"""The package that measures, which is the same in every process whatever its interpreter has installed."""
BETWEEN = " or "
"""Between versions of one package, where trials report several."""
REPORTED = ("python", "cuda", "libraries", KERNELS)
"""Fields of a run's provenance that a script's own process reports when it has begun; before, they are a guess."""
NONE = "none"
"""In place of the version of what is not installed."""


def versions_by_name(records: Iterable[TrialRecord]) -> dict[str, str]:
    """The versions of each package that the trials of a script report, each once; {} where none reports any."""
    reported = [record.software for record in records if record.software]
    names = sorted({name for one in reported for name in one})
    return {name: BETWEEN.join(sorted({one.get(name, NONE) for one in reported})) for name in names}


def versions_of(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, str | None]:
    """Python, the libraries, and what an engine comes with: as the trials report it, and where they report nothing as
    the provenance does. None for what is not installed; all versions where there are several."""
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
    """Each package of which not all trials of both report the same version, with the versions of either; nothing where
    one of them reports none."""
    ours, theirs = versions_by_name(base), versions_by_name(candidate)
    for name in sorted({*ours, *theirs} - {OURS}) if ours and theirs else ():
        base_version, candidate_version = ours.get(name, NONE), theirs.get(name, NONE)
        if base_version != candidate_version or BETWEEN in base_version:
            yield name, base_version, candidate_version


def facts_of(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, Any]:
    """The provenance with what the trials report in place of what was found before the start."""
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
    """On how many threads a process computes, as the trials of scripts report it."""
    reported = sorted({record.values["threads"] for record in records if "threads" in record.values})
    counts = [f"{count:g}" for count in reported] or [str(provenance.get("threads", "unknown"))]
    return f"{BETWEEN.join(counts)} thread{'' if counts == ['1'] else 's'}"
