"""The sites of this machine: its cards, or shares of its CPUs.

A trial that is measured beside others on one machine shares its memory bus and its power with them, but neither its
card nor its cores: each site has CPUs of its own, and its processes stay on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.errors import InvalidRunError, UsageError
from harness.machine.cards import visible_cards
from harness.machine.cores import cores_of
from harness.machine.kinds import say_kind
from harness.machine.processes import CPUS
from harness.machine.provenance import Facts, Machine
from harness.machine.visible import VARIABLE
from harness.records.preparation import Hello
from harness.records.record import TrialRecord
from harness.records.units import format_count
from harness.run.budget import Budget
from harness.run.conductor import Watcher
from harness.run.executors import Executor, open_executor
from harness.run.executors.host import Host
from harness.run.plan import Plan
from harness.run.ready import greet
from harness.run.runner import run_plan
from harness.run.site import Site
from harness.studies.place import say_sites
from harness.studies.study import Study
from harness.studies.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """One site: a name for the records, and how its processes are started."""

    name: str
    host: Host
    machine: str = ""
    """The kind of it, for a reader."""

    def of(self, host: Host) -> Host:
        """Another host, of one side of an A/B, on this site."""
        return dataclasses.replace(host, environment={**host.environment, **self.host.environment})


def local_sites(listed: Sequence[str], machine: Machine, *, mixed: bool = False) -> tuple[Ground, ...]:
    """The sites that a user lists, such as 0, 1, 2, 3: on a GPU machine cards, in the order in which CUDA numbers those
    that are visible; on a CPU as many equal shares of its cores.

    Raises:
        UsageError: a card that is not there, cards of different kinds that are not to be `mixed`, or fewer cores than
            sites.
    """
    numbers = [int(number) for number in listed]
    shares = share_cpus(os.sched_getaffinity(0), len(numbers), say_sites(listed))
    if machine.device == "cpu":
        return tuple(_ground(f"cpus-{number}", cpus, {}, machine) for number, cpus in zip(numbers, shares, strict=True))
    cards = _cards(numbers, listed, mixed=mixed)
    return tuple(
        _ground(f"card-{number}", cpus, {VARIABLE: str(card)}, dataclasses.replace(machine, device_name=name))
        for number, (card, name), cpus in zip(numbers, cards, shares, strict=True)
    )


def check_spreadable(study: Study, asked: str) -> None:
    """Raises `UsageError`, with what was `asked` for, for a study whose trials choose their devices themselves."""
    if study.of_scripts or study.workload.ranks > 1:
        what = "scripts, which choose their devices" if study.of_scripts else "several ranks, which take several cards"
        raise UsageError(f"{asked}: study {study.name} is of {what} themselves. Leave it out.")


def _ground(name: str, cpus: Sequence[int], environment: dict[str, str], machine: Machine) -> Ground:
    host = Host(environment={**environment, CPUS: ",".join(map(str, cpus))})
    return Ground(name=name, host=host, machine=say_kind(machine))


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


def _cards(numbers: Sequence[int], listed: Sequence[str], *, mixed: bool) -> list[tuple[int | str, str]]:
    """Each by what CUDA_VISIBLE_DEVICES calls it, with its name."""
    asked, cards = say_sites(listed), visible_cards().value
    if cards is None:
        raise UsageError(f"{asked}: which cards there are cannot be known here. Leave it out.")
    found: list[tuple[int | str, str]] = []
    kinds: set[str] = set()
    for number in numbers:
        if number >= len(cards):
            raise UsageError(f"{asked}: card {number}: {len(cards)} are visible here. Count from 0.")
        card = cards[number]
        if card.name.value is None:
            raise UsageError(f"{asked}: what card {number} is cannot be known: {card.name.reason}. Leave it out.")
        found.append((card.entry, card.name.value))
        limit_w = card.power_limit_w.value
        kinds.add(card.name.value if limit_w is None else f"{card.name.value} at {limit_w:.0f} W")
    if len(kinds) > 1 and not mixed:
        raise UsageError(
            f"{asked}: cards of different kinds ({', '.join(sorted(kinds))}), whose times are not those of one "
            "machine. Name cards of one kind, and measure the others in a run of their own, or have each site judged "
            "by itself by --mixed."
        )
    return found


def executors_of(sites: Iterable[Ground]) -> Iterator[Executor]:
    """An executor for each site that answers for its device; nothing is started."""
    for ground in sites:
        yield open_executor(host=ground.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStation:
    """Implements `Station` by processes of this machine: the executors of its arms, started."""

    name: str
    machine: str = ""
    executors: Mapping[str, Executor]
    site: Site | None = None
    """What its requests have in common, once that is prepared."""

    @property
    def facts(self) -> Facts:
        """Of its device, and of what its first executor measures with."""
        return next(iter(self.executors.values())).facts()

    def measure(self, part: Plan, *, save: Callable[[TrialRecord], None], watcher: Watcher, budget: Budget) -> None:
        """As any plan on one site."""
        if self.site is None:
            raise InvalidRunError(f"site {self.name}: nothing is prepared on it.")
        run_plan(part, self.executors, self.site, save=save, watcher=watcher, budget=budget)

    def end(self) -> None:
        """Its processes are killed, and who waits for them finds them gone."""
        for executor in self.executors.values():
            executor.close()


def open_station(ground: Ground, arms: Mapping[str, Host], executor: str | None) -> LocalStation:
    """The executors of a site, one for each arm, which lives in a host; nothing is started yet. `executor` names their
    kind."""
    made = {
        arm: open_executor(executor, host=ground.of(host), label="-".join(filter(None, (arm, ground.name))))
        for arm, host in arms.items()
    }
    return LocalStation(name=ground.name, machine=ground.machine, executors=made)


def check_all(others: Iterable[LocalStation], variants: Sequence[Variant], first: Mapping[str, Hello]) -> None:
    """Raises `InvalidRunError` for a site that is unlike the first, or on which a variant cannot be measured."""
    for station in others:
        hellos = [greet(executor, variants) for executor in station.executors.values()]
        check_alike(station.name, first.values(), hellos)


def check_alike(name: str, first: Iterable[Hello], others: Iterable[Hello]) -> None:
    """Raises `InvalidRunError` for a site whose workers are another program, or on another kind of device, than those
    of the first."""
    for ours, theirs in zip(first, others, strict=True):
        known, found = ((one.harness, one.torch, one.device) for one in (ours, theirs))
        if known != found:
            raise InvalidRunError(
                f"site {name} is unlike the first: harness, torch and device are {', '.join(found)} there and "
                f"{', '.join(known)} here. Measure it in a run of its own."
            )
