"""Tests of the sites of this machine: its GPUs, or disjoint shares of its CPUs."""

from __future__ import annotations

import dataclasses
import os

import pytest

from lorameter.errors import UsageError
from lorameter.machine.gpus import VisibleGpu
from lorameter.machine.reading import Reading, missing
from lorameter.run.sites import gpus
from lorameter.run.sites.gpus import local_shares


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch):
    """Replace the machine's CPUs by four, each a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr(gpus, "cores_of", lambda cpus: [(cpu,) for cpu in sorted(cpus)])


def show_gpus(monkeypatch, *names, limits=(700.0,) * 4, entries=range(4), boards=None):
    """Replace the visible GPUs."""
    found = tuple(
        VisibleGpu(
            entry=entry, board=Reading(value=str(entry) if boards is None else boards[number]),
            name=missing("it is gone") if name is None else Reading(value=name),
            power_limit_w=missing("not reported") if limit is None else Reading(value=limit),
        )
        for number, (entry, name, limit) in enumerate(zip(entries, names, limits, strict=False))
    )  # fmt: skip

    def visible(environment=None):
        named = (environment or {}).get("CUDA_VISIBLE_DEVICES")
        by_entry = {str(card.entry): card for card in found}
        return Reading(value=found if named is None else tuple(by_entry[entry] for entry in named.split(",")))

    monkeypatch.setattr(gpus, "visible_gpus", visible)


@pytest.mark.parametrize("entries", [(2, 3), ("GPU-aaaa", "GPU-bbbb")])
def test_sites_of_a_gpu_machine_are_its_visible_gpus(machine, monkeypatch, entries):
    """Sites use CUDA's numbers; each site sees its own GPU, by its name in CUDA_VISIBLE_DEVICES."""
    show_gpus(monkeypatch, "H100", "H100", entries=entries)
    there = dataclasses.replace(machine, device="cuda")
    sites = local_shares(("0", "1"), there)
    assert [site.name for site in sites] == ["gpu-0", "gpu-1"]
    assert [site.host.environment["CUDA_VISIBLE_DEVICES"] for site in sites] == [str(entry) for entry in entries]
    (site,) = local_shares(("1",), there)
    assert site.name == "gpu-1"


@pytest.mark.parametrize(
    ("names", "limits", "words"),
    [
        (("H100", "H100"), (700.0, 700.0), r"GPU 2: 2 are visible"),
        (("H100", "H100", "A100"), (700.0, 700.0, 400.0), r"different kinds \(A100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, 400.0), r"different kinds \(H100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, None), r"different kinds \(H100, H100 at 700 W\)"),
        (("H100", "H100", None), (700.0, 700.0, 700.0), r"what GPU 2 is cannot be known: it is gone"),
    ],
)
def test_missing_and_different_gpus_are_refused(machine, monkeypatch, names, limits, words):
    """Missing GPUs, different GPUs and GPUs with different or unknown power limits are refused."""
    show_gpus(monkeypatch, *names, limits=limits)
    with pytest.raises(UsageError, match=words):
        local_shares(("0", "2"), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize("mixed", [False, True])
def test_sites_on_two_mig_instances_of_one_gpu_are_refused(machine, monkeypatch, mixed):
    """Measurements on two MIG instances of one GPU would disturb each other; instances of different GPUs are
    accepted."""
    show_gpus(monkeypatch, *["1g.10gb"] * 3, entries=("MIG-a", "MIG-b", "MIG-c"), boards=("one", "one", "two"))
    there = dataclasses.replace(machine, device="cuda")
    with pytest.raises(UsageError, match="MIG-a and MIG-b are parts of one GPU"):
        local_shares(("0", "1", "2"), there, mixed=mixed)
    sites = local_shares(("0", "2"), there)
    assert [site.host.environment["CUDA_VISIBLE_DEVICES"] for site in sites] == ["MIG-a", "MIG-c"]


def test_each_rank_of_a_site_has_a_gpu_or_a_share_of_the_cpus(machine, monkeypatch):
    """The site lists its GPUs by CUDA's names and locks each of them."""
    (site,) = local_shares(("0+1",), machine)
    assert (site.name, site.host.environment) == ("cpus-0-1", {"LORAMETER_CPUS": "4,5,6,7"})
    show_gpus(monkeypatch, "H100", "H100", "H100", "H100", "A100", limits=(700.0,) * 5, entries=(1, 2, 3, 0, 4))
    there = dataclasses.replace(machine, device="cuda")
    sites = local_shares(("0+1", "2+3"), there)
    assert [site.name for site in sites] == ["gpu-0-1", "gpu-2-3"]
    assert [site.host.environment for site in sites] == [
        {"CUDA_VISIBLE_DEVICES": "1,2", "LORAMETER_CPUS": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "3,0", "LORAMETER_CPUS": "6,7"},
    ]
    monkeypatch.setattr(gpus, "open_executor", lambda name=None, *, host: host.environment["CUDA_VISIBLE_DEVICES"])
    taken = [gpus.executors_of_ranks(site.host, 2) for site in sites]
    assert taken == [["1", "2"], ["3", "0"]]
    with pytest.raises(
        UsageError, match=r"ranks of one trial would be on GPUs of different kinds \(A100 at 700 W, H100"
    ):
        local_shares(("3+4",), there, mixed=True)
