"""The sites of this machine: its GPUs, or shares of its CPUs.

A trial that is measured beside others on one machine shares its memory bus and its power with them, but neither its
GPU nor its cores: each site has CPUs of its own, and its processes stay on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.cores import cores_of
from lorameter.machine.gpus import VisibleCard, say_entries, shared_boards, visible_cards
from lorameter.machine.hardware_class import say_kind
from lorameter.machine.nvml import VARIABLE
from lorameter.machine.processes import CPUS
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_count
from lorameter.records.worker_info import WorkerInfo
from lorameter.run.budget import Budget, Part, TimeLimitTooShortError
from lorameter.run.executors import Executor, open_executor
from lorameter.run.executors.host import Host
from lorameter.run.group_runner import ProgressListener
from lorameter.run.plan import Plan
from lorameter.run.prepare import greet
from lorameter.run.runner import run_plan
from lorameter.run.trial_setup import RunContext
from lorameter.studies.placement import HERE, SiteSpec, numbers_of, say_sites
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOrGpuShare:
    """One site: a name for the records, and how its processes are started."""

    name: str
    host: Host
    machine: str = ""
    """The kind of it, for a reader."""

    def of(self, host: Host) -> Host:
        """Another host, of one side of an A/B, on this site."""
        return dataclasses.replace(host, environment={**host.environment, **self.host.environment})


def local_sites(listed: Sequence[str], machine: Machine, *, mixed: bool = False) -> tuple[CpuOrGpuShare, ...]:
    """The sites that a user lists, such as 0, 1, 2, 3: on a GPU machine GPUs, in the order in which CUDA numbers those
    that are visible; on a CPU as many equal shares of its cores. A site of several ranks (0+1) has one for each.

    Raises:
        UsageError: a GPU that is not there, GPUs of different kinds that are not to be `mixed`, or fewer cores than
            sites.
    """
    groups = [numbers_of(name) for name in listed]
    numbers = [number for group in groups for number in group]
    parts = iter(share_cpus(os.sched_getaffinity(0), len(numbers), say_sites(listed)))
    shares = [[cpu for _ in group for cpu in next(parts)] for group in groups]
    if machine.device == "cpu":
        return tuple(_ground("cpus", group, cpus, (), machine) for group, cpus in zip(groups, shares, strict=True))
    cards = dict(zip(numbers, _cards(numbers, listed, mixed=mixed), strict=True))
    grounds: list[CpuOrGpuShare] = []
    for group, cpus in zip(groups, shares, strict=True):
        taken = [cards[number] for number in group]
        kinds = {card.kind for card in taken}
        if len(kinds) > 1:
            raise UsageError(
                f"{say_sites(listed)}: the ranks of one trial would be on GPUs of different kinds "
                f"({', '.join(sorted(kinds))}), and the quicker ones would wait. Join GPUs of one kind."
            )
        kind = dataclasses.replace(machine, device_name=str(taken[0].name.value))
        grounds.append(_ground("card", group, cpus, [str(card.entry) for card in taken], kind))
    return tuple(grounds)


def check_spreadable(study: Study, place: SiteSpec) -> None:
    """Raises `UsageError` for a study whose trials choose their devices themselves, and for sites of this machine that
    are not of as many GPUs as a trial has ranks."""
    ranks = study.workload.ranks
    if study.of_scripts:
        raise UsageError(
            f"{place.said}: study {study.name} is of scripts, which choose their devices themselves. Leave it out."
        )
    if place.on == HERE and any(len(numbers_of(name)) != ranks for name in place.sites):
        site, other = ("+".join(map(str, range(first, first + ranks))) for first in (0, ranks))
        raise UsageError(
            f"{place.said}: a site has a GPU, or a share of the CPUs, for each rank of a trial, and study "
            f"{study.name} has ranks = {ranks}. Write {site} for a site, {site},{other} for two."
        )


def _ground(
    what: str, numbers: Sequence[int], cpus: Sequence[int], cards: Sequence[str], machine: Machine
) -> CpuOrGpuShare:
    seen = {VARIABLE: ",".join(cards)} if cards else {}
    host = Host(environment={**seen, CPUS: ",".join(map(str, cpus))})
    name = "-".join([what, *map(str, numbers)])
    return CpuOrGpuShare(name=name, host=host, machine=say_kind(machine))


def share_cpus(cpus: Iterable[int], sites: int, asked: str) -> list[Sequence[int]]:
    """Equal parts of the cores, one for each site, by their CPUs: two threads of one core are never of two sites.
    Raises `UsageError`, with what was `asked`, for too many sites."""
    cores = cores_of(cpus)
    each = len(cores) // sites
    if not each:
        threads = sum(map(len, cores))
        of_cores = "" if threads == len(cores) else f" of {format_count(len(cores), 'core')}"
        raise UsageError(
            f"{asked}: {sites} sites and {format_count(threads, 'CPU')}{of_cores} that this process may use: they "
            "would share cores. Use fewer sites."
        )
    return [sorted(itertools.chain(*cores[site * each : (site + 1) * each])) for site in range(sites)]


def _cards(numbers: Sequence[int], listed: Sequence[str], *, mixed: bool) -> list[VisibleCard]:
    """Each by its number among those that are visible."""
    asked, cards = say_sites(listed), visible_cards().value
    if cards is None:
        raise UsageError(f"{asked}: which GPUs there are cannot be known here. Leave it out.")
    found: list[VisibleCard] = []
    for number in numbers:
        if number >= len(cards):
            raise UsageError(f"{asked}: GPU {number}: {len(cards)} are visible here. Count from 0.")
        card = cards[number]
        if card.name.value is None:
            raise UsageError(f"{asked}: what GPU {number} is cannot be known: {card.name.reason}. Leave it out.")
        found.append(card)
    for parts in shared_boards(found):
        raise UsageError(
            f"{asked}: {say_entries(parts)} are parts of one GPU, and what is measured on one would be in the times "
            "of the other. Name one part of each GPU."
        )
    kinds = {card.kind for card in found}
    if len(kinds) > 1 and not mixed:
        raise UsageError(
            f"{asked}: GPUs of different kinds ({', '.join(sorted(kinds))}), whose times are not those of one "
            "machine. Name GPUs of one kind, and measure the others in a run of their own, or have each site judged "
            "by itself by --mixed."
        )
    return found


def executors_of_ranks(host: Host, ranks: int) -> list[Executor]:
    """An executor for each GPU that the ranks of a trial take in a host, the first of those that it sees, or for what
    it has instead; nothing is started."""
    taken = visible_cards(host.variables(os.environ)).value or () if ranks > 1 else ()
    seen = [{VARIABLE: str(card.entry)} for card in taken[:ranks]] or [{}]
    return [open_executor(host=dataclasses.replace(host, environment=host.environment | one)) for one in seen]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """Implements `Station` by processes of this machine: the executors of its arms, started."""

    name: str
    machine: str = ""
    executors: Mapping[str, Executor]
    site: RunContext | None = None
    """What its requests have in common, once that is prepared."""

    @property
    def facts(self) -> MachineFacts:
        """Of its device, and of what its first executor measures with."""
        return next(iter(self.executors.values())).facts()

    def measure(
        self, part: Plan, *, save: Callable[[TrialRecord], None], watcher: ProgressListener, budget: Budget
    ) -> frozenset[Part]:
        """As any plan on one site."""
        if self.site is None:
            raise InvalidRunError(f"site {self.name}: nothing is prepared on it.")
        try:
            return run_plan(part, self.executors, self.site, save=save, watcher=watcher, budget=budget).skipped
        except TimeLimitTooShortError as error:  # for this site, and others may be quicker
            raise InvalidRunError(f"site {self.name}: {error}") from None

    def end(self) -> None:
        """Its processes are killed, and who waits for them finds them gone."""
        for executor in self.executors.values():
            executor.close()


def open_station(ground: CpuOrGpuShare, arms: Mapping[str, Host], executor: str | None) -> LocalNode:
    """The executors of a site, one for each arm, which lives in a host; nothing is started yet. `executor` names their
    kind."""
    made = {
        arm: open_executor(executor, host=ground.of(host), label="-".join(filter(None, (arm, ground.name))))
        for arm, host in arms.items()
    }
    return LocalNode(name=ground.name, machine=ground.machine, executors=made)


def check_all(others: Iterable[LocalNode], variants: Sequence[Variant], first: Mapping[str, WorkerInfo]) -> None:
    """Raises `InvalidRunError` for a site that is unlike the first, or on which a variant cannot be measured."""
    for station in others:
        hellos = [greet(executor, variants) for executor in station.executors.values()]
        check_alike(station.name, first.values(), hellos)


def check_alike(name: str, first: Iterable[WorkerInfo], others: Iterable[WorkerInfo]) -> None:
    """Raises `InvalidRunError` for a site whose workers are another program, or on another kind of device, than those
    of the first."""
    for ours, theirs in zip(first, others, strict=True):
        known, found = ((one.harness, one.torch, one.device) for one in (ours, theirs))
        if known != found:
            raise InvalidRunError(
                f"site {name} is unlike the first: harness, torch and device are {', '.join(found)} there and "
                f"{', '.join(known)} here. Measure it in a run of its own."
            )
