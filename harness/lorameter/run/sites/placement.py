"""The place of a run: one device of this machine, or jobs on several sites of this machine, Ray or SLURM.

The study or the command line names the place (`lorameter.studies.protocol`). A plan depends on the machine, so on a
cluster a first job describes a node.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records import store
from lorameter.run.sites.driver import POLL_S, Launcher
from lorameter.run.sites.folder import JobOrder, JobState, read_state, write_order
from lorameter.run.sites.gpus import LocalJobs, check_spreadable, executors_of_ranks, local_sites
from lorameter.run.sites.slurm import RayJobs, SlurmJobs
from lorameter.run.workers import IfBusy, hold_devices, open_executor
from lorameter.run.workers.environment import Host
from lorameter.studies.protocol import HERE, is_slurm
from lorameter.studies.study import Study


@dataclass(slots=True, kw_only=True)
class Placement:
    """One device of this machine, or the sites of a job launcher."""

    launcher: Launcher | None = None
    hosts: Mapping[str, Host] = field(default_factory=dict)
    """The sites of this machine, if the jobs run on it."""
    described: JobState | None = None
    """The state of a job that described a node of the cluster, if the jobs run on one."""
    ranks: int = 1
    """Ranks of a trial; if there are several, each has its own device."""
    if_busy: IfBusy = "share"
    """The action of a job if its device is in use; "share" if this process holds the devices."""

    @property
    def is_remote(self) -> bool:
        """Whether trials run on other machines."""
        return self.described is not None

    @property
    def machine(self) -> Machine:
        """The machine for which a plan is made."""
        return self.facts.machine if self.is_remote else open_executor().machine()

    @property
    def facts(self) -> MachineFacts:
        """The machine and its installed software."""
        facts = None if self.described is None else self.described.facts
        return facts or open_executor().facts()

    @property
    def free_bytes(self) -> int | None:
        """Memory available to one site; None if unknown."""
        if self.described is not None:
            return self.described.free_bytes
        free = open_executor().free_bytes()
        shared = len(self.hosts) if self.hosts and self.machine.device == "cpu" else 1  # each GPU has its own memory
        return None if free is None else free // shared

    def hold(self, if_busy: IfBusy) -> contextlib.AbstractContextManager[bool]:
        """Lock the devices of this machine inside a block, which receives whether it waited for another run. Each job
        on a cluster locks its own device."""
        self.if_busy = if_busy if self.is_remote else "share"
        hosts = [] if self.is_remote else [*self.hosts.values()] or [Host()]
        return hold_devices([one for host in hosts for one in executors_of_ranks(host, self.ranks)], if_busy)


@contextlib.contextmanager
def open_placement(study: Study, runs_dir: str | None) -> Iterator[Placement]:
    """The place that a study's protocol names.

    Args:
        study: the study whose replicates are measured there.
        runs_dir: the user's folder of runs; a job that describes its node writes its files there.

    Raises:
        UsageError: the study cannot be spread, or the GPU, cluster or node does not exist.
        InvalidRunError: no node answers.
    """
    place, ranks = study.protocol, study.workload.ranks
    if place.is_plain:
        yield Placement(ranks=ranks)
        return
    check_spreadable(study)  # before a job waits in a queue
    if place.on == HERE:
        hosts = local_sites(place.sites, open_executor().machine(), mixed=place.mixed)
        yield Placement(launcher=LocalJobs(hosts), hosts=hosts, ranks=ranks)
        return
    launcher: Launcher = SlurmJobs(place.on) if is_slurm(place.on) else RayJobs(place.on, place.sites, ranks=ranks)
    with contextlib.closing(launcher):
        described = describe_node(launcher, store.runs_dir(runs_dir, make=True), place.said)
        yield Placement(launcher=launcher, described=described, ranks=ranks)


def describe_node(launcher: Launcher, runs: Path, where: str) -> JobState:
    """Run a job that describes its node; `where` names the place in errors. Raises `InvalidRunError` if the job ends
    without a result."""
    with tempfile.TemporaryDirectory(prefix=".job-", dir=runs.resolve(), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        digest = write_order(folder, JobOrder(site=launcher.slots[0], cwd=str(Path.cwd())))
        launcher.start(folder, launcher.slots[0], digest)
        while not (state := read_state(folder)).ended:
            end = launcher.describe_end(folder)
            if end and not (state := read_state(folder)).ended:
                raise InvalidRunError(f"{where}: no node was described: {end}.")
            time.sleep(POLL_S)
        if state.error:
            raise (UsageError if state.usage else InvalidRunError)(f"{where}: site {state.site}: {state.error}")
        return state
