"""The program that breaks a third of five hundred trials, in small: what it plans, and that it sees what is wrong."""

import dataclasses
from collections import Counter

import pytest

from harness.records.record import Failure
from harness.run.contenders import contenders_of
from harness.run.plan import make_plan
from harness.run.site import begin_record


@pytest.fixture
def soak(program):
    return program("soak")


@pytest.fixture
def plan(soak):
    """Of fifty replicates: five hundred trials."""
    study = soak.study_of(50)
    return make_plan(study, contenders=contenders_of(study, ()), phases=("train",), interleaving="replicates")


def test_a_third_of_five_hundred_is_broken_by_every_kind(soak, plan):
    """Each as often as the others, in all healthy variants, and none twice."""
    faults = soak.faults_of(plan)
    alone = sum(slot.variant.name in soak.BY_THEMSELVES for slot in plan.slots)
    assert (len(plan.slots), len(faults) + alone) == (500, 167)
    assert max(counts := Counter(faults.values()).values()) - min(counts) <= 1
    assert set(faults.values()) == set(soak.FAULTS)
    assert {slot.variant.name for slot in plan.slots if slot.trial in faults} == {f"v{n}" for n in range(soak.HEALTHY)}


def test_a_wrong_row_is_seen(soak, plan):
    """Another end than the one that was made, a trial without a row, samples that were lost."""
    faults = soak.faults_of(plan)
    broken = next(iter(faults))

    @dataclasses.dataclass
    class Run:
        records: tuple
        damaged_lines: int = 0
        measured_again: int = 0
        state: str = "complete"

    def rows(**changes):
        for slot in plan.slots:
            record = begin_record(slot, "ok").replaced(samples={"step_time_s": (1.0, 1.0)}, turn_lengths=(2,))
            fault = soak.FAULTS.get(faults.get(slot.trial, ""))
            status, says = (fault.status, fault.says) if fault else soak.BY_THEMSELVES.get(record.name, ("ok", ""))
            if status != "ok":
                record = record.replaced(status=status, failure=Failure(phase="", kind="", message=says))
            yield record.replaced(**changes.get(slot.trial, {}))

    assert not list(soak.wrong_rows(Run(tuple(rows())), plan, faults))
    wrong = list(soak.wrong_rows(Run(tuple(rows(**{broken: {"status": "ok", "failure": None}}))), plan, faults))
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{broken}: ok ()")
    whole = next(slot.trial for slot in plan.slots if slot.variant.name == "v1" and slot.trial not in faults)
    (lost,) = soak.wrong_rows(Run(tuple(rows(**{whole: {"samples": {}}}))), plan, faults)
    assert "0 timed steps" in lost
    assert "499 rows of 500" in next(soak.wrong_rows(Run(tuple(rows())[1:]), plan, faults))


def test_what_grows_is_seen(soak):
    """By the trial; what is filled once, at the beginning, is no growth."""
    seen = [soak.Seen(1, 10_000 * number, 5) for number in range(100)]
    assert soak.growth(seen) == pytest.approx(10_000, rel=0.3)
    once = [soak.Seen(1, 10**6 if number > 10 else 0, 5) for number in range(100)]
    assert soak.growth(once) == 0
    breaker = soak.Breaker(None, {}, parent=[soak.Seen(1, 10**6, 5 + number // 50) for number in range(100)])
    breaker.zygotes = [soak.Seen(2, 10**6 + 10_000 * number, 4) for number in range(100)]
    found = "; ".join(soak.what_grew(breaker))
    assert "the parent's descriptors grew from 5 to 6" in found
    assert "a zygote grew by" in found
