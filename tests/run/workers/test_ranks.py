"""Tests that a trial of several ranks takes turns as other trials do, and that all its processes end with it."""

from __future__ import annotations

import dataclasses

import psutil
import pytest

from lorameter.measurements.metrics import get_samples
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext
from lorameter.run.runner import run_plan
from tests.run.fakes import Quiet


def descendants():
    """Return the descendants of this process that train: workers of a zygote and their forks."""
    return [one for zygote in psutil.Process().children() for one in zygote.children(recursive=True)]


@pytest.mark.selftest
def test_trials_of_ranks_take_turns(executor, tokens_of, small_study):
    """A trial of two ranks and its control complete in lockstep, record a scaling efficiency for each step, and leave
    no process."""
    workload = dataclasses.replace(small_study.workload, ranks=2, strategy="ddp")
    protocol = dataclasses.replace(small_study.protocol, replicates=1, turns=3, phases=("train",), step_timeout_s=300)
    study = dataclasses.replace(small_study, workload=workload, protocol=protocol, variants=small_study.variants[:1])
    plan = make_plan(study, phases=("train",), interleaving="lockstep")
    plan = dataclasses.replace(plan, groups=plan.groups[:1])
    context = RunContext(device="cpu", tokens={study.workload: tokens_of(small_study.workload)})
    measured = run_plan(plan, {"": executor}, context, save=lambda record: None, display=Quiet())
    records = [record for record in measured.records if record.trial in {slot.trial for slot in plan.slots}]
    assert len(records) == 2
    for record in records:
        assert record.status == "ok", record.failure
        assert record.turn_lengths == (2, 2, 2)
        assert len(get_samples(record, "scaling_efficiency")) == 6
        assert record.values["threads"] == 2.0
        assert all(check["status"] == "active" for check in record.checks if check["path"].startswith("ranks."))
    assert descendants() == []
