"""The sites of this machine are its cards or shares of its CPUs, none of which two sites have in common."""

from __future__ import annotations

import dataclasses
import os
import re
from functools import partial

import pytest

from harness.errors import InvalidRunError, UsageError
from harness.machine.cards import VisibleCard
from harness.machine.cores import cores_of
from harness.machine.reading import Reading, missing
from harness.records.preparation import Hello
from harness.run.executors.host import Host
from harness.run.sites import local
from harness.run.sites.local import check_alike, check_spreadable, local_sites
from harness.studies.place import Place


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch):
    """Each a core, whatever this machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr(local, "cores_of", lambda cpus: [(cpu,) for cpu in sorted(cpus)])


def cards(monkeypatch, *names, limits=(700.0,) * 4, entries=range(4), boards=None):
    """Those that are visible."""
    found = tuple(
        VisibleCard(
            entry=entry, board=Reading(value=str(entry) if boards is None else boards[number]),
            name=missing("it is gone") if name is None else Reading(value=name),
            power_limit_w=missing("not told") if limit is None else Reading(value=limit),
        )
        for number, (entry, name, limit) in enumerate(zip(entries, names, limits, strict=False))
    )  # fmt: skip

    def visible(environment=None):
        named = (environment or {}).get("CUDA_VISIBLE_DEVICES")
        by_entry = {str(card.entry): card for card in found}
        return Reading(value=found if named is None else tuple(by_entry[entry] for entry in named.split(",")))

    monkeypatch.setattr(local, "visible_cards", visible)


def test_sites_of_a_cpu_share_no_core(machine):
    """Each has an equal part, and its processes are told to stay there."""
    sites = local_sites(("0", "1"), machine)
    assert [site.name for site in sites] == ["cpus-0", "cpus-1"]
    assert [site.host.environment for site in sites] == [{"LORAMETER_CPUS": "4,5"}, {"LORAMETER_CPUS": "6,7"}]


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_two_threads_of_a_core_are_never_of_two_sites(machine, monkeypatch, tmp_path, name):
    """Linux often numbers all first threads and then all second ones; more sites than cores are refused."""
    for cpu, core in ((4, "0,4"), (5, "5,7"), (6, "6"), (7, "5,7")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(f"{core}\n")
    monkeypatch.setattr(local, "cores_of", partial(cores_of, root=tmp_path))
    sites = local_sites(("0", "1", "2"), machine)
    assert [site.host.environment["LORAMETER_CPUS"] for site in sites] == ["4", "5,7", "6"]
    with pytest.raises(UsageError, match="4 sites and 4 CPUs of 3 cores that this process may use"):
        local_sites(tuple("0123"), machine)


@pytest.mark.parametrize("entries", [(2, 3), ("GPU-aaaa", "GPU-bbbb")])
def test_sites_of_a_gpu_machine_are_its_visible_cards(machine, monkeypatch, entries):
    """By the numbers that CUDA gives them; each sees its own, by what the variable calls it."""
    cards(monkeypatch, "H100", "H100", entries=entries)
    there = dataclasses.replace(machine, device="cuda")
    sites = local_sites(("0", "1"), there)
    assert [site.name for site in sites] == ["card-0", "card-1"]
    assert [site.host.environment["CUDA_VISIBLE_DEVICES"] for site in sites] == [str(entry) for entry in entries]
    (site,) = local_sites(("1",), there)
    assert (site.name, site.machine) == ("card-1", "H100 beside Test CPU")


def test_more_sites_than_cpus_are_refused(machine):
    """They would share cores."""
    with pytest.raises(UsageError, match="5 sites and 4 CPUs"):
        local_sites(tuple("01234"), machine)


@pytest.mark.parametrize(
    ("names", "limits", "words"),
    [
        (("H100", "H100"), (700.0, 700.0), r"card 2: 2 are visible"),
        (("H100", "H100", "A100"), (700.0, 700.0, 400.0), r"different kinds \(A100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, 400.0), r"different kinds \(H100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, None), r"different kinds \(H100, H100 at 700 W\)"),
        (("H100", "H100", None), (700.0, 700.0, 700.0), r"what card 2 is cannot be known: it is gone"),
    ],
)
def test_cards_that_are_not_there_or_unlike_are_refused(machine, monkeypatch, names, limits, words):
    """Times of different cards are not those of one machine, nor are those of cards that may take unlike power; what
    is not told agrees with nothing."""
    cards(monkeypatch, *names, limits=limits)
    with pytest.raises(UsageError, match=words):
        local_sites(("0", "2"), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize("mixed", [False, True])
def test_sites_on_parts_of_one_card_are_refused(machine, monkeypatch, mixed):
    """What is measured on one would be in the times of the other; parts of different cards are as good as cards."""
    cards(monkeypatch, *["1g.10gb"] * 3, entries=("MIG-a", "MIG-b", "MIG-c"), boards=("one", "one", "two"))
    there = dataclasses.replace(machine, device="cuda")
    with pytest.raises(UsageError, match="MIG-a and MIG-b are parts of one card"):
        local_sites(("0", "1", "2"), there, mixed=mixed)
    sites = local_sites(("0", "2"), there)
    assert [site.host.environment["CUDA_VISIBLE_DEVICES"] for site in sites] == ["MIG-a", "MIG-c"]


def test_each_card_that_ranks_take_is_held(monkeypatch):
    """The first that are visible; of one rank, or where none is known, what an executor calls its device."""
    cards(monkeypatch, *["H100"] * 4, entries=("GPU-a", 3, 2, 1))
    monkeypatch.setattr(local, "open_executor", lambda name=None, *, host: host.environment.get("CUDA_VISIBLE_DEVICES"))
    assert local.executors_of_ranks(Host(), 3) == ["GPU-a", "3", "2"]
    assert local.executors_of_ranks(Host(), 1) == [None]
    monkeypatch.setattr(local, "visible_cards", lambda environment: missing("no driver"))
    assert local.executors_of_ranks(Host(), 3) == [None]


def test_cards_of_a_machine_that_tells_of_none_are_refused(machine, monkeypatch):
    """It may have some."""
    monkeypatch.setattr(local, "visible_cards", lambda: missing("no driver"))
    with pytest.raises(UsageError, match="which cards there are cannot be known here"):
        local_sites(("0", "1"), dataclasses.replace(machine, device="cuda"))


def test_a_site_of_several_ranks_has_a_card_or_a_share_of_the_cpus_for_each(machine, monkeypatch):
    """By what CUDA calls them; its device is held card by card."""
    (site,) = local_sites(("0+1",), machine)
    assert (site.name, site.host.environment) == ("cpus-0-1", {"LORAMETER_CPUS": "4,5,6,7"})
    cards(monkeypatch, "H100", "H100", "H100", "H100", "A100", limits=(700.0,) * 5, entries=(1, 2, 3, 0, 4))
    there = dataclasses.replace(machine, device="cuda")
    sites = local_sites(("0+1", "2+3"), there)
    assert [site.name for site in sites] == ["card-0-1", "card-2-3"]
    assert [site.host.environment for site in sites] == [
        {"CUDA_VISIBLE_DEVICES": "1,2", "LORAMETER_CPUS": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "3,0", "LORAMETER_CPUS": "6,7"},
    ]
    monkeypatch.setattr(local, "open_executor", lambda name=None, *, host: host.environment["CUDA_VISIBLE_DEVICES"])
    taken = [local.executors_of_ranks(site.host, 2) for site in sites]
    assert taken == [["1", "2"], ["3", "0"]]
    with pytest.raises(
        UsageError, match=r"ranks of one trial would be on cards of different kinds \(A100 at 700 W, H100"
    ):
        local_sites(("3+4",), there, mixed=True)


@pytest.mark.parametrize(("ranks", "sites"), [(2, ("0", "1")), (2, ("0+1", "2")), (1, ("0+1",)), (3, ("0+1",))])
def test_sites_of_other_than_a_card_for_each_rank_are_refused(small_study, ranks, sites):
    """With what to write."""
    several = {"ranks": ranks, "strategy": "ddp", "batch_size": 6} if ranks > 1 else {}
    study = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, **several))
    one, two = {1: ("0", "0,1"), 2: ("0+1", "0+1,2+3"), 3: ("0+1+2", "0+1+2,3+4+5")}[ranks]
    with pytest.raises(UsageError, match=re.escape(f"has ranks = {ranks}. Write {one} for a site, {two} for two.")):
        check_spreadable(study, Place(sites=sites))
    check_spreadable(study, Place(sites=tuple(two.split(","))))
    check_spreadable(study, Place(on="ray"))


def test_a_site_whose_worker_is_another_program_is_refused():
    """By its name, with what differs."""
    ours = Hello(harness="1", pid=1, import_time_s=1.0, device="cpu", torch="2.13")
    check_alike("card-1", [ours], [dataclasses.replace(ours, pid=2)])
    with pytest.raises(
        InvalidRunError, match=r"site card-1 is unlike the first: .* 2\.12, cpu there and .* 2\.13, cpu here"
    ):
        check_alike("card-1", [ours], [dataclasses.replace(ours, torch="2.12")])
