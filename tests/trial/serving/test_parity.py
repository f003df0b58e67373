"""Tests of an adapter with a large effect in several serving modes: equivalent modes agree, and a fault is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorameter.models import catalogue
from lorameter.parity.judgement import compare_served
from lorameter.records import codec
from lorameter.records.parity import Served
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import ServingRequest, TrialRequest, serving_modes
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving import parity

WORKLOAD = Workload(
    sequence_length=32, batch_size=2, train_sequences=8, held_out_records=4, held_out_sequences=2, prompt_tokens=8,
    new_tokens=6,
)  # fmt: skip
FULL = LoraVariant(name="full", r=4, dtype="float32")
NF4 = LoraVariant(name="nf4", r=4, dtype="float32", quantization="nf4", compute_dtype="float32")
SOURCE = catalogue.resolve(WORKLOAD.model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter with a non-zero B, which changes logits by whole numbers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = peft_methods.attach(load_base(SOURCE, FULL, device="cpu", seed=WORKLOAD.data_seed), FULL)
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
    tokens = prepare(WORKLOAD, folder)

    def make(variant, group, reference=()):
        scratch = folder / variant.name
        scratch.mkdir(exist_ok=True)
        trial = TrialRequest(
            trial="r1", variant=variant, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
            interleaving="separate", measures=(), device="cpu", threads=1, tokens_path=tokens.path,
            scratch=str(scratch), log_path=str(folder / "log"),
        )  # fmt: skip
        return ServingRequest(
            trial=trial, adapter=str(adapter), ways=serving_modes(variant)[group], reference=reference
        )

    return make


@pytest.fixture(scope="module")
def served_of(request_of):
    """A function that returns the results of all serving modes of a variant, by name."""

    def serve(variant):
        found = []
        for group in range(len(serving_modes(variant))):
            fragment = parity.serve_adapter(request_of(variant, group, found[0].answers if found else ()))
            found += codec.from_json(tuple[Served, ...], fragment.tokens["served"], "served")
        assert all(one.failure is None for one in found), found
        return {one.way: one for one in found}

    return serve


@pytest.fixture(scope="module")
def full(served_of):
    """The results on the float32 base."""
    return served_of(FULL)


@pytest.fixture(scope="module")
def nf4(served_of):
    """The results on the NF4 base that multiplies in float32."""
    return served_of(NF4)


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


def test_a_serving_mode_that_raises_fails_alone(request_of, full, monkeypatch):
    """The other modes of its group are kept, with the reason of the failure. After a failed reference no other mode is
    served."""
    monkeypatch.setattr(peft_methods, "merge", lambda model: (_ for _ in ()).throw(RuntimeError("no merge today")))
    fragment = parity.serve_adapter(request_of(FULL, 0, full["unmerged, float32"].answers))
    *others, merged = codec.from_json(tuple[Served, ...], fragment.tokens["served"], "served")
    assert [one.failure for one in others] == [None, None]
    assert "no merge today" in merged.failure.message
    lost = dataclasses.replace(request_of(FULL, 0), adapter="/nowhere")
    (only,) = codec.from_json(tuple[Served, ...], parity.serve_adapter(lost).tokens["served"], "served")
    assert only.failure is not None
