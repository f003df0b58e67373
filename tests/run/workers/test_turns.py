"""Tests of live processes that take turns: exactly one computes, and a shared base is loaded once."""

from __future__ import annotations

import dataclasses

import psutil

from lorameter.records import codec
from lorameter.run.plan import make_plan
from lorameter.run.prepare import context_of, request_of
from lorameter.run.runner import run_plan
from lorameter.studies.variant import LoraVariant
from tests.run.fakes import Quiet

RANKS = (LoraVariant(name="r4", r=4, quantization="nf4"), LoraVariant(name="r8", r=8, quantization="nf4"))


def test_a_waiting_process_uses_no_cpu(small_study, executor, tokens_of):
    """While one process of a lockstep trains, the other blocks on its socket."""
    site = context_of(small_study.workload, tokens_of(small_study.workload), "cpu")
    plan = make_plan(small_study, interleaving="lockstep", phases=["train"])
    workers = {}
    for slot in plan.groups[0].slots[:2]:
        workers[slot.trial] = executor.launch()
        request = codec.to_json(request_of(plan, slot, site, executor.make_place(slot.trial, slot.trial)))
        workers[slot.trial].ask("prepare", slot.trial, 60, request=request)
        assert workers[slot.trial].ask("build", slot.trial, 60).status == "ok"
    (busy, computing), (idle, waiting) = workers.items()
    used = {name: sum(psutil.Process(worker.pid).cpu_times()[:2]) for name, worker in workers.items()}
    computing.ask("turn", busy, 60, steps=30)
    spent = {name: sum(psutil.Process(worker.pid).cpu_times()[:2]) - used[name] for name, worker in workers.items()}
    for worker in (computing, waiting):
        worker.close()
    assert spent[busy] >= 0.2
    assert spent[idle] <= 0.01  # one tick of the kernel's clock


def test_a_trial_that_fails_leaves_its_neighbours_on_the_base_alone(small_study, executor, tokens_of):
    """A diverging adapter is recorded as invalid; the other trials on the base are bit-equal to a run without it."""
    wild = dataclasses.replace(RANKS[1], name="wild", learning_rate=1e30, lora_alpha=10**12, max_grad_norm=0)
    losses = {}
    protocol = dataclasses.replace(small_study.protocol, replicates=1)
    for name, variants in (("with", (RANKS[0], wild)), ("without", RANKS)):
        study = dataclasses.replace(small_study, variants=variants, reference="r4", protocol=protocol)
        plan = make_plan(study, interleaving="shared-base", phases=["train"])
        site = context_of(study.workload, tokens_of(study.workload), "cpu")
        records = run_plan(plan, {"": executor}, site, save=lambda record: None, listener=Quiet()).records
        by_name = {record.name: record for record in records}
        assert by_name["r4"].status == "ok"
        if name == "with":
            assert (by_name["wild"].status, by_name["wild"].failure.kind) == ("invalid", "LossNotFinite")
            assert "learning_rate" in by_name["wild"].failure.message
        losses[name] = [record.samples["timed_loss"] for record in records if record.trial == "r0-r4"]
    assert losses["with"] == losses["without"]
