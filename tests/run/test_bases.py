"""Tests of the bases of a run: each is prepared once, and unused ones are removed.

Tests of what a worker must be able to do before it measures.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from lorameter.errors import InvalidRunError
from lorameter.records.os_errors import SystemLimitError
from lorameter.records.record import BaseSummary, Failure, WorkerInfo
from lorameter.run.plan import arms_on_sides, make_plan
from lorameter.run.prepare import prepare_bases, validate_worker
from lorameter.run.workers import WorkerLostError
from lorameter.run.workers.sides import present_sides
from lorameter.studies.variant import LoraVariant


class FakeExecutor:
    """An executor that prepares bases or raises an error."""

    def __init__(self, name="", refuse=lambda request: None):
        self.name, self.refuse, self.requests = name, refuse, []

    def prepare_base(self, request):
        self.requests.append(request)
        self.refuse(request)
        return BaseSummary(
            path=f"/{self.name}/{len(self.requests)}", hash="0" * 64, base="b", bytes=1, conversions=1,
            quantisations=0, seconds=0.0,
        )  # fmt: skip


class FakeListener:
    """A listener that records the events."""

    def __init__(self):
        self.phases = []

    def trial_phase(self, slot, phase):
        self.phases.append(phase)

    def trial_ended(self, record):
        raise AssertionError("no trial has begun")


@pytest.fixture
def study(small_study):
    """A study of four variants on three bases."""
    plain, nf4 = small_study.variants
    more = (dataclasses.replace(plain, name="wide", r=8), dataclasses.replace(nf4, name="single", double_quant=False))
    return dataclasses.replace(small_study, variants=(plain, nf4, *more))


def test_each_base_is_prepared_once(study):
    """The number of variants, controls and replicates on a base does not matter."""
    executor, listener = FakeExecutor(), FakeListener()
    bases = prepare_bases(make_plan(study), {"": executor}, "cpu", listener)
    forms = [(one.variant.quantization, one.variant.double_quant) for one in executor.requests]
    assert sorted(forms) == [("nf4", False), ("nf4", True), ("none", True)]
    assert len(bases.folders) == len(bases.summaries) == 3
    assert listener.phases == ["base"] * 3
    assert not bases.notices


def crash(request):
    """Fail for one form of the base."""
    if request.variant.quantization == "nf4":
        raise WorkerLostError("oom", Failure(phase="base", kind="MemoryError", message="no memory."))


def test_trials_build_a_base_that_could_not_be_prepared(study):
    """The run continues, with one notice for each base, and each trial makes its own."""
    bases = prepare_bases(make_plan(study), {"": FakeExecutor(refuse=crash)}, "cpu", FakeListener())
    assert [key[1][3] for key in bases.folders] == ["none"]
    assert [notice.code for notice in bases.notices] == ["base-not-prepared"] * 2
    assert "tiny-llama, bfloat16, nf4" in bases.notices[0].message
    assert "oom: no memory), so each process" in bases.notices[0].message


def test_both_sides_map_their_bases_or_neither_does(study):
    """If one side cannot prepare a base, neither side maps one, so that both are measured under the same conditions."""
    plan = make_plan(study, arms=arms_on_sides(study, [one.name for one in study.variants[:2]], present_sides(0)))
    arms = {slot.executor for slot in plan.slots}
    executors = {arm: FakeExecutor(arm, crash if arm == "candidate" else lambda request: None) for arm in arms}
    bases = prepare_bases(plan, executors, "cpu", FakeListener())
    assert {key[1][3] for key in bases.folders} == {"none"}
    assert {key[0] for key in bases.folders} == arms
    assert len(bases.notices) == 1


def test_a_full_disk_ends_the_run(study):
    """A full disk ends the run, since it would stop the next base as well."""

    def refuse(request):
        raise SystemLimitError("full")

    with pytest.raises(SystemLimitError):
        prepare_bases(make_plan(study), {"": FakeExecutor(refuse=refuse)}, "cpu", FakeListener())


PLAIN = LoraVariant(name="plain")
LACKS = "bitsandbytes has loaded its library for CPUs"


@pytest.fixture
def worker(machine):
    """A function that makes the executor of a worker with the given description."""

    def make(**fields):
        hello = WorkerInfo(**{"harness": "1.0", "import_time_s": 1.0, "device": "cpu", "torch": "0"} | fields)
        return SimpleNamespace(hello=lambda: hello, machine=lambda: machine)

    return make


@pytest.mark.parametrize(
    "changes", [{"quantization": "nf4"}, {"quantization": "int8"}, {"optimizer": "paged_adamw_32bit"}]
)
def test_a_variant_that_needs_bitsandbytes_is_refused_where_it_has_no_device(worker, changes):
    """The error names the variant before its first trial; variants without bitsandbytes are measured."""
    dependent = LoraVariant(name="dependent", **changes)
    with pytest.raises(InvalidRunError, match=f"dependent cannot be measured here: {LACKS}"):
        validate_worker(worker(lacks=LACKS), [PLAIN, dependent])
    assert validate_worker(worker(lacks=LACKS), [PLAIN]).lacks == LACKS
    assert validate_worker(worker(), [PLAIN, dependent]).lacks is None


def test_a_worker_on_another_device_is_refused(worker):
    """The plan was made for one device."""
    with pytest.raises(InvalidRunError, match="'cuda' and the plan was made for 'cpu'"):
        validate_worker(worker(device="cuda"), [PLAIN])
