"""Tests of the plan: every variant once in each replicate, shuffled by a recorded seed, with the control."""

import dataclasses
from collections import Counter

import pytest

from lorameter.errors import UsageError
from lorameter.run.plan import arms_of, make_plan


def test_every_replicate_holds_every_variant_and_the_control_once(small_study):
    """Replicates are complete blocks, so that drift affects all variants alike."""
    plan = make_plan(small_study)
    for replicate in range(small_study.protocol.replicates):
        members = Counter((s.variant.name, s.role) for s in plan.slots if s.replicate == replicate)
        assert members == {("plain", "variant"): 1, ("nf4", "variant"): 1, ("plain", "control"): 1}
    assert len({slot.trial for slot in plan.slots}) == len(plan.slots)


def test_selecting_never_drops_the_reference_or_the_control(small_study):
    """A ratio needs the reference, and a run needs the control."""
    assert [one.name for one in arms_of(small_study, ["nf4"])] == ["plain", "nf4", "plain-control"]
    assert [one.name for one in arms_of(small_study, ["plain"])] == ["plain", "plain-control"]


def test_the_seed_fixes_the_order_and_another_seed_changes_it(small_study):
    """The manifest reproduces the order."""

    def order(seed):
        protocol = dataclasses.replace(small_study.protocol, seed=seed, replicates=8)
        return [slot.trial for slot in make_plan(dataclasses.replace(small_study, protocol=protocol)).slots]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_trials_of_a_replicate_share_their_seed(small_study):
    """Paired trials differ only in the variant."""
    plan = make_plan(small_study)
    seeds = {slot.replicate: set() for slot in plan.slots}
    for slot in plan.slots:
        seeds[slot.replicate].add(slot.seed)
    assert all(len(values) == 1 for values in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)


def test_a_phase_that_is_not_known_is_refused(small_study):
    """The error names the phase."""
    with pytest.raises(UsageError, match="training"):
        make_plan(small_study, phases=["training"])


@pytest.mark.parametrize(("level", "processes"), [("shared-base", 1), ("lockstep", 3)])
def test_trials_that_take_turns_are_in_one_group(small_study, level, processes):
    """The group has all variants and the control, in one process or one process each, with a new order in every
    round."""
    protocol = dataclasses.replace(small_study.protocol, turns=30)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving=level, phases=["train"])
    groups = [group for group in plan.groups if group.replicate == 0 and group.turns]
    assert [len(group.launches) for group in groups] == [processes]
    assert Counter(trial for order in groups[0].turns for trial in order) == {
        "r0-plain": 30, "r0-nf4": 30, "r0-plain-control": 30,
    }  # fmt: skip
    assert len(set(groups[0].turns)) == 6


def test_no_metric_is_measured_by_two_kinds_of_trials(small_study):
    """Trials in turns and isolated trials measure disjoint sets of metrics, and together all metrics."""
    phases = ["train", "generate", "cold"]
    everything = set(make_plan(small_study, phases=phases).slots[0].measures)
    for level in ("shared-base", "lockstep"):
        kinds = {slot.measures for slot in make_plan(small_study, interleaving=level, phases=phases).slots}
        first, second = kinds
        assert not set(first) & set(second)
        assert set(first) | set(second) == everything


def test_whole_answers_are_measured_if_the_workload_limits_their_tokens(small_study):
    """A workload without a token limit for them has none; a protocol without merged requests has none."""
    workload = dataclasses.replace(small_study.workload, open_ended_tokens=8)
    study = dataclasses.replace(small_study, workload=workload)
    assert all("open_ended" in slot.measures for slot in make_plan(study).slots)
    assert not any("open_ended" in slot.measures for slot in make_plan(small_study).slots)
    unmerged = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, merged=False))
    assert not any("merged" in slot.measures for slot in make_plan(unmerged).slots)
