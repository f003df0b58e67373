"""What a seed draws is part of every run that is gone on with: plans of today are held to the bit."""

import dataclasses
import hashlib
import json

import pytest

import harness.run.ab
from harness.profile.finding import Finding
from harness.profile.remedy import make_pair
from harness.records import codec
from harness.run.ab import plan_ab
from harness.run.contenders import contenders_of
from harness.run.measure import plan_study
from harness.run.plan import make_plan
from harness.studies.study_file import load_study

LEVELS = ("shared-base", "lockstep", "replicates")


def digest(plan):
    """All that a plan says of its trials, their groups and their turns, in order."""
    slots = [
        (
            slot.trial, slot.variant.name, slot.variant.id, slot.role, slot.side, slot.replicate, slot.position,
            slot.seed, slot.interleaving, slot.measures, slot.instrument, slot.arm, slot.contender.injected_rows,
            codec.to_json(slot.workload),
        )
        for slot in plan.slots
    ]  # fmt: skip
    groups = []
    for group in plan.groups:
        launches = [[slot.trial for slot in launch] for launch in group.launches]
        groups.append((group.replicate, launches, group.turns, group.requests, group.natural))
    said = json.dumps([slots, groups, plan.phases, plan.interleaving], sort_keys=True)
    return f"{len(plan.slots)} {len(plan.groups)} {hashlib.sha256(said.encode()).hexdigest()[:16]}"


def first(plan, count=3):
    """The names of the first trials."""
    return " ".join(slot.trial for slot in plan.slots[:count])


def study_plan(name, level, select=(), effort=None, phases=None):
    study = load_study(name, device="cpu").with_overrides(effort=effort)
    return make_plan(
        study, contenders=contenders_of(study, select), phases=phases or study.protocol.phases, interleaving=level
    )


STUDIES = {
    ("lora-or-qlora", "shared-base"): (
        "r0-qlora-nf4-r64-a16 r0-qlora-nf4-r16 r0-lora-r16",
        "30 18 622870dcae0202dd",
    ),
    ("llama2-lora-parameters", "shared-base"): (
        "r0-r=16 r0-r=512 r0-lora_dropout=0.0",
        "111 21 8edfb2d86cc6538b",
    ),
    ("lora-or-qlora", "lockstep"): (
        "r0-qlora-nf4-r64-a16 r0-qlora-nf4-r16 r0-lora-r16",
        "30 18 1a3665ba3c8b2dbd",
    ),
    ("llama2-lora-parameters", "lockstep"): (
        "r0-r=16 r0-r=512 r0-lora_dropout=0.0",
        "111 21 e34dabf49af52c46",
    ),
    ("lora-or-qlora", "replicates"): (
        "r0-qlora-nf4-r64-a16 r0-qlora-nf4-r16 r0-lora-r16",
        "15 15 f0114ab6c096fe90",
    ),
    ("llama2-lora-parameters", "replicates"): (
        "r0-r=16 r0-r=512 r0-lora_dropout=0.0",
        "96 96 f6e71255232804fa",
    ),
    ("lora-or-qlora", "lockstep", ("qlora-nf4-r16",)): (
        "r0-lora-r16 r0-lora-r16-control r0-qlora-nf4-r16",
        "18 12 c4b282c5595bfa32",
    ),
    ("lora-or-qlora", "shared-base", ("qlora-nf4-r16",), "rigorous"): (
        "r0-lora-r16 r0-lora-r16-control r0-qlora-nf4-r16",
        "72 48 b8cc72b113b95650",
    ),
    ("lora-or-qlora", "lockstep", (), "standard", ("train",)): (
        "r0-qlora-nf4-r64-a16 r0-qlora-nf4-r16 r0-lora-r16",
        "52 20 3ddc1c94189444c7",
    ),
    ("lora-or-qlora", "shared-base", (), "quick", ("train", "cold")): (
        "r0-qlora-nf4-r64-a16 r0-qlora-nf4-r16 r0-lora-r16",
        "30 18 3807ab67d5fad5f6",
    ),
    ("training-step", "replicates", (), "rigorous", ("generate", "train")): (
        "r0-qlora-nf4-r16 r0-qlora-nf4-r16-control r1-qlora-nf4-r16-control",
        "24 24 08395f3026c486e7",
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), STUDIES.items(), ids=str)
def test_a_study_is_planned_as_ever(arguments, expected):
    """Every level, a selection, an effort, some of the phases: the first trials by name, and the whole by its hash."""
    plan = study_plan(*arguments)
    assert (first(plan), digest(plan)) == expected


SIDES = {
    ("lockstep",): (
        "r0-qlora-nf4-r16-candidate r0-qlora-nf4-r16-base r0-qlora-nf4-r16-base-control",
        "30 14 9a768fb4ca8784b2",
    ),
    ("replicates",): (
        "r0-qlora-nf4-r16-candidate r0-qlora-nf4-r16-base r0-qlora-nf4-r16-base-control",
        "24 24 00f4650c0120e2c6",
    ),
    ("lockstep", (), ("train", "cold"), 64): (
        "r0-qlora-nf4-r16-candidate r0-qlora-nf4-r16-base r0-qlora-nf4-r16-base-control",
        "48 32 ccebcbe997f09c97",
    ),
    ("lockstep", (), ("train",)): (
        "r0-qlora-nf4-r16-candidate r0-qlora-nf4-r16-base r0-qlora-nf4-r16-base-control",
        "30 14 e1df6745bd59fb1f",
    ),
    ("lockstep", (), ("train", "generate"), 0, "lora-or-qlora"): (
        "r0-qlora-nf4-r64-a256-candidate r0-qlora-nf4-r64-a256-base r0-qlora-nf4-r64-a256-candidate-solo",
        "96 56 d3eef4f9bd0693f1",
    ),
    ("replicates", ("qlora-nf4-r64-a256", "qlora-nf4-r16"), ("train", "cold"), 8, "lora-or-qlora"): (
        "r0-qlora-nf4-r16-base r0-qlora-nf4-r16-candidate r0-qlora-nf4-r64-a256-candidate",
        "40 40 22259b6f3ef3dd0b",
    ),
    ("lockstep", ("qlora-nf4-r64-a256", "qlora-nf4-r16"), ("train", "cold"), 0, "lora-or-qlora"): (
        "r0-qlora-nf4-r16-base r0-qlora-nf4-r16-candidate r0-qlora-nf4-r16-candidate-solo",
        "80 56 99ac4c5601ae52db",
    ),
}


def side_plan(machine, monkeypatch, level, select=(), phases=("train", "generate"), rows=0, name="training-step"):
    free = 2**40 if level == "lockstep" else None
    monkeypatch.setattr(harness.run.ab, "together_bytes", lambda *_: 2**30)
    study = load_study(name, device="cpu").with_overrides(effort="standard")
    plan, _ = plan_ab(study, machine, free_bytes=free, select=select, phases=phases, injected_rows=rows)
    return plan


@pytest.mark.parametrize(("arguments", "expected"), SIDES.items(), ids=str)
def test_an_ab_is_planned_as_ever(arguments, expected, machine, monkeypatch):
    """In turns and one by one, with a control of the reference or of the first selected, cold starts, extra work."""
    plan = side_plan(machine, monkeypatch, *arguments)
    assert (first(plan), digest(plan)) == expected


REMEDIES = {
    ("lora_dropout", 0.1, None): (
        "r0-plain r0-plain-control r0-without-it",
        "10 6 316c6b4ee019c2cf",
    ),
    ("lora_dropout", 0.1, "lockstep"): (
        "r0-plain r0-plain-control r0-without-it",
        "10 6 019013d7b60fe170",
    ),
    ("layout", "packed", "lockstep"): (
        "r0-plain r0-plain-control r0-without-it",
        "10 6 2b0b2f98f63fa61e",
    ),
    ("layout", "packed", "replicates"): (
        "r0-plain r0-plain-control r0-without-it",
        "6 6 8db6324a48d4f0ac",
    ),
    ("threads", 1, "lockstep"): (
        "r0-plain r0-plain-control r0-without-it",
        "10 6 cc2408d8cc67f1a1",
    ),
    ("threads", 1, "replicates"): (
        "r0-plain r0-plain-control r0-without-it",
        "6 6 c9725abd0eaca6ee",
    ),
    ("batch_size", 4, "lockstep"): (
        "r0-plain r0-plain-control r0-without-it",
        "10 6 cdda1046f7fc3dbb",
    ),
}


def remedy_plan(small_study, machine, key, value, level):
    workload = dataclasses.replace(
        small_study.workload, layout="padded", sequence_length=256, train_sequences=8, threads=2
    )
    study = dataclasses.replace(small_study, workload=workload)
    change = {"changes": {key: value}} if key == "lora_dropout" else {"workload_changes": {key: value}}
    finding = Finding(code="it", message="m", cost_s=0.02, cost_share=0.2, remedy="Do it.", **change)
    pair = make_pair(study, study.variants[0], finding, protocol=study.protocol)
    return plan_study(
        pair.study,
        machine,
        free_bytes=None,
        phases=("train",),
        interleaving=level,
        own_workloads=pair.own_workloads,
    )[0]


@pytest.mark.parametrize(("arguments", "expected"), REMEDIES.items(), ids=str)
def test_a_remedy_is_planned_as_ever(arguments, expected, small_study, machine):
    """The variant's change on one workload; a workload of its own, by as many threads or by others."""
    plan = remedy_plan(small_study, machine, *arguments)
    assert (first(plan), digest(plan)) == expected
