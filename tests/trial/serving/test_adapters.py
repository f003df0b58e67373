"""Tests of several adapters on one base: each row has its adapter's answer, and a wrong adapter is reported."""

from __future__ import annotations

import dataclasses

import pytest
from peft.tuners.lora.layer import Linear

from lorameter.records.metrics import samples_of
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.serving.generate import generate

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
    model = running._built.trainee.model
    prompts, names = running._built.stream.prompts(0), running._serving.name_rows(0)
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
    assert samples_of(record, "mixing_factor") == tuple(m / a for a, m in zip(alone_s, mixed_s, strict=True))
    switched = zip(samples["switch_time_s"], samples["switched_request_time_s"], alone_s, strict=True)
    assert samples_of(record, "switching_factor") == tuple((switch + other) / one for switch, other, one in switched)
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
        "attach_drawn",
        lambda model, variant, name, seed: peft_methods.attach_beside(model, variant, name),
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
    assert len(samples_of(record, "switching_factor")) == 1
    record = record.merged(running.run("merge")).merged(running.run("request"))
    assert list(running._built.trainee.model.peft_config) == ["default"]
    assert (record.status, len(record.samples["merged_request_time_s"])) == ("ok", 1)


def test_a_row_computed_with_another_adapter_is_reported(begin, monkeypatch):
    """The fault swaps adapters between rows during decoding only, where rows are one token long."""
    honest = Linear._mixed_batch_forward

    def shuffled(self, x, *args, adapter_names, **kwargs):
        names = [*adapter_names[-1:], *adapter_names[:-1]] if x.shape[1] == 1 else adapter_names
        return honest(self, x, *args, adapter_names=names, **kwargs)

    monkeypatch.setattr(Linear, "_mixed_batch_forward", shuffled)
    _, record = begin()
    assert (record.status, record.failure.kind) == ("invalid", "MixedAnswers")
