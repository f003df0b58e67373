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

import msgspec

from lorameter.records.metrics import PRIMARY, get_samples
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Run


def is_mixed(run: Run) -> bool:
    """Whether its sites are different machines, as its records say."""
    return any(record.machine for record in run.records)


def runs_of_sites(run: Run) -> dict[str, Run]:
    """One run per site, with the trials of that site; trials without a site are left out."""
    return {site: _run_of(run, site) for site in sorted({record.site for record in run.records if record.site})}


def _run_of(run: Run, site: str) -> Run:
    records, disturbed = (
        tuple(record.replaced(machine="") for record in given if record.site == site)
        for given in (run.records, run.disturbed)
    )
    machine = next(record.machine for record in run.records if record.site == site)
    manifest = msgspec.structs.replace(
        run.manifest,
        order=tuple(record.trial for record in records),
        provenance={**run.manifest.provenance, "device_name": machine},
    )
    return dataclasses.replace(run, manifest=manifest, records=records, disturbed=disturbed)


def describe_machines(records: Iterable[TrialRecord]) -> str:
    """Each site with its machine."""
    found = {record.site: record.machine for record in records if record.site}
    return "; ".join(f"{site}: {machine or 'unknown'}" for site, machine in sorted(found.items()))


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
    """A notice about a run on several sites: how much they differ."""
    sites = {record.site for record in records if record.site}
    if len(sites) < 2:
        return
    logs = _mean_logs(records)
    differences = [f"{site} {math.expm1(log - fmean(logs.values())):+.1%}" for site, log in logs.items()]
    listed = ", ".join(differences) or "not known"
    yield Notice(
        code="sites",
        message=f"replicates were spread over {len(sites)} sites (step times, from their mean: {listed}). "
        "Ratios are within a site; an absolute value is the mean of these sites', and its interval is over them, not "
        "over replicates.",
        remedy="Where absolute values matter, measure on one site, and leave out a site that is far from the others "
        "(`lorameter doctor` on it shows its clocks, its temperature and other processes).",
    )
