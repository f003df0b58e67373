"""Runs with several sites: different machines are judged site by site; sites of one kind form blocks.

Ratios differ between GPUs: a variant that is memory-bound on one GPU is compute-bound on another. A mean over them
would describe no real machine, so each site is judged separately, and code that combines their records is refused
(`lorameter.verdicts.series.group_trials`).

On sites of one kind a replicate is measured on one site, so a ratio is within a site, and a slow site slows both sides
of the ratio. Absolute values do differ: in a survey of clusters, GPUs of one model differed by 8 % on average, and
outliers by half (Sinha et al., "Not All GPUs Are Created Equal", 2022, arXiv 2208.11035).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import msgspec

from lorameter.errors import require
from lorameter.records.metrics import PRIMARY, get_samples
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Run

MIXED = "mixed"
"""The field of the protocol that allows different sites."""

MIN_SITE_DIFFERENCE = 0.10
"""Distance from the median step time of all sites at which a site is reported."""


def is_mixed(run: Run) -> bool:
    """Whether its sites may differ, according to its study or any of its records."""
    return bool(run.manifest.study.get("protocol", {}).get(MIXED)) or any(record.machine for record in run.records)


def runs_of_sites(run: Run) -> dict[str, Run]:
    """One run per site, with the trials of that site; trials without a site are left out."""
    return {site: _run_of(run, site) for site in sorted({record.site for record in run.records if record.site})}


def _run_of(run: Run, site: str) -> Run:
    records, disturbed = (
        tuple(record.replaced(machine="") for record in given if record.site == site)
        for given in (run.records, run.disturbed)
    )
    machine = next(record.machine for record in run.records if record.site == site)
    study: dict[str, Any] = run.manifest.study
    protocol = {key: value for key, value in study.get("protocol", {}).items() if key != MIXED}
    manifest = msgspec.structs.replace(
        run.manifest,
        study={**study, "protocol": protocol},
        order=tuple(record.trial for record in records),
        provenance={**run.manifest.provenance, "device_name": machine},
    )
    return dataclasses.replace(run, manifest=manifest, records=records, disturbed=disturbed)


def unmeasured_sites(run: Run) -> Iterator[str]:
    """Sentences about the sites that have measured nothing."""
    measured = {record.site for record in run.records if record.status == "ok"}
    for site in run.manifest.sites:
        if site not in measured:
            yield f"site {site} has measured nothing"
    if not (measured or run.manifest.sites):
        yield "no site has measured anything"


def describe_machines(records: Iterable[TrialRecord]) -> str:
    """Each site with its machine."""
    found = {record.site: record.machine for record in records if record.site}
    return "; ".join(f"{site}: {machine or 'unknown'}" for site, machine in sorted(found.items())) or "none measured"


def join_notices(run: Run, by_site: Mapping[str, Sequence[Notice]]) -> tuple[Notice, ...]:
    """The notices of a run whose sites are different machines: those common to all sites, and the others with their
    site."""
    ways = [dict.fromkeys(notices) for notices in by_site.values()]
    common = [notice for notice in next(iter(ways), {}) if all(notice in others for others in ways)]
    own = [
        msgspec.structs.replace(notice, message=f"{site}: {notice.message}")
        for site, notices in by_site.items()
        for notice in dict.fromkeys(notices)
        if notice not in common
    ]
    mixed = Notice(
        code="sites-mixed",
        message=f"the sites are different machines ({describe_machines(run.records)}): each is judged by itself, with "
        "its part of the replicates, and no number is taken over all of them.",
        remedy="Read each site; for one number measure on machines of one kind.",
    )
    return (mixed, *common, *own)


def refuse_mixed(run: Run, what: str) -> None:
    """Raise `UsageError` for a run whose sites are different machines, for which `what` is not defined."""
    require(
        not is_mixed(run),
        f"run {run.manifest.run}: its sites are different machines ({describe_machines(run.records)}), and {what} is "
        f"of one kind. Read each site by `lorameter report {run.manifest.run}`, or measure one kind in a separate "
        "run.",
    )


def _mean_logs(records: Sequence[TrialRecord]) -> dict[str, float]:
    """The mean log of the median step times on each site, over the variants that every site has; {} without any."""
    times: dict[str, dict[str, list[float]]] = {}
    for record in records:
        samples = get_samples(record, PRIMARY["train"])
        if record.status == "ok" and record.site and samples:
            variants = times.setdefault(record.site, {})
            logs = variants.setdefault(f"{record.name} {record.role} {record.side}", [])
            logs.append(math.log(median(samples)))
    shared = set.intersection(*map(set, times.values())) if times else set()
    return {site: fmean(fmean(own[name]) for name in shared) for site, own in times.items() if shared}


def site_notices(records: Sequence[TrialRecord]) -> Iterator[Notice]:
    """Notices about a run on several sites: how much they differ, and which site is an outlier."""
    sites = {record.site for record in records if record.site}
    if len(sites) < 2:
        return
    logs = _mean_logs(records)
    seen = ", ".join(f"{site} {math.expm1(log - fmean(logs.values())):+.1%}" for site, log in logs.items())
    yield Notice(
        code="sites",
        message=f"replicates were spread over {len(sites)} sites (step times, from their mean: {seen or 'not known'}). "
        "Ratios are within a site; an absolute value is the mean of these sites', and its interval is over them, not "
        "over replicates.",
        remedy="Measure on one site where absolute values matter.",
    )
    for site, log in logs.items() if len(logs) > 2 else ():  # with two sites, neither is an outlier
        away = math.expm1(log - median(logs.values()))
        if abs(away) > MIN_SITE_DIFFERENCE:
            yield Notice(
                code="node-mismatch",
                message=f"site {site} is {abs(away):.0%} {'slower' if away > 0 else 'faster'} than the median site.",
                remedy="Check its clocks, its temperature and other processes on it (lorameter doctor), or leave it "
                "out.",
            )
