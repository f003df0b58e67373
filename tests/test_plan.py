"""The plan: every variant once a replicate, shuffled by a recorded seed, with the control."""

import dataclasses
from collections import Counter

import pytest

from harness.errors import UsageError
from harness.plan import make_plan


def test_every_replicate_holds_every_variant_and_the_control_once(small_study):
    """Replicates are complete blocks, so that drift falls on all variants alike."""
    plan = make_plan(small_study)
    for replicate in range(small_study.protocol.replicates):
        members = Counter((s.variant.name, s.role) for s in plan.slots if s.replicate == replicate)
        assert members == {("plain", "variant"): 1, ("nf4", "variant"): 1, ("plain", "control"): 1}
    assert len({slot.trial for slot in plan.slots}) == len(plan.slots)


def test_the_seed_fixes_the_order_and_another_seed_changes_it(small_study):
    """The order can be had again from the manifest."""

    def order(seed):
        protocol = dataclasses.replace(small_study.protocol, seed=seed, replicates=8)
        return [slot.trial for slot in make_plan(dataclasses.replace(small_study, protocol=protocol)).slots]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_selecting_never_drops_the_reference_or_the_control(small_study):
    """A ratio needs its denominator, and a run its control."""
    plan = make_plan(small_study, select=["nf4"])
    assert {(s.variant.name, s.role) for s in plan.slots} == {
        ("nf4", "variant"), ("plain", "variant"), ("plain", "control"),
    }  # fmt: skip


def test_trials_of_a_replicate_share_their_seed(small_study):
    """Paired trials differ in the variant only."""
    plan = make_plan(small_study)
    seeds = {slot.replicate: set() for slot in plan.slots}
    for slot in plan.slots:
        seeds[slot.replicate].add(slot.seed)
    assert all(len(values) == 1 for values in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)


def test_every_trial_gets_all_its_turns(small_study):
    """The group's turns name each of its trials as often as the protocol says."""
    for group in make_plan(small_study).groups:
        taken = Counter(trial for order in group.turns for trial in order)
        assert taken == {slot.trial: small_study.protocol.turns for slot in group.slots}


@pytest.mark.parametrize("options", [{"select": ["nf5"]}, {"phases": ["training"]}, {"interleaving": "lockstep"}])
def test_what_is_not_known_is_refused(small_study, options):
    """Unknown variants and phases, and levels that are not built."""
    with pytest.raises(UsageError):
        make_plan(small_study, **options)
