"""Tests that a remedy is measured as a study of two variants and judged like any other."""

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.profile.remedy import choose_finding, finding_phase, judge_remedy, make_pair
from lorameter.profile.rules import Finding
from lorameter.records import store
from lorameter.records.record import Failure
from lorameter.run.build_plan import PlanOptions, build_plan
from lorameter.studies.study_file import load_variant


def finding(code="dropout", *, workload=None, obstacle="", **changes):
    return Finding(
        code=code, message="m", cost_s=0.02, cost_share=0.2, remedy="Do it.", changes=changes,
        workload_changes=workload or {}, obstacle=obstacle,
    )  # fmt: skip


PACKED = finding("padding", workload={"layout": "packed"})


@pytest.fixture
def padded(small_study):
    """The small study with one record in each row, so that a part of each row is padding."""
    return dataclasses.replace(
        small_study,
        workload=dataclasses.replace(small_study.workload, layout="padded", sequence_length=256, train_sequences=8),
        protocol=dataclasses.replace(small_study.protocol, allow_disturbed=True),
    )


def test_the_most_costly_finding_with_a_change_is_chosen():
    """Without a name the first finding with a change is chosen; another finding is refused with the available ones."""
    untestable = finding("fragmentation", obstacle="variants share the environment")
    found = (untestable, PACKED, finding("dropout", lora_dropout=0.0))
    assert choose_finding(found, None).code == choose_finding(found, "padding").code == "padding"
    assert choose_finding(found, "dropout").code == "dropout"
    for code in ("fragmentation", "logits"):
        with pytest.raises(UsageError, match=f"--try {code}: no such finding .* Can be tried: padding, dropout"):
            choose_finding(found, code)
    with pytest.raises(UsageError, match=r"--try: no such finding .* Can be tried: none"):
        choose_finding(found[:1], None)


def test_the_present_variant_is_the_reference_of_two():
    """The two variants differ only in the change of the remedy, on one workload; fallbacks are measured."""
    study, variant = load_variant("lora-or-qlora:qlora-nf4-r16")
    pair = make_pair(study, variant, finding("dequantisation", quantization="none"))
    present, suggested = pair.variants
    assert pair.reference == present.name == variant.name
    assert suggested.name == "without-dequantisation"
    assert suggested.differences(present) == ("quantization",)
    assert (pair.workload, pair.protocol, pair.own_workloads) == (study.workload, study.protocol, {})
    assert pair.allow_fallback


def test_a_remedy_of_the_workload_is_the_same_variant_on_its_own(padded, machine):
    """It takes turns with the current variant and never shares its base; a change of the variant keeps the workload."""
    variant = padded.variants[0]
    epochs = dataclasses.replace(padded.protocol, epochs=3.0)
    study = dataclasses.replace(padded, protocol=epochs)
    pair = make_pair(study, variant, PACKED)
    present, suggested = pair.variants
    assert suggested.differences(present) == ()
    assert pair.own_workloads == {suggested.name: dataclasses.replace(padded.workload, layout="packed")}
    assert pair.protocol.epochs == 0.0
    plan, _ = build_plan(pair, machine, PlanOptions(phases=("train",)), free_bytes=None)
    assert plan.interleaving in ("lockstep", "replicates")
    assert "2 workloads" in plan.why
    assert {slot.executor for slot in plan.slots} == {""}
    both = make_pair(study, variant, finding(r=8, workload={"batch_size": 4}))
    assert (both.variants[1].r, both.own_workloads, both.protocol.epochs) == (8, {}, 3.0)


def judged(write_run, pair, code, present, suggested, **options):
    """Return the judgement of a constructed run with these step times, one for each replicate."""
    steps, own = {"plain": present, f"without-{code}": suggested}, pair.own_workloads
    path = write_run("run", steps, study=pair, own_workloads=own, **options)
    return judge_remedy(store.read_run(str(path), path.parent), finding(code, optimizer="adamw"))


def test_a_gain_counts_if_the_control_shows_no_difference(write_run, small_study):
    """A gain of a fifth is valid; with a control that differs, or a failed trial, it is invalid."""
    pair = make_pair(small_study, small_study.variants[0], finding(optimizer="adamw"))
    old, new = [0.100, 0.1001, 0.1002, 0.0999], [0.080, 0.0801, 0.0802, 0.0799]
    gained = judged(write_run, pair, "dropout", old, new)
    assert gained.valid
    assert (gained.metric, gained.comparison.verdict) == ("step_time_s", "improved")
    assert gained.comparison.ratio == pytest.approx(0.8, rel=0.001)
    differing = judged(write_run, pair, "dropout", old, new, control=1.2)
    assert not differing.valid
    assert "control-failed" in {notice.code for notice in differing.notices}

    def fail(record):
        if record.trial != "r1-without-dropout":
            return record
        return record.replaced(status="oom", failure=Failure(phase="build", kind="X", message="it is full"))

    failed = judged(write_run, pair, "dropout", old, new, change=fail)
    assert not failed.valid
    assert "r1-without-dropout: oom in build: it is full" in failed.failures[0]


def test_a_remedy_of_requests_is_judged_by_requests_only(write_run, small_study, machine):
    """Only requests of one length are measured, and slower steps do not count."""
    wait = dataclasses.replace(finding("weight-copied", copy_head_input=True), metric="first_token_time_s")
    workload = dataclasses.replace(small_study.workload, open_ended_tokens=4)
    protocol = dataclasses.replace(small_study.protocol, epochs=3.0)
    study = dataclasses.replace(small_study, workload=workload, protocol=protocol)
    pair = make_pair(study, study.variants[0], wait)
    protocol = pair.protocol
    assert (protocol.merged, protocol.epochs, protocol.turns, protocol.generate_requests) == (False, 0.0, 2, 12)
    plan, _ = build_plan(pair, machine, PlanOptions(phases=(finding_phase(wait),)), free_bytes=None)
    assert {measure for slot in plan.slots for measure in slot.measures} == {"steps", "requests", "peaks"}

    def answer(record):
        seconds = (0.1 if record.name == "without-weight-copied" else 0.5) * (1 + 0.001 * record.replicate)
        return record.replaced(samples=record.samples | {"first_token_time_s": (seconds,) * 6})

    steps = {"plain": [0.1, 0.1001, 0.1002, 0.0999], "without-weight-copied": [0.2, 0.2001, 0.2002, 0.1999]}
    path = write_run("run", steps, study=pair, change=answer)
    tried = judge_remedy(store.read_run(str(path), path.parent), wait)
    assert (tried.metric, tried.comparison.verdict) == ("first_token_time_s", "improved")
    assert tried.comparison.ratio == pytest.approx(0.2)
