"""The plan: every variant once a replicate, shuffled by a recorded seed, with the control."""

import dataclasses
from collections import Counter

import pytest

from harness.errors import UsageError
from harness.run.contenders import sides_of
from harness.run.plan import make_plan
from harness.studies.claim import Claim, Part
from harness.studies.engine import Engine


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


def test_a_phase_that_is_not_known_is_refused(small_study):
    """By its name."""
    with pytest.raises(UsageError, match="training"):
        make_plan(small_study, phases=["training"])


@pytest.mark.parametrize(("level", "processes"), [("shared-base", 1), ("lockstep", 3)])
def test_trials_that_take_turns_stand_in_one_group(small_study, level, processes):
    """All variants and the control, in one process or one each, in an order that is shuffled anew every round."""
    protocol = dataclasses.replace(small_study.protocol, turns=30)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving=level, phases=["train"])
    groups = [group for group in plan.groups if group.replicate == 0 and group.turns]
    assert [len(group.launches) for group in groups] == [processes]
    assert Counter(trial for order in groups[0].turns for trial in order) == {
        "r0-plain": 30, "r0-nf4": 30, "r0-plain-control": 30,
    }  # fmt: skip
    assert len(set(groups[0].turns)) == 6


def test_peaks_alone_need_few_solo_trials(small_study):
    """Three solo trials a variant, none of the control; a cold start or a merged adapter wants more."""
    protocol = dataclasses.replace(small_study.protocol, replicates=8)
    study = dataclasses.replace(small_study, protocol=protocol)

    def solo(level, phases):
        slots = make_plan(study, interleaving=level, phases=phases).slots
        return Counter(slot.measures for slot in slots if "steps" not in slot.measures)

    assert solo("lockstep", ["train", "generate"]) == {("peaks",): 6}
    assert solo("lockstep", ["train", "cold"]) == {("cold", "peaks"): 9}
    assert solo("shared-base", ["train", "generate"]) == {("merged", "peaks"): 24}
    assert solo("replicates", ["train", "generate", "cold"]) == {}


def test_no_more_cold_starts_than_their_interval_needs(small_study):
    """Each reads and quantises the base from its files: three replicates, one where minutes are limited, and all where
    the interval is asked for."""

    def cold(**changes):
        protocol = dataclasses.replace(small_study.protocol, replicates=8, **changes)
        study = dataclasses.replace(small_study, protocol=protocol)
        found = set()
        for level in ("shared-base", "lockstep", "replicates"):
            slots = make_plan(study, interleaving=level).slots
            replicates = {slot.replicate for slot in slots if "cold" in slot.measures}
            assert replicates == set(range(len(replicates)))
            assert {slot.variant.name for slot in slots if "cold" in slot.measures} == {"plain", "nf4"}
            roles = {slot.role for slot in slots if "cold" in slot.measures}  # one has no interval to be a control of
            assert roles == ({"variant", "control"} if len(replicates) > 1 else {"variant"})
            found.add(len(replicates))
        (replicates,) = found
        return replicates

    assert cold() == 3
    assert cold(max_minutes=15) == 1
    assert cold(max_minutes=15, cold_replicates=5) == cold(cold_replicates=5) == 5
    assert cold(precision=0.01) == cold(precision=0.01, max_minutes=15) == 8
    protocol = dataclasses.replace(small_study.protocol, replicates=8, max_minutes=15)
    sides = sides_of(small_study, small_study.variants)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), contenders=sides, interleaving="lockstep")
    assert {slot.replicate for slot in plan.slots if "cold" in slot.measures} == set(range(8))


def test_no_metric_is_measured_by_two_kinds_of_trials(small_study):
    """What trials in turns measure and what solo ones measure has nothing in common, and together it is everything."""
    phases = ["train", "generate", "cold"]
    everything = set(make_plan(small_study, phases=phases).slots[0].measures)
    for level in ("shared-base", "lockstep"):
        kinds = {slot.measures for slot in make_plan(small_study, interleaving=level, phases=phases).slots}
        first, second = kinds
        assert not set(first) & set(second)
        assert set(first) | set(second) == everything


def test_the_full_profile_is_taken_once_a_variant(small_study):
    """Later replicates are watched by the spy, and so is the control, which is the reference once more."""
    for slot in make_plan(small_study).slots:
        assert slot.instrument == ("profile" if slot.replicate == 0 and slot.role == "variant" else "spy")


def test_peaks_alone_take_few_solo_trials_and_no_control(small_study):
    """They are compared by their maximum; a cold start is a time and has its control in every replicate."""
    protocol = dataclasses.replace(small_study.protocol, replicates=3, peak_replicates=1, merged=False)
    study = dataclasses.replace(small_study, protocol=protocol)
    solo = [
        s
        for s in make_plan(study, phases=["train", "generate"], interleaving="lockstep").slots
        if "peaks" in s.measures
    ]
    assert {(s.replicate, s.role, s.instrument) for s in solo} == {(0, "variant", "spy")}
    part = Part(rule="lowers", axis="engine", metric="peak_memory", by=0.2)
    claims = (Claim(id="memory", says="less", parts=(part,)),)
    engine = Engine(title="NF4", variant="nf4", proof={"base.bits": "4"})
    asked = make_plan(
        dataclasses.replace(study, engine=engine, claims=claims), phases=["train"], interleaving="lockstep"
    )
    with_twin = [s.role for s in asked.slots if s.measures == ("peaks",)]
    assert sorted(with_twin) == ["control", "variant", "variant"], "a promise is held against the reference's own range"
    cold = [s for s in make_plan(study, interleaving="lockstep").slots if "cold" in s.measures]
    assert {(s.replicate, s.role) for s in cold} == {(r, role) for r in range(3) for role in ("variant", "control")}


def test_whole_answers_are_measured_where_the_workload_has_them(small_study):
    """Without a limit on their tokens there are none; merged requests go where the protocol wants none."""
    workload = dataclasses.replace(small_study.workload, natural_tokens=8)
    study = dataclasses.replace(small_study, workload=workload)
    assert all("natural" in slot.measures for slot in make_plan(study).slots)
    assert not any("natural" in slot.measures for slot in make_plan(small_study).slots)
    unmerged = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, merged=False))
    assert not any("merged" in slot.measures for slot in make_plan(unmerged).slots)
