"""A trial of several ranks takes turns like any other, and its processes end with it, however it ends."""

from __future__ import annotations

import dataclasses
import os
import signal

import psutil
import pytest

from lorameter.records.metrics import samples_of
from lorameter.run.plan import make_plan
from lorameter.run.prepare import context_of
from lorameter.run.runner import run_plan


class Watcher:
    """Acts when a trial enters a phase."""

    def __init__(self, act=lambda slot, phase: None):
        self.act = act

    def trial_phase(self, slot, phase):
        self.act(slot, phase)

    def trial_ended(self, record):
        pass


@pytest.fixture(scope="module")
def measure(executor, tokens_of, small_study):
    """A function that measures one replicate of the plain variant, by two ranks, in lockstep with its control."""
    workload = dataclasses.replace(small_study.workload, ranks=2, strategy="ddp")
    protocol = dataclasses.replace(small_study.protocol, replicates=1, turns=3, phases=("train",), step_timeout_s=300)
    study = dataclasses.replace(small_study, workload=workload, protocol=protocol, variants=small_study.variants[:1])

    def run(listener):
        plan = make_plan(study, phases=("train",), interleaving="lockstep")
        plan = dataclasses.replace(plan, groups=plan.groups[:1])
        site = context_of(study.workload, tokens_of(small_study.workload), "cpu")
        measured = run_plan(plan, {"": executor}, site, save=lambda record: None, listener=listener)
        return {record.trial: record for record in measured.records if record.trial in {s.trial for s in plan.slots}}

    return run


def descendants():
    """Processes below this one that train: the workers of a zygote and what they have forked."""
    return [one for zygote in psutil.Process().children() for one in zygote.children(recursive=True)]


def test_trials_of_ranks_take_turns(measure):
    """Both trials are whole, with a scaling efficiency for each step, and no process of theirs is left."""
    records = measure(Watcher())
    assert len(records) == 2
    for record in records.values():
        assert record.status == "ok", record.failure
        assert record.turn_lengths == (2, 2, 2)
        assert len(samples_of(record, "scaling_efficiency")) == 6
        assert record.values["threads"] == 2.0
        assert all(check["status"] == "active" for check in record.checks if check["path"].startswith("ranks."))
    assert descendants() == []


@pytest.mark.selftest
def test_a_rank_that_is_killed_is_a_row_and_the_other_trial_goes_on(measure):
    """The row names the rank, the phase and the signal; the trial that took turns with it comes to its end."""
    killed = []

    def act(slot, phase):
        if phase == "turn" and not killed and slot.role == "variant":
            deepest = [one for one in descendants() if not one.children() and one.parent().ppid() != os.getpid()]
            rank = sorted(deepest, key=lambda one: one.create_time())[1]
            killed.append(rank.pid)
            os.kill(rank.pid, signal.SIGKILL)

    records = measure(Watcher(act))
    states = {record.status: record for record in records.values()}
    assert set(states) == {"ok", "crashed"}
    assert states["crashed"].failure.kind == "RankDied"
    assert (
        "ended with signal 9 (SIGKILL) during turn; the others were ended with it" in states["crashed"].failure.message
    )
    assert descendants() == []
