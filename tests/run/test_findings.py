"""What is a base's own is found out once for all that stand on it, and told of each with who has found it."""

from __future__ import annotations

import dataclasses

from harness.run.findings import find_askers, told_by
from harness.run.plan import make_plan
from harness.run.site import begin_record
from harness.studies.variant import Variant

CHECK = {"path": "packing.isolated", "required": True, "observed": True, "status": "active", "reason": "8 records"}
OTHER = {"path": "mode", "required": "train", "observed": "train", "status": "active", "reason": "seen"}


def askers(small_study, *variants, replicate=0):
    """Who asks for whom, by the names of variants; the control stands on the reference's base."""
    study = dataclasses.replace(small_study, variants=variants, reference=variants[0].name)
    group = next(one for one in make_plan(study, interleaving="lockstep").groups if one.replicate == replicate)
    names = {slot.trial: slot.variant.name + "*" * (slot.role == "control") for slot in group.slots}
    return {names[trial]: names[asker] for trial, asker in find_askers(group.slots).items()}


def test_adapters_on_one_base_ask_once(small_study):
    """Ranks and DoRA are the adapter's; quantisation, attention and what rewrites the base are not."""
    found = askers(
        small_study, Variant(name="a", r=4), Variant(name="b", r=8, use_dora=True),
        Variant(name="c", quantization="nf4"), Variant(name="d", quantization="nf4", lora_dropout=0.1),
        Variant(name="e", attention="eager"), Variant(name="f", init_lora_weights="pissa"),
    )  # fmt: skip
    assert found["a"] == found["b"] == found["a*"]
    assert found["a"] in ("a", "b")  # and not the control, which is watched by the spy
    assert found["c"] == found["d"] != found["a"]
    assert (found["e"], found["f"]) == ("e", "f")


def test_what_was_found_is_told_of_the_others(small_study):
    """With the name of who has found it, as of a check of their own; the loss of the base alone is the same number."""
    slots = make_plan(small_study, interleaving="lockstep").groups[0].slots
    slot = next(slot for slot in slots if slot.instrument == "profile")
    record = begin_record(slot, "ok").replaced(
        checks=(CHECK, OTHER), values={"held_out_loss_initial": 5.5, "threads": 1.0}
    )
    told = told_by(record, slot, allow_fallback=False, word="verify")
    (check,) = told.checks
    assert check["reason"] == f"8 records; found by {record.name}, which stands on the same base"
    assert {**check, "reason": CHECK["reason"]} == CHECK
    assert told.status == "ok"
    assert told_by(record, slot, allow_fallback=False, word="build").values == {"held_out_loss_initial": 5.5}
    spied = dataclasses.replace(slot, instrument="spy")
    assert not told_by(record, spied, allow_fallback=False, word="verify").checks


def test_what_one_lacks_all_lack(small_study):
    """Records that see each other on a base do so under every adapter on it."""
    slot = next(one for one in make_plan(small_study, interleaving="lockstep").groups[0].slots)
    slot = dataclasses.replace(slot, instrument="profile")
    leaking = {**CHECK, "observed": False, "status": "absent"}
    record = begin_record(slot, "invalid").replaced(checks=(leaking,))
    told = told_by(record, slot, allow_fallback=False, word="verify")
    assert (told.status, told.failure.kind) == ("invalid", "RequiredPathNotActive")
    assert told_by(record, slot, allow_fallback=True, word="verify").notices[0].code == "fallback-allowed"


def test_what_nobody_has_found_is_unknown_and_no_pass(small_study):
    """Where who was to find it out has ended before it could; records that are not packed have nothing to find."""
    slot = next(one for one in make_plan(small_study, interleaving="lockstep").groups[0].slots)
    slot = dataclasses.replace(slot, instrument="profile")
    record = begin_record(slot, "oom")
    told = told_by(record, slot, allow_fallback=False, word="verify")
    assert (told.status, told.checks[0]["status"]) == ("invalid", "unknown")
    assert f"{record.name}, which was to find it out for all on this base, is oom" in told.failure.message
    workload = dataclasses.replace(slot.workload, layout="padded")
    padded = dataclasses.replace(slot, contender=dataclasses.replace(slot.contender, workload=workload))
    assert told_by(record, padded, allow_fallback=False, word="verify").status == "ok"
