"""Tests of claims about any field and metric: levels that are words, pairs of levels, bytes and energy, alone or
combined."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.verdicts.claims import judge_claims

PAIR = ("none", "nf4")
STEPS = {"plain": [1.0, 1.02, 0.99, 1.01], "nf4": [1.05, 1.07, 1.04, 1.06], "dora": [1.5, 1.53, 1.48, 1.51]}
BYTES = {"plain": 1000, "nf4": 600, "dora": 1010}


def part(rule, metric, axis="quantization", levels=PAIR, **more):
    return ClaimPart(rule=rule, axis=axis, metric=metric, levels=levels, **more)


@pytest.fixture
def judged(write_run, small_study, tmp_path):
    """A function that returns the verdicts on parts, each as its own claim, of a run of bf16, nf4 and DoRA on a GPU."""

    def judge(*parts, together=False, kind="device_peak_allocated_train_bytes"):
        variants = (
            LoraVariant(name="plain"),
            LoraVariant(name="nf4", quantization="nf4"),
            LoraVariant(name="dora", use_dora=True),
        )
        claims = [Claim(id=str(place), says="s", parts=(one,)) for place, one in enumerate(parts)]
        claims = [Claim(id="0", says="s", parts=parts)] if together else claims
        study = dataclasses.replace(small_study, variants=variants, reference="plain", claims=tuple(claims))

        def change(record):
            size = BYTES[record.name] * 2**20 + record.replicate
            return record.replaced(
                memory={kind: size},
                values={"device_energy_train_j": 10.0 * BYTES[record.name] / 1000 + record.replicate / 100,
                        "energy_steps": 10.0},
            )  # fmt: skip

        write_run("mine", STEPS, study=study, change=change)
        report = judge_claims(store.read_run("mine", tmp_path / "runs"))
        return report.claims[0] if together else [claim.parts[0] for claim in report.claims]

    return judge


def test_less_memory_and_hardly_slower_is_one_claim_of_a_pair(judged):
    """Both parts must hold."""
    less = part("lowers", "peak_memory", by=0.3)
    at_most = part("costs-at-most", "step_time_s", by=0.1)
    claim = judged(less, at_most, together=True)
    assert claim.verdict == "supported"
    assert [one.verdict for one in claim.parts] == ["supported", "supported"]
    assert claim.parts[0].ratio == pytest.approx(0.6)
    assert claim.parts[1].about == "nf4 / plain"
    too_much = judged(less, part("costs-at-most", "step_time_s", by=0.02), together=True)
    assert too_much.verdict == "refuted"


def test_resident_memory_supports_no_limit_of_a_cost(judged):
    """Resident memory on a CPU dilutes differences: a visible saving or cost is judged, and a small cost is not."""
    saving, cost, bound = judged(
        part("lowers", "peak_memory", by=0.3),
        part("costs-at-most", "peak_memory", levels=("nf4", "none"), by=0.05),
        part("costs-at-most", "peak_memory", axis="use_dora", levels=(False, True), by=0.05),
        kind="host_peak_train_bytes",
    )
    assert (saving.verdict, cost.verdict, bound.verdict) == ("supported", "refuted", "not judged")
    assert "a cost can be lost, so it supports nothing" in bound.reason


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ('{ rule = "trend-up", axis = "quantization", metric = "step_time_s" }', ["no numbers", "lays a line"]),
        ('{ rule = "lowers", axis = "quantization", metric = "peak_memory" }', ["about a pair", "two levels"]),
        ('{ rule = "lowers", axis = "quantization", metric = "peak_memory", levels = ["none", "fp4"] }',
         ["level fp4", "none, nf4"]),
        ('{ rule = "lowers", axis = "no_field", metric = "peak_memory", levels = ["a", "b"] }', ["fewer than two"]),
        ('{ rule = "differs", axis = "quantization", metric = "x_bytes", levels = ["none", "nf4"] }', ["not known"]),
    ],
)  # fmt: skip
def test_an_invalid_claim_is_refused(tmp_path, claim, words):
    """The error has the file, the fault and the known values."""
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[variant]]\nname = "a"\n[[variant]]\nname = "b"\nquantization = "nf4"\n'
        f'[[claim]]\nid = "1"\nsays = "s"\nparts = [{claim}]\n'
    )
    with pytest.raises(UsageError) as caught:
        load_study(str(path))
    for word in ["mine.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "levels", "changed"),
    [
        ("attention", ("sdpa", "eager"), {"attention": "eager"}),
        ("optimizer", ("adamw_fused", "paged_adamw_32bit"), {"optimizer": "paged_adamw_32bit"}),
    ],
)
def test_a_pair_may_be_of_any_field_and_of_losses(write_run, small_study, tmp_path, axis, levels, changed):
    """The claims compare two attentions in time and loss, and two optimizers."""
    variants = (LoraVariant(name="plain"), dataclasses.replace(LoraVariant(name="other"), **changed))
    parts = (
        part("costs-at-most", "step_time_s", axis=axis, levels=levels, by=0.3),
        part("faster", "step_time_s", axis=axis, levels=levels, by=0.1),
        part("equal", "held_out_loss", axis=axis, levels=()),
        part("differs", "timed_loss", axis=axis, levels=levels),
    )
    claims = tuple(Claim(id=str(place), says="s", parts=(one,)) for place, one in enumerate(parts))
    study = dataclasses.replace(small_study, variants=variants, reference="plain", claims=claims)

    def change(record):
        worse = 1.2 if record.name == "other" else 1.0
        at_last, held_out = worse * (2.0 + record.replicate / 1000), 2.0 + record.replicate / 1000
        return record.replaced(
            samples=record.samples | {"timed_loss": (at_last,) * 3},
            values=record.values | {"held_out_loss": held_out},
        )

    times = {"plain": [1.0, 1.02, 0.99, 1.01], "other": [1.2, 1.22, 1.19, 1.21]}
    write_run("mine", times, study=study, change=change)
    report = judge_claims(store.read_run("mine", tmp_path / "runs"))
    verdicts = [claim.parts[0].verdict for claim in report.claims]
    assert verdicts == ["supported", "refuted", "supported", "supported"]
