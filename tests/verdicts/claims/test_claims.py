"""Tests of claims judged from runs with a known truth.

Tests of the share of the time of requests until EOS that the answer length explains.

Tests of claims about any field and metric: levels that are words, pairs of levels, bytes and energy, alone or
combined.

Tests of claims along a workload field: other batches and other models.
"""

from __future__ import annotations

import dataclasses
import random

import pytest

from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.verdicts.claims import collect_answers, combine_verdicts, judge_claims
from lorameter.verdicts.series import group_trials

RISE = {"r4": 1.0, "centre": 1.03, "r16": 1.06}
"""Every doubling of r costs 3 %."""
BEST = {"rule": "best", "metric": "", "metrics": {"step_time_s": 1}}


def part_of(run):
    """Return the only part of the only claim."""
    ((result,),) = [claim.parts for claim in judge_claims(run).claims]
    return result


@pytest.mark.parametrize(
    ("part", "factors", "verdict"),
    [
        ({"rule": "trend-up"}, RISE, "supported"),
        ({"rule": "trend-up"}, {}, "refuted"),
        ({"rule": "trend-up"}, {"r4": 1.06, "centre": 1.03}, "refuted"),
        ({"rule": "trend-up"}, {"r16": 1.01}, "inconclusive"),
        ({"rule": "trend-down"}, RISE, "refuted"),
        ({"rule": "trend-down", "axis": "lora_alpha"}, {"a8": 1.05}, "supported"),
        ({"rule": "no-trend"}, {"centre": 1.2}, "supported"),
        ({"rule": "no-trend"}, {"r16": 1.3}, "refuted"),
        ({"rule": "no-trend"}, {"r16": 1.05}, "inconclusive"),
        ({"rule": "equal"}, {}, "supported"),
        ({"rule": "equal"}, {"centre": 1.2}, "refuted"),
        ({"rule": "equal"}, {"centre": 1.05}, "inconclusive"),
        ({"rule": "differs", "levels": (4, 16)}, RISE, "supported"),
        ({"rule": "differs", "levels": (16, 4)}, {"r4": 1.06}, "supported"),
        ({"rule": "differs", "levels": (4, 16)}, {}, "refuted"),
        ({"rule": "differs", "levels": (4, 16)}, {"r4": 1.01}, "inconclusive"),
        ({"rule": "highest", "levels": (16,)}, RISE, "supported"),
        ({"rule": "highest", "levels": (8,)}, RISE, "refuted"),
        ({"rule": "highest", "levels": (8,)}, {}, "refuted"),
        ({"rule": "highest", "levels": (8,)}, {"centre": 1.01}, "inconclusive"),
        ({"rule": "lowest", "levels": (4,)}, RISE, "supported"),
        ({"rule": "lowest", "levels": (16,)}, RISE, "refuted"),
        (BEST | {"levels": (4,), "metrics": {"step_time_s": 1, "held_out_loss": 2}}, RISE, "supported"),
        (BEST | {"levels": (8,)}, RISE, "refuted"),
        (BEST | {"levels": (8,)}, {}, "inconclusive"),
        ({"rule": "largest-effect", "against": ("lora_alpha",)}, RISE | {"a8": 1.01}, "supported"),
        ({"rule": "largest-effect", "against": ("lora_alpha",)}, {"a8": 1.05}, "refuted"),
        ({"rule": "largest-effect", "against": ("lora_alpha",)}, {"r4": 1.05, "a32": 1.05}, "inconclusive"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", ["shared-base", "replicates"])
def test_each_rule_finds_the_truth(make_run, claim, part, factors, verdict, level):
    """Each rule is right for present, absent and borderline effects, with and without turns."""
    assert part_of(make_run([claim(part)], factors, level=level)).verdict == verdict


def test_the_estimate_is_the_ratio_with_its_interval(make_run, claim):
    """The ratio is from the first level to the last on the fitted line; the reason has it with its limit."""
    part = part_of(make_run([claim(rule="trend-up")], RISE))
    assert part.low < 1.06 < part.high
    assert part.ratio == pytest.approx(1.06, abs=0.003)
    assert (part.about, part.tolerance, part.margin, part.replicates, part.skipped) == ("16 / 4", 0.01, None, 6, 0)
    assert part.reason.startswith("from r 4 to 16 step time changes by ×1.0")
    assert ": a rise of more than 1 % (95 % interval [1.05" in part.reason


def test_the_best_trades_metrics_by_their_weights(make_run, claim):
    """A trade of 3 % step time against 1 % loss is decided by the weights, which the reason states."""

    def with_losses(record):
        loss = {"r4": 2.0, "centre": 2.02, "r16": 2.02}.get(record.name, 2.02)
        return record.replaced(values=record.values | {"held_out_loss": loss})

    for weight, verdict in ((1.0, "refuted"), (10.0, "supported")):
        metrics = {"step_time_s": 1.0, "held_out_loss": weight}
        part = part_of(
            make_run([claim(rule="best", levels=(4,), metric="", metrics=metrics)], {"r4": 1.03}, change=with_losses)
        )
        assert part.verdict == verdict
        assert (part.metric, part.tolerance) == ("step_time_s + held_out_loss", None)
    assert "the score (step time, 10 × held-out loss) at r 4" in part.reason


@pytest.mark.parametrize(
    ("metric", "change", "axis", "verdict", "words"),
    [
        ("trainable_parameters", {}, "r", "supported", "by r, 4,000 at 4, 8,000 at 8, 16,000 at 16"),
        ("trainable_parameters", {}, "lora_alpha", "refuted", "8,000 at every level of lora_alpha"),
        ("adapter_bytes", {}, "r", "supported", "by r, 16,000 at 4"),
        ("trainable_parameters", {"r16": 100.0}, "r", "refuted", "8,000 at 8, 100 at 16"),
    ],
)
def test_counts_are_exact(make_run, claim, metric, change, axis, verdict, words):
    """A count is compared at every level, without estimate, interval and limit; the reason gives the numbers."""

    def counted(record):
        values = {"trainable_parameters": change[record.name]} if record.name in change else {}
        return record.replaced(values=record.values | values)

    part = part_of(make_run([claim(rule="rises", axis=axis, metric=metric)], change=counted))
    assert (part.verdict, part.ratio, part.tolerance, part.margin) == (verdict, None, None, None)
    assert words in part.reason


# --- what cannot be judged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"rule": "trend-up"}, {"rule": "rises", "metric": "trainable_parameters"}])
def test_one_replicate_judges_nothing(make_run, claim, rule):
    """One replicate judges no claim, not even one about a count; two replicates do."""
    part = part_of(make_run([claim(rule)], RISE, replicates=1))
    assert (part.verdict, part.ratio, part.replicates) == ("not judged", None, 0)
    assert "1 replicate with every level: a claim is never judged from fewer than 2" in part.reason
    assert part_of(make_run([claim(rule)], RISE, replicates=2, noise=0.0)).verdict == "supported"


def test_a_claim_on_a_pretrained_model_needs_one(make_run, claim):
    """On random weights a claim on loss is not judged; a claim on speed is."""
    speed = claim(rule="trend-up")
    loss = dataclasses.replace(claim(rule="trend-up", metric="held_out_loss"), id="loss", pretrained=True)
    report = judge_claims(make_run([speed, loss], RISE, notices=("random-weights",)))
    assert [one.verdict for one in report.claims] == ["supported", "not judged"]
    assert report.claims[1].parts[0].reason.startswith("random weights")


@pytest.mark.parametrize(
    ("part", "options", "words"),
    [
        ({"metric": "cold_start_time_s"}, {}, "Measure with the phase cold"),
        ({"metric": "open_ended_request_time_s"}, {}, "open_ended_tokens in [workload]"),
        ({}, {"select": ("centre", "r4")}, "r 16: no trial in this run"),
        ({"metric": "held_out_loss"}, {"change": lambda one: one.replaced(values=one.values | {"held_out_loss": -1.0})},
         "held-out loss: reference trial 0 sample 0 is -1.0"),
    ],
)  # fmt: skip
def test_missing_inputs_are_named_with_the_remedy(make_run, claim, part, options, words):
    """A skipped phase, a workload without such requests, a level not selected and a value without a logarithm are
    named."""
    found = part_of(make_run([claim({"rule": "trend-up"} | part)], RISE, **options))
    assert found.verdict == "not judged"
    assert words in found.reason


def test_a_replicate_counts_only_with_every_level(make_run, claim):
    """A replicate in which one level fails is left out, and the reason names it."""

    def failing(record):
        failed = record.name == "r4" and record.replicate == 2
        return record.replaced(status="timeout") if failed else record

    part = part_of(make_run([claim(rule="trend-up")], RISE, change=failing))
    assert (part.verdict, part.replicates, part.skipped) == ("supported", 5, 1)
    assert part.reason.endswith("; 1 replicate left out, where a level is missing")


# --- the control ------------------------------------------------------------------------------------------------------


def test_a_failed_control_leaves_its_phase_unjudged(make_run, claim):
    """A metric whose control differs supports and refutes no claim; a count is still judged, and the run is invalid."""
    claims = [
        dataclasses.replace(claim(part), id=str(index))
        for index, part in enumerate([
            {"rule": "trend-up"}, {"rule": "trend-down"}, {"rule": "equal"},
            {"rule": "trend-up", "metric": "held_out_loss"}, {"rule": "rises", "metric": "trainable_parameters"},
        ])
    ]  # fmt: skip
    report = judge_claims(make_run(claims, RISE, control=1.2))
    assert [one.verdict for one in report.claims] == ["inconclusive"] * 4 + ["supported"]
    assert report.claims[0].parts[0].reason.startswith("the control differs from itself in step time, ×1.2")
    assert report.claims[0].parts[0].ratio == pytest.approx(1.06, abs=0.003)
    assert not report.valid


def test_without_an_equivalent_control_nothing_is_equal(make_run, claim):
    """With a missing or noisy control, a difference can be supported but an equality cannot."""
    missing = lambda record: None if record.role == "control" else record  # noqa: E731
    rng = random.Random(1)

    def noisy(record):
        factor = 1 + rng.uniform(-0.3, 0.3) if record.role == "control" else 1.0
        return record.replaced(samples={name: tuple(factor * one for one in v) for name, v in record.samples.items()})

    for change in (missing, noisy):
        part = part_of(make_run([claim(rule="equal")], change=change))
        assert part.verdict == "inconclusive"
        assert "so nothing is called equal" in part.reason
        assert part_of(make_run([claim(rule="equal")], {"r16": 1.2}, change=change)).verdict == "refuted"
        assert part_of(make_run([claim(rule="trend-up")], RISE, change=change)).verdict == "supported"


# --- claims of several parts, and several claims ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "inconclusive"], "inconclusive"),
        (["inconclusive", "not judged"], "not judged"),
        (["not judged", "refuted", "inconclusive"], "refuted"),
    ],
)
def test_a_claim_is_the_conjunction_of_its_parts(verdicts, expected):
    """One refuted part refutes the claim, one part that is not judged leaves it not judged, and all parts must be
    supported."""
    assert combine_verdicts(verdicts) == expected


def test_claims_share_their_error_rate(make_run, claim):
    """An effect that is clear alone is not clear among thirty claims; decided claims leave their share of the error
    rate to the rest."""

    def study_of(part, count):
        return [dataclasses.replace(claim(part), id=str(index)) for index in range(count)]

    near = {"r16": 1.0165}
    one = judge_claims(make_run([claim(rule="differs", levels=(4, 16))], near)).claims[0].parts[0]
    assert one.verdict == "supported"
    many = study_of({"rule": "differs", "levels": (4, 16)}, 30)
    report = judge_claims(make_run(many, near))
    assert {one.verdict for one in report.claims} == {"inconclusive"}
    assert (report.claims[0].parts[0].low, report.claims[0].parts[0].high) == (one.low, one.high)
    clear = study_of({"rule": "trend-up", "axis": "lora_alpha"}, 29)
    last = dataclasses.replace(many[0], id="last")
    assert judge_claims(make_run([*clear, last], near | {"a32": 2.0})).claims[-1].verdict == "supported"


# --- runs without a claim to judge -----------------------------------------------------------------------------------


def test_a_run_without_a_successful_trial_is_invalid(make_run, claim):
    """No claim is judged, and the run is invalid."""
    report = judge_claims(make_run([claim(rule="equal")], change=lambda record: record.replaced(status="crashed")))
    assert (report.claims[0].verdict, report.valid, report.replicates) == ("not judged", False, 0)
    assert report.trials == {"planned": 36, "crashed": 36}


@pytest.fixture
def answers(make_run):
    """A function that returns the answers of a run whose requests take `per_token` seconds a token, by variant and
    request."""

    def make(tokens_of, per_token=lambda name, index: 0.02):
        def answered(record):
            tokens = [float(tokens_of(record.name, index, record.role)) for index in range(6)]
            times = [per_token(record.name, index) * count for index, count in enumerate(tokens)]
            samples = {"open_ended_tokens": tuple(tokens), "open_ended_request_time_s": tuple(times)}
            return record.replaced(samples=record.samples | samples)

        return collect_answers(group_trials(make_run([], change=answered).records))

    return make


def test_length_explains_everything_at_one_speed(answers):
    """With a constant time per token the length explains everything; requests of the control do not count."""
    found = answers(lambda name, index, role: 5 + index + len(name) + 1000 * (role == "control"))
    assert found.requests.value == pytest.approx(1.0)
    assert found.variants.value == pytest.approx(1.0)
    assert (found.requests.replicates, found.requests.points, found.variants.points) == (6, 6 * 5 * 6, 6 * 5)


def test_length_explains_only_a_part_of_mixed_speeds(answers):
    """With a higher time per token in every other request, the length explains only a part."""
    found = answers(lambda name, index, role: 5 + index, lambda name, index: 0.02 * (1 + index % 2))
    assert 0 < found.requests.value < 0.9
    assert found.variants is None  # all variants gave the same answers


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
        claims = [Claim(id=str(index), says="s", parts=(part,)) for index, part in enumerate(parts)]
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


def test_resident_memory_does_not_support_a_small_cost(judged):
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
        ('{ rule = "trend-up", axis = "quantization", metric = "step_time_s" }', ["not numbers", "fits a line"]),
        ('{ rule = "lowers", axis = "quantization", metric = "peak_memory" }', ["2 expected", "the base first"]),
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
    claims = tuple(Claim(id=str(index), says="s", parts=(part,)) for index, part in enumerate(parts))
    study = dataclasses.replace(small_study, variants=variants, reference="plain", claims=claims)

    def change(record):
        worse = 1.2 if record.name == "other" else 1.0
        at_last, held_out = worse * (2.0 + record.replicate / 1000), 2.0 + record.replicate / 1000
        return record.replaced(
            samples=record.samples | {"timed_loss": (at_last,) * 3},
            values=record.values | {"held_out_loss": held_out, "held_out_loss_initial": 4.0},
        )

    times = {"plain": [1.0, 1.02, 0.99, 1.01], "other": [1.2, 1.22, 1.19, 1.21]}
    write_run("mine", times, study=study, change=change)
    report = judge_claims(store.read_run("mine", tmp_path / "runs"))
    verdicts = [claim.parts[0].verdict for claim in report.claims]
    assert verdicts == ["supported", "refuted", "supported", "supported"]


SIZES = {"b4": {"batch_size": 4}, "other": {"model": "random:smollm2-135m"}}


@pytest.mark.parametrize(
    ("part", "factors", "verdict"),
    [
        ({"rule": "trend-up", "axis": "workload.batch_size"}, {"b4": 1.8}, "supported"),
        ({"rule": "trend-up", "axis": "workload.batch_size"}, {}, "refuted"),
        ({"rule": "lowest", "axis": "workload.model", "levels": ("tiny-llama",)}, {"other": 2.0}, "supported"),
        (
            {"rule": "costs-at-most", "axis": "workload.batch_size", "levels": (2.0, 4.0), "by": 0.5},
            {"b4": 1.8},
            "refuted",
        ),
    ],
)
def test_a_field_of_the_workload_is_an_axis(make_run, claim, small_study, part, factors, verdict):
    """The claim is judged by the variants that differ from the reference in this field only."""
    sizes = SIZES | {"b4": {"batch_size": 2 * small_study.workload.batch_size}}
    names = {2.0: float(small_study.workload.batch_size), 4.0: 2.0 * small_study.workload.batch_size}
    if part["axis"] == "workload.batch_size" and "levels" in part:
        part = part | {"levels": tuple(names[level] for level in part["levels"])}
    if part["axis"] == "workload.model":
        part = part | {"levels": (small_study.workload.model,)}
    assert part_of(make_run([claim(part)], factors, workloads=sizes)).verdict == verdict


@pytest.mark.parametrize("metric", ["held_out_loss", "timed_loss"])
@pytest.mark.parametrize(
    "own",
    [
        {"model": "random:smollm2-135m"},
        {"prompt_format": "write-instruction"},
        {"loss": "answer"},
        {"sequence_length": 64},
        {"layout": "padded"},
    ],
)
def test_losses_of_other_tokens_are_not_compared(make_run, claim, small_study, own, metric):
    """The claim is not judged, also where the same number of sequences holds more or fewer records."""
    ((key, value),) = own.items()
    assert getattr(small_study.workload, key) != value
    level = float(value) if isinstance(value, int) else value
    part = claim(rule="lowest", axis=f"workload.{key}", levels=(level,), metric=metric)
    found = part_of(make_run([part], {"other": 0.5}, workloads={"other": own}))
    assert found.verdict == "not judged"
    assert "different tokens" in found.reason
