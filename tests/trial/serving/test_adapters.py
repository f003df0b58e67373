"""Tests of several adapters on one base: each row has its adapter's answer, and a wrong adapter is reported.

Tests of an adapter with a large effect in several serving modes: equivalent modes agree, and a fault is found.

Tests of logit distances and sequence losses against plain numpy.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear
from safetensors.torch import save_file

from lorameter.measurements.metrics import get_samples
from lorameter.models import catalogue
from lorameter.parity import compare_served
from lorameter.records import codec
from lorameter.records.record import ServedAnswers
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import ServingRequest, TrialRequest, serving_modes
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving import adapters
from lorameter.trial.serving.adapters import ROWS, measure_distance, sequence_losses
from lorameter.trial.serving.server import generate

WORKLOAD = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=6, held_out_sequences=1, prompt_tokens=8,
    new_tokens=4, request_batch=5, adapters=3,
)  # fmt: skip
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))


@pytest.fixture
def begin(begin_requests):
    """A function that runs a trial of three adapters up to its first request and returns the trial and its record."""

    def make(variant=VARIANT, **changes):
        return begin_requests(dataclasses.replace(WORKLOAD, **changes), variant)

    return make


def test_each_row_of_a_mixed_batch_has_the_answer_of_its_adapter(begin):
    """Answers equal those of single prompts in float32, and the adapters give different answers to one prompt. Requests
    are timed plain, after a switch and mixed."""
    running, record = begin()
    assert record.status == "ok", record.failure
    assert (record.values["adapters"], record.values["mixed_rows"], record.values["mixed_rows_decisive"]) == (3, 5, 5)
    model = running.trainee.model
    prompts, names = running.stream.prompts(0), running.server.name_rows(0)
    assert names == ["default", "default-other1", "default-other2", "default", "default-other1"]
    mixed = generate(model, prompts, 4, adapters=names).answers
    alone = {}
    for name in dict.fromkeys(names):
        peft_methods.activate(model, name)
        alone[name] = [generate(model, prompts[row : row + 1], 4).answers[0] for row in range(5)]
    assert list(mixed) == [alone[name][row] for row, name in enumerate(names)]
    assert all(len({answers[row] for answers in alone.values()}) == 3 for row in range(5))

    for _ in range(2):
        record = record.merged(running.run("request"))
    assert model.active_adapter == "default"
    samples = record.samples
    alone_s, mixed_s = samples["request_time_s"], samples["mixed_request_time_s"]
    assert get_samples(record, "mixing_factor") == tuple(m / a for a, m in zip(alone_s, mixed_s, strict=True))
    switched = zip(samples["switch_time_s"], samples["switched_request_time_s"], alone_s, strict=True)
    assert get_samples(record, "switching_factor") == tuple((switch + other) / one for switch, other, one in switched)
    assert len(samples["switch_time_s"]) == 2


def test_rounding_is_not_taken_for_a_wrong_adapter(begin):
    """The test uses NF4 and 16 bits on every linear layer."""
    changes = {"dtype": "bfloat16", "quantization": "nf4", "adapter_dtype": "bfloat16"}
    variant = dataclasses.replace(VARIANT, target_modules=("all-linear",), **changes)
    _, record = begin(variant, new_tokens=12)
    assert record.status == "ok", record.failure
    assert record.values["mixed_rows_decisive"] > 0


def test_equal_adapters_are_refused(begin, monkeypatch):
    """With B zero every adapter answers as the base does, so that a wrong adapter could not be detected."""
    monkeypatch.setattr(
        peft_methods,
        "attach_random",
        lambda model, variant, name, seed: peft_methods.attach_second(model, variant, name),
    )
    _, record = begin(dataclasses.replace(VARIANT, learning_rate=1e-12))
    assert (record.status, record.failure.kind) == ("invalid", "AdaptersAlike")


def test_one_prompt_measures_switching_alone(begin):
    """With a single prompt only switching is measured; the other adapters are deleted when the trained one is
    merged."""
    running, record = begin(request_batch=1)
    record = record.merged(running.run("request"))
    assert "mixed_request_time_s" not in record.samples
    assert "mixed_rows" not in record.values
    assert len(get_samples(record, "switching_factor")) == 1
    record = record.merged(running.run("merge")).merged(running.run("request"))
    assert list(running.trainee.model.peft_config) == ["default"]
    assert (record.status, len(record.samples["merged_request_time_s"])) == ("ok", 1)


def test_a_row_computed_with_another_adapter_is_reported(begin, monkeypatch):
    """The fault swaps adapters between rows during decoding only, where rows are one token long."""
    original = Linear._mixed_batch_forward

    def shuffled(self, x, *args, adapter_names, **kwargs):
        names = [*adapter_names[-1:], *adapter_names[:-1]] if x.shape[1] == 1 else adapter_names
        return original(self, x, *args, adapter_names=names, **kwargs)

    monkeypatch.setattr(Linear, "_mixed_batch_forward", shuffled)
    _, record = begin()
    assert (record.status, record.failure.kind) == ("invalid", "MixedAnswers")


SERVED = Workload(
    sequence_length=32, batch_size=2, train_sequences=8, held_out_records=4, held_out_sequences=2, prompt_tokens=8,
    new_tokens=6,
)  # fmt: skip
FULL = LoraVariant(name="full", r=4, dtype="float32")
NF4 = LoraVariant(name="nf4", r=4, dtype="float32", quantization="nf4", compute_dtype="float32")
SOURCE = catalogue.resolve(SERVED.model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter with a non-zero B, which changes logits by whole numbers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = peft_methods.attach(load_base(SOURCE, FULL, device="cpu", seed=SERVED.data_seed), FULL)
    with torch.no_grad():
        for name, parameter in peft_methods.own_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    peft_methods.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def request_of(adapter, tmp_path_factory):
    """A function that returns the request for a group of serving modes of a variant, with an optional reference."""
    folder = tmp_path_factory.mktemp("served")
    tokens = prepare(SERVED, folder)

    def make(variant, group, reference=()):
        scratch = folder / variant.name
        scratch.mkdir(exist_ok=True)
        trial = TrialRequest(
            trial="r1", variant=variant, role="variant", replicate=0, seed=1, workload=SERVED, protocol=Protocol(),
            interleaving="separate", measures=(), device="cpu", threads=1, tokens_path=tokens.path,
            scratch=str(scratch), log_path=str(folder / "log"),
        )  # fmt: skip
        return ServingRequest(
            trial=trial, adapter=str(adapter), ways=serving_modes(variant)[group], reference=reference
        )

    return make


@pytest.fixture(scope="module")
def served_of(request_of):
    """A function that returns the results of the serving modes in some groups of a variant, by name."""

    def serve(variant, *groups):
        found = []
        for group in groups:
            fragment = adapters.serve_adapter(request_of(variant, group, found[0].answers if found else ()))
            found += codec.from_json(tuple[ServedAnswers, ...], fragment.tokens["served"], "served")
        assert all(one.failure is None for one in found), found
        return {one.way: one for one in found}

    return serve


@pytest.fixture(scope="module")
def full(served_of):
    """The results on the float32 base."""
    return served_of(FULL, 0)


@pytest.fixture(scope="module")
def nf4(served_of):
    """The results on the NF4 base that multiplies in float32."""
    return served_of(NF4, 0, 2)


def test_a_merge_in_float32_gives_the_same_answers(full):
    """No token differs, and logits differ only by rounding of the sum."""
    found = compare_served(full["unmerged, float32"], full["merged into float32"])
    assert (found.answers.count, found.answers.of, found.tokens.count, found.tokens.of) == (0, 4, 0, 24)
    assert 0 < found.difference_max < 1e-4
    assert found.kl_max_nats < 1e-9
    assert abs(found.loss_difference.value) < 1e-5


def test_a_missing_adapter_is_found(nf4):
    """Answers, logits and losses differ."""
    found = compare_served(nf4["unmerged, nf4"], nf4["no adapter, nf4"])
    assert found.answers.count == 4
    assert found.tokens.count > 0
    assert found.kl_mean_nats.value > 1e-3


def test_merging_into_nf4_loses_and_into_dequantised_weights_does_not(nf4):
    """A merge into NF4 differs measurably; a merge into dequantised weights differs only by the 4-bit product, which is
    in bfloat16 on CPUs where bitsandbytes repacks weights."""
    reference = nf4["unmerged, nf4"]
    into, dequantised = (compare_served(reference, nf4[way]) for way in ("merged into nf4", "merged, nf4 dequantised"))
    assert dequantised.answers.count == 0
    assert dequantised.difference_max < 0.05 < into.difference_max
    assert into.kl_mean_nats.value > 100 * dequantised.kl_mean_nats.value
    assert into.cosine_mean.value > 0.9  # not garbage, as a merge into repacked weights would give


def test_a_serving_mode_that_raises_fails_alone(request_of, full, monkeypatch, tmp_path):
    """The other modes of its group are kept, with the reason of the failure. After a failed reference no other mode is
    served, as with an adapter of another shape."""
    monkeypatch.setattr(peft_methods, "merge", lambda model: (_ for _ in ()).throw(RuntimeError("no merge today")))
    fragment = adapters.serve_adapter(request_of(FULL, 0, full["unmerged, float32"].answers))
    *others, merged = codec.from_json(tuple[ServedAnswers, ...], fragment.tokens["served"], "served")
    assert [one.failure for one in others] == [None, None]
    assert "no merge today" in merged.failure.message
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 7)}, tmp_path / "adapter_model.safetensors")
    request = dataclasses.replace(request_of(FULL, 0), adapter=str(tmp_path))
    (only,) = codec.from_json(tuple[ServedAnswers, ...], adapters.serve_adapter(request).tokens["served"], "served")
    assert only.failure.kind == "RuntimeError"


@pytest.fixture
def pair():
    """Two similar sets of logits with more positions than one chunk."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(ROWS * 2 + 3, 40)) * 4
    return reference, reference + rng.normal(size=reference.shape) * 0.5


def test_every_distance_equals_numpy_s(pair):
    """KL divergence, argmax agreement, differences and cosine equal their definitions."""
    reference, other = pair
    found = measure_distance(torch.tensor(reference), torch.tensor(other))

    def distribution(logits):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    p, q = distribution(reference), distribution(other)
    kl = (p * np.log(p / q)).sum(axis=1)
    difference = np.abs(reference - other)
    cosine = (reference * other).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
    assert found.positions == len(reference)
    assert found.argmax_differs == (reference.argmax(1) != other.argmax(1)).sum() > 0
    assert (found.kl_mean_nats, found.kl_max_nats) == pytest.approx((kl.mean(), kl.max()))
    assert (found.difference_mean, found.difference_max) == pytest.approx((difference.mean(), difference.max()))
    assert (found.cosine_mean, found.cosine_min) == pytest.approx((cosine.mean(), cosine.min()))


def test_losses_are_of_each_sequence():
    """In rows of two sequences, each loss is the mean over the labelled tokens; a sequence without a label has none."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 8, 11)), rng.integers(0, 11, size=(2, 8))
    labels[:, [0, 4]] = -100
    labels[1, 4:] = -100
    labels[0, 2] = -100
    found = sequence_losses(torch.tensor(logits), torch.tensor(labels), 4)
    wanted = []
    for row, start in ((0, 0), (0, 4), (1, 0)):
        places = [place for place in range(start + 1, start + 4) if labels[row, place] != -100]
        each = [np.log(np.exp(logits[row, at - 1]).sum()) - logits[row, at - 1, labels[row, at]] for at in places]
        wanted.append(np.mean(each))
    assert found == pytest.approx(wanted, rel=1e-6)
