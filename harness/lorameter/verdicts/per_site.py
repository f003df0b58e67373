"""A run whose sites are unlike machines: it is read as several runs, one of each site, and never as one.

Ratios of other GPUs are other ratios: a variant that is bound by memory on one is bound by arithmetic on the next. A
mean over them would be of no machine that there is, and its interval would be that of the choice of machines. So each
site is judged by itself, and code that combines their records without asking is refused (`series_of`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lorameter.errors import UsageError
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Run

MIXED = "mixed"
"""The field of the protocol."""


def is_mixed(run: Run) -> bool:
    """Whether its sites may be unlike: by its study, or by any of its records."""
    return bool(run.manifest.study.get("protocol", {}).get(MIXED)) or any(record.machine for record in run.records)


def runs_of_sites(run: Run) -> dict[str, Run]:
    """The run as it would be if each site had one of its own, by site; trials of no site are in none."""
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


def fault_of_sites(run: Run) -> Iterator[str]:
    """That a site has measured nothing: it was to be judged, and the others do not speak for it."""
    measured = {record.site for record in run.records if record.status == "ok"}
    for site in run.manifest.sites:
        if site not in measured:
            yield f"site {site} has measured nothing"
    if not (measured or run.manifest.sites):
        yield "no site has measured anything"


def say_machines(records: Iterable[TrialRecord]) -> str:
    """Each site with its machine."""
    found = {record.site: record.machine for record in records if record.site}
    return "; ".join(f"{site}: {machine or 'unknown'}" for site, machine in sorted(found.items())) or "none measured"


def mixed_notice(run: Run) -> Notice:
    """What to know of such a run."""
    return Notice(
        code="sites-mixed",
        message=f"the sites are different machines ({say_machines(run.records)}): each is judged by itself, with its "
        f"part "
        "of the replicates, and no number is taken over all of them.",
        remedy="Read each site; for one number measure on machines of one kind.",
    )


def join_notices(run: Run, by_site: Mapping[str, Sequence[Notice]]) -> tuple[Notice, ...]:
    """What each site gives reason to say, by site, once where all of them do; before it what the run is."""
    ways = [dict.fromkeys(notices) for notices in by_site.values()]
    common = [notice for notice in next(iter(ways), {}) if all(notice in others for others in ways)]
    own = [
        msgspec.structs.replace(notice, message=f"{site}: {notice.message}")
        for site, notices in by_site.items()
        for notice in dict.fromkeys(notices)
        if notice not in common
    ]
    return (mixed_notice(run), *common, *own)


def refuse_mixed(run: Run, what: str) -> None:
    """Raises `UsageError` for such a run, of which `what` cannot be had."""
    if is_mixed(run):
        raise UsageError(
            f"run {run.manifest.run}: its sites are different machines ({say_machines(run.records)}), and {what} is of "
            f"one kind. Read each site by `lorameter report {run.manifest.run}`, or measure one kind in a run of its "
            "own."
        )
