"""Replicates of trials of several ranks on sites, with an executor that only pretends: a site has what all ranks take,
and whoever starts them counts the cards."""

from __future__ import annotations

import dataclasses

import pytest

from harness.run.feasibility import check_feasible
from harness.run.plan import make_plan
from harness.run.sites import block
from harness.run.sites.block import Post
from harness.run.sites.orders import Describe, Prepare, read_message, write_order
from harness.run.written import write_plan


@pytest.fixture
def of_two(small_study):
    """The small study by two ranks."""
    workload = dataclasses.replace(small_study.workload, ranks=2, strategy="ddp", batch_size=2)
    protocol = dataclasses.replace(small_study.protocol, phases=("train",))
    return dataclasses.replace(small_study, workload=workload, protocol=protocol)


@pytest.mark.parametrize(("cards", "says"), [("0", "failed"), ("0,1", "done")])
def test_a_post_counts_the_cards_that_it_was_given(pretended, of_two, machine, monkeypatch, cards, says):
    """A machine that submits jobs may have none, or others."""
    monkeypatch.setattr(pretended, "MACHINE", dataclasses.replace(pretended.MACHINE, device="cuda"))
    hello = pretended.Fake.hello
    monkeypatch.setattr(pretended.Fake, "hello", lambda self: dataclasses.replace(hello(self), device="cuda"))
    monkeypatch.setattr(block, "harness_identity", lambda: "1.0 sha256:one")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    there = dataclasses.replace(of_two, protocol=dataclasses.replace(of_two.protocol, on="slurm:gres=gpu:2"))
    check_feasible(there, dataclasses.replace(machine, device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
    plan = make_plan(there, phases=("train",))
    said, post = [], Post()
    for order in (Describe(site="n1", folder="."), Prepare(plan=write_plan(plan, plan))):
        post.carry_out(write_order(order), said.append)
    post.close()
    last = read_message(said[-1])
    assert (last.says, last.usage) == (says, says == "failed")
    assert ("ranks = 2: 1 card is to be had here" in last.text) is (says == "failed")


def test_a_site_of_two_ranks_is_measured_on(placed, run, pretended):
    """On the CPUs of both; one with a single share is refused before anything is opened."""
    study = placed("")
    study.write_text(study.read_text().replace("[workload]", '[workload]\nranks = 2\nstrategy = "ddp"'))
    code, last, said = run("run", study, "--sites", "0,1")
    assert (code, last) == (2, None)
    assert "has ranks = 2. Write 0+1 for a site, 0+1,2+3 for two" in said
    assert not any(hasattr(one, "folder") for one in pretended.MADE)
    code, last, said = run("run", study, "--sites", "0+1")
    assert {record.status for record in last.records} == {"ok"}, said
    (started,) = (one for one in pretended.MADE if hasattr(one, "folder"))
    assert started.host.environment["LORAMETER_CPUS"] == "4,5"
