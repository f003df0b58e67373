"""What a replicate does without where minutes are short, and what it never does without."""

import dataclasses

import pytest

from harness.records.metrics import PHASES
from harness.run.contenders import Contender
from harness.run.plan import make_plan
from harness.run.thinning import parts_in, thinned
from harness.studies.claim import Claim, Part
from harness.studies.engine import Engine

ALL = {"peaks", "requests", "merged", "natural", "losses"}
"""What a replicate may do without."""


def left_of(study, contenders=()):
    """Parts that a replicate has at least."""
    plan = make_plan(study, contenders=contenders, phases=PHASES, interleaving="lockstep")
    second = [group for group in plan.groups if group.replicate == 1]  # in the first there are cold starts
    assert parts_in(second) >= ALL
    return parts_in(thinned(plan, second, lambda groups: False, peaks_live=False))


@pytest.fixture
def whole(small_study):
    """A study whose replicates measure everything."""
    workload = dataclasses.replace(small_study.workload, natural_tokens=8)
    protocol = dataclasses.replace(small_study.protocol, merged=True, replicates=3, peak_replicates=3, max_minutes=10)
    return dataclasses.replace(small_study, workload=workload, protocol=protocol)


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        (Part(rule="equal", axis="quantization", metric="step_time_s"), set()),
        (Part(rule="lowers", axis="engine", metric="peak_memory", by=0.2), {"peaks"}),
        (Part(rule="equal", axis="quantization", metric="request_time_s"), {"requests", "merged", "natural"}),
        (Part(rule="equal", axis="quantization", metric="held_out_loss"), {"losses"}),
    ],
    ids=lambda value: value.metric if isinstance(value, Part) else "",
)
def test_what_a_claim_waits_for_is_never_left_out(whole, part, kept):
    """Of its metric alone: all else goes, steps and cold starts apart, which no replicate does without."""
    engine = Engine(title="NF4", variant="nf4", proof={"base.bits": "4"}) if part.axis == "engine" else None
    claimed = dataclasses.replace(whole, engine=engine, claims=(Claim(id="c", says="a sentence", parts=(part,)),))
    assert left_of(whole).isdisjoint(ALL)
    assert left_of(claimed) & ALL == kept


def test_nothing_is_left_out_of_two_sides(whole):
    """Every replicate of an A/B is of everything."""
    variant = whole.variants[0]
    sided = [Contender(variant=variant, side=side, workload=whole.workload) for side in ("base", "candidate")]
    twin = Contender(variant=variant, side="base", role="control", workload=whole.workload)
    assert left_of(whole, [*sided, twin]) >= ALL
