"""The sites of this machine: its GPUs, or shares of its CPUs.

Trials that are measured concurrently on one machine share its memory bus and its power, but neither GPUs nor cores:
each site has its own CPUs, to which its processes are pinned.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lorameter.errors import UsageError, require
from lorameter.machine.nvml import VARIABLE, VisibleGpu, describe_gpus, shared_boards, visible_gpus
from lorameter.machine.processes import CPUS, PARENT, exit_words, physical_cores
from lorameter.machine.provenance import Machine
from lorameter.records.units import format_count
from lorameter.run.sites.folder import LOG, job_command
from lorameter.run.workers import Executor, open_executor
from lorameter.run.workers.environment import Host
from lorameter.studies.protocol import HERE, format_sites, site_numbers
from lorameter.studies.study import Study


def local_sites(listed: Sequence[str], machine: Machine, *, mixed: bool = False) -> dict[str, Host]:
    """The hosts of the sites that a user lists, such as 0, 1, 2, 3, by the names of the sites: on a GPU machine
    GPUs in CUDA's order of the visible ones, on a CPU machine equal shares of its cores. A site for several ranks (0+1)
    has one GPU or share for each rank.

    Raises:
        UsageError: a GPU does not exist, GPUs are of different kinds and not `mixed`, or there are fewer cores than
            sites.
    """
    groups = [site_numbers(name) for name in listed]
    numbers = [number for group in groups for number in group]
    parts = iter(share_cpus(os.sched_getaffinity(0), len(numbers), format_sites(listed)))
    on_cpu, sites = machine.device == "cpu", dict[str, Host]()
    gpus = {} if on_cpu else dict(zip(numbers, _find_gpus(numbers, listed, mixed=mixed), strict=True))
    for group in groups:
        environment = {CPUS: ",".join(str(cpu) for _ in group for cpu in next(parts))}
        if not on_cpu:
            environment[VARIABLE] = ",".join(str(gpus[number].entry) for number in group)
            kinds = sorted({gpus[number].kind for number in group})
            require(
                len(kinds) == 1,
                f"{format_sites(listed)}: the ranks of one trial would be on GPUs of different kinds "
                f"({', '.join(kinds)}), and the faster ones would wait. Join GPUs of one kind.",
            )
        sites["-".join(["cpus" if on_cpu else "gpu", *map(str, group)])] = Host(environment=environment)
    return sites


def check_spreadable(study: Study) -> None:
    """Raise `UsageError` for a study whose trials choose their devices themselves, and for sites of this machine whose
    number of GPUs differs from the ranks of a trial."""
    place, ranks = study.protocol, study.workload.ranks
    require(
        study.supports("built"),
        f"{place.said}: study {study.name} measures processes that choose their devices themselves, such as scripts. "
        "Remove the option.",
    )
    site, other = ("+".join(map(str, range(first, first + ranks))) for first in (0, ranks))
    require(
        place.on != HERE or all(len(site_numbers(name)) == ranks for name in place.sites),
        f"{place.said}: a site has a GPU, or a share of the CPUs, for each rank of a trial, and study "
        f"{study.name} has ranks = {ranks}. Write {site} for a site, {site},{other} for two.",
    )


def share_cpus(cpus: Iterable[int], sites: int, option: str) -> list[Sequence[int]]:
    """Equal parts of the cores, one for each site, as CPU numbers: two threads of one core are never on two sites.
    Raises `UsageError`, beginning with the `option`, for too many sites."""
    cores = physical_cores(cpus)
    each = len(cores) // sites
    threads = sum(map(len, cores))
    of_cores = "" if threads == len(cores) else f" of {format_count(len(cores), 'core')}"
    require(
        each,
        f"{option}: {sites} sites and {format_count(threads, 'CPU')}{of_cores} that this process may use: they "
        "would share cores. Use fewer sites.",
    )
    return [sorted(itertools.chain(*cores[site * each : (site + 1) * each])) for site in range(sites)]


def _find_gpus(numbers: Sequence[int], listed: Sequence[str], *, mixed: bool) -> list[VisibleGpu]:
    """GPUs by their numbers among the visible ones."""
    option, visible = format_sites(listed), visible_gpus().value
    if visible is None:
        raise UsageError(f"{option}: the GPUs of this machine cannot be listed. Remove the option.")
    gpus: list[VisibleGpu] = []
    for number in numbers:
        require(number < len(visible), f"{option}: GPU {number}: {len(visible)} are visible here. Count from 0.")
        gpu = visible[number]
        require(
            gpu.name.value is not None,
            f"{option}: GPU {number} cannot be identified: {gpu.name.reason}. Remove it.",
        )
        gpus.append(gpu)
    for parts in shared_boards(gpus):
        raise UsageError(
            f"{option}: {describe_gpus(parts)} are parts of one GPU, and each would affect the times "
            "of the other. Name one part of each GPU."
        )
    kinds = {gpu.kind for gpu in gpus}
    require(
        len(kinds) <= 1 or mixed,
        f"{option}: GPUs of different kinds ({', '.join(sorted(kinds))}), whose times are not those of one "
        "machine. Name GPUs of one kind, and measure the others in a separate run, or judge each site "
        "separately with --mixed.",
    )
    return gpus


def executors_of_ranks(host: Host, ranks: int) -> list[Executor]:
    """An executor for each GPU that the ranks of a trial use in a host (the first visible ones); one for the host's
    device if there is one rank, or if no GPU is known. Nothing is started."""
    gpus = visible_gpus(host.variables(os.environ)).value or () if ranks > 1 else ()
    variables = [{VARIABLE: str(gpu.entry)} for gpu in gpus[:ranks]] or [{}]
    return [open_executor(host=dataclasses.replace(host, environment=host.environment | one)) for one in variables]


class LocalJobs:
    """Starts each job as a subprocess on a GPU, or on a share of the CPUs."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self.slots, self._hosts = tuple(hosts), hosts
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path, slot: str, digest: str) -> None:
        """Start a job; it is killed when this process ends."""
        variables = self._hosts[slot].variables(os.environ) | {PARENT: str(os.getpid())}
        with (folder / LOG).open("wb") as log:
            self._processes[folder] = subprocess.Popen(
                job_command(folder, digest),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # this process handles Ctrl-C at the terminal
            )

    def describe_end(self, folder: Path) -> str | None:
        """The exit status of a job, as text; None while it is running."""
        code = self._processes[folder].poll()
        return None if code is None else f"its process ended with {exit_words(code)}"

    def cancel(self) -> None:
        """Ask all jobs to end."""
        for process in self._processes.values():
            process.terminate()

    def close(self) -> None:
        """Kill the jobs that have not ended."""
        for process in self._processes.values():
            process.kill()
            process.wait()
