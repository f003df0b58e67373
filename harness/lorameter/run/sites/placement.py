"""Where a run is measured: on one device of this machine, on several sites of it, or on a cluster whose sites are
described and alike before anything is planned.

A study says it or a command line does (`lorameter.studies.placement`). Whoever plans asks the venue for the machine,
what of its memory a site may take and whose device is to be held, and is told in the same words whichever it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorameter.errors import UsageError
from lorameter.machine.hardware_class import say_kind
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records import store
from lorameter.records.record import Notice
from lorameter.run.device_lock import IfBusy, hold_devices, tell_stderr
from lorameter.run.executors import open_executor
from lorameter.run.executors.host import Host
from lorameter.run.plan import Plan
from lorameter.run.sites.late_nodes import PendingNodes
from lorameter.run.sites.local import CpuOrGpuShare, check_spreadable, executors_of_ranks, local_sites
from lorameter.run.sites.prepare_nodes import describe_all, free_bytes_of, hold_all, those_that_answer
from lorameter.run.sites.remote import RemoteNode
from lorameter.studies.placement import HERE, SiteSpec, is_batch, read_asked
from lorameter.studies.study import Study

Planned = tuple[Plan, tuple[Notice, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One device of this machine unless it has sites: grounds on this machine, or stations on others."""

    said: str = ""
    """How the place was named, for messages."""
    grounds: tuple[CpuOrGpuShare, ...] = ()
    stations: tuple[RemoteNode, ...] = ()
    """Described, and alike."""
    notices: tuple[Notice, ...] = ()
    arrivals: PendingNodes | None = None
    """Where other stations may come from while these measure."""
    ranks: int = 1
    """Of a trial, each of which has a device of its own where there are several."""

    @property
    def machine(self) -> Machine:
        """That which a plan is made for."""
        return self.stations[0].facts.machine if self.stations else open_executor().machine()

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All kinds of them, as far as they are known, that of `machine` first."""
        kinds = {say_kind(one): one for one in (self.machine, *(station.facts.machine for station in self.stations))}
        return tuple(kinds.values())

    @property
    def facts(self) -> MachineFacts:
        """Of that machine, and of what is installed there."""
        return self.stations[0].facts if self.stations else open_executor().facts()

    @property
    def free_bytes(self) -> int | None:
        """What a site may take, on the one that has least; None where it cannot be known."""
        if self.stations:
            return free_bytes_of(self.stations)
        free = open_executor().free_bytes()
        shared = len(self.grounds) if self.grounds and self.machine.device == "cpu" else 1  # a GPU has its own memory
        return None if free is None else free // shared

    @property
    def is_spread(self) -> bool:
        """Whether replicates are measured on other machines, or on several sites of this one."""
        return bool(self.stations) or len(self.grounds) > 1

    def plan(self, make: Callable[[Machine], Planned]) -> Planned:
        """The plan for this place, with what is to be known of it; each kind of its machines must be able to measure
        it.

        Raises `UsageError` where they would alternate differently: trials of one run are alike.
        """
        plans = [make(machine) for machine in self.machines]
        levels = dict.fromkeys(plan.interleaving for plan, _ in plans)
        if len(levels) > 1:
            raise UsageError(
                f"mixed: trials would alternate otherwise on different sites: {', '.join(levels)}. Give one level for "
                "all, --interleave replicates, or measure one kind in a run of its own."
            )
        told = dict.fromkeys(notice for _, notices in plans for notice in notices)
        return plans[0][0], (*self.notices, *told)

    @contextlib.contextmanager
    def hold(self, if_busy: IfBusy) -> Iterator[bool]:
        """Meanwhile nobody else measures on its devices; says whether somebody had to be waited for."""
        if not self.stations:
            hosts = [ground.host for ground in self.grounds] or [Host()]
            taken = [one for host in hosts for one in executors_of_ranks(host, self.ranks)]
            with hold_devices(taken, if_busy) as waited:
                yield waited
            return
        if self.arrivals is not None:
            self.arrivals.if_busy = if_busy
        yield hold_all(self.stations, if_busy, tell_stderr, ranks=self.ranks)


@contextlib.contextmanager
def open_venue(study: Study, runs_dir: str | None) -> Iterator[Placement]:
    """The place that a study's protocol names.

    Args:
        study: whose replicates are to be measured there.
        runs_dir: where the user has runs; beside them lie the files of jobs.

    Raises:
        UsageError: a study that cannot be spread, no such GPU or cluster, or no such node.
        InvalidRunError: a node that does not answer, or is unlike the others.
    """
    place, ranks = study.protocol.place, study.workload.ranks
    if place.is_plain:
        yield Placement(ranks=ranks)
        return
    check_spreadable(study, place)  # before anything waits in a queue
    if place.on == HERE:
        grounds = local_sites(place.sites, open_executor().machine(), mixed=place.mixed)
        yield Placement(said=place.said, grounds=grounds, ranks=ranks)
    elif is_batch(place.on):
        with _open_jobs(place, runs_dir, ranks) as venue:
            yield venue
    else:
        from lorameter.run.sites.ray import open_stations

        with open_stations(place.on, place.sites, ranks=ranks) as stations:
            told = describe_all(stations, mixed=place.mixed, ranks=ranks)
            yield Placement(said=place.said, stations=stations, notices=told, ranks=ranks)


@contextlib.contextmanager
def _open_jobs(place: SiteSpec, runs_dir: str | None, ranks: int) -> Iterator[Placement]:
    from lorameter.run.sites.batch import check_here
    from lorameter.run.sites.slurm import open_jobs

    asked = read_asked(place.on)
    check_here(asked)
    with open_jobs(asked, store.runs_dir(runs_dir, make=True)) as (found, notices, jobs):
        lost: list[Notice] = []
        found = those_that_answer(found, lost)
        told = (*notices, *lost, *describe_all(found, mixed=place.mixed, ranks=ranks))
        yield Placement(said=place.said, stations=tuple(found), notices=told, arrivals=jobs, ranks=ranks)
