"""Who contends: the variants, the reference once more, and on which workload each is measured."""

import dataclasses

import pytest

from harness.errors import UsageError
from harness.run.contenders import contenders_of, variants_of, workloads_of
from harness.run.plan import make_plan


def named(contenders):
    return [(one.variant.name, one.role) for one in contenders]


def test_selecting_never_drops_the_reference_or_the_control(small_study):
    """A ratio needs its denominator, and a run its control; another order of the selection is the same."""
    whole = [("plain", "variant"), ("nf4", "variant"), ("plain", "control")]
    assert named(contenders_of(small_study)) == named(contenders_of(small_study, ["nf4"])) == whole
    assert named(contenders_of(small_study, ["plain"])) == [whole[0], whole[2]]
    assert [one.name for one in contenders_of(small_study)] == ["plain", "nf4", "plain-control"]


def test_a_variant_that_is_not_known_is_refused(small_study):
    """With the nearest that is."""
    with pytest.raises(UsageError, match=r"'nf5': not known\. Did you mean 'nf4'"):
        contenders_of(small_study, ["nf5"])


@pytest.fixture
def twice(small_study):
    """A study that has one configuration under two names."""
    plain = small_study.variants[0]
    return dataclasses.replace(small_study, variants=(plain, dataclasses.replace(plain, name="larger")))


def test_a_variant_may_have_a_workload_of_its_own(twice):
    """The same configuration may then stand twice; all others and the control stay on the study's workload."""
    own = dataclasses.replace(twice.workload, batch_size=4)
    contenders = contenders_of(twice, own_workloads={"larger": own})
    assert [one.workload for one in contenders] == [twice.workload, own, twice.workload]
    assert workloads_of(twice, contenders) == (twice.workload, own)
    assert variants_of(contenders) == twice.variants
    plan = make_plan(twice, contenders=contenders)
    assert (plan.workloads, plan.own_workloads) == ((twice.workload, own), {"larger": own})
    assert {slot.workload for slot in plan.slots if slot.variant.name == "larger"} == {own}


def test_a_workload_of_ones_own_is_of_the_same_model_and_data(twice):
    """And of a variant that the study has; two that are the same in all are one."""
    own = dataclasses.replace(twice.workload, batch_size=4)
    for changes, words in (
        ({}, "'plain' and 'larger' are the same configuration"),
        ({"larger": twice.workload}, "same configuration"),
        ({"larger": own, "lager": own}, "'lager': not known. Did you mean 'larger'"),
        ({"larger": dataclasses.replace(own, data="other.json")}, "'larger': other data"),
    ):
        with pytest.raises(UsageError, match=words):
            contenders_of(twice, own_workloads=changes)


@pytest.mark.parametrize(("epochs", "rounds"), [(0.0, 0), (1.0, 1), (8.0, 29)])
def test_untimed_rounds_are_what_turns_leave_of_the_epochs(small_study, epochs, rounds):
    """16 sequences by 2 are 8 steps an epoch; 7 are taken in any case, a round has 2."""
    protocol = dataclasses.replace(small_study.protocol, epochs=epochs)
    assert contenders_of(small_study)[0].rounds_after_turns(protocol) == rounds
    halved = dataclasses.replace(small_study.workload, batch_size=1)
    own = contenders_of(small_study, own_workloads={"nf4": halved})[1]
    assert own.rounds_after_turns(protocol) == (max(7, 16 * epochs) - 7 + 1) // 2
