"""The sites of this machine are its cards or shares of its CPUs, none of which two sites have in common."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest

from harness.errors import InvalidRunError, UsageError
from harness.machine.reading import Reading
from harness.records.preparation import Hello
from harness.run.sites import local
from harness.run.sites.local import check_alike, check_spreadable, local_sites
from harness.studies.place import Place


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch):
    """Whatever this machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})


def cards(monkeypatch, *names):
    monkeypatch.setattr(local, "card_names", lambda: Reading(value=names))


def test_sites_of_a_cpu_share_no_core(machine):
    """Each has an equal part, and its processes are told to stay there."""
    sites = local_sites(("0", "1"), machine)
    assert [site.name for site in sites] == ["cpus-0", "cpus-1"]
    assert [site.host.environment for site in sites] == [{"LORAMETER_CPUS": "4,5"}, {"LORAMETER_CPUS": "6,7"}]


def test_sites_of_a_gpu_machine_are_its_visible_cards(machine, monkeypatch):
    """By the numbers that CUDA gives them; each sees its own."""
    cards(monkeypatch, "H100", "H100", "H100", "H100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    sites = local_sites(("0", "1"), dataclasses.replace(machine, device="cuda"))
    assert [site.host.environment["CUDA_VISIBLE_DEVICES"] for site in sites] == ["2", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    sites = local_sites(("3",), dataclasses.replace(machine, device="cuda"))
    assert [site.name for site in sites] == ["card-3"]


def test_more_sites_than_cpus_are_refused(machine):
    """They would share cores."""
    with pytest.raises(UsageError, match="5 sites and 4 CPUs"):
        local_sites(tuple("01234"), machine)


def test_cards_that_are_not_there_or_unlike_are_refused(machine, monkeypatch):
    """Times of different cards are not those of one machine."""
    cards(monkeypatch, "H100", "A100")
    there = dataclasses.replace(machine, device="cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError, match=r"card 2: 2 are visible"):
        local_sites(("0", "2"), there)
    with pytest.raises(UsageError, match=r"different kinds \(A100, H100\)"):
        local_sites(("0", "1"), there)


def test_a_site_of_several_ranks_has_a_card_or_a_share_of_the_cpus_for_each(machine, monkeypatch):
    """By what CUDA calls them; its device is held card by card."""
    (site,) = local_sites(("0+1",), machine)
    assert (site.name, site.host.environment) == ("cpus-0-1", {"LORAMETER_CPUS": "4,5,6,7"})
    cards(monkeypatch, "H100", "H100", "H100", "H100", "A100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3,0,4")
    there = dataclasses.replace(machine, device="cuda")
    sites = local_sites(("0+1", "2+3"), there)
    assert [site.name for site in sites] == ["card-0-1", "card-2-3"]
    assert [site.host.environment for site in sites] == [
        {"CUDA_VISIBLE_DEVICES": "1,2", "LORAMETER_CPUS": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "3,0", "LORAMETER_CPUS": "6,7"},
    ]
    monkeypatch.setattr(local, "open_executor", lambda name=None, *, host: host.environment["CUDA_VISIBLE_DEVICES"])
    assert list(local.executors_of(sites)) == ["1", "2", "3", "0"]
    with pytest.raises(UsageError, match=r"ranks of one trial would be on cards of different kinds \(A100, H100\)"):
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
