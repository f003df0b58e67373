"""What a step of a script needs of its device: constructed, as no device with a stated peak is needed to count."""

import dataclasses

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorameter.attach.measures import Work
from lorameter.attach.observer import StepReading, TrainingInfo, weakly
from lorameter.attach.samples import StepSamples
from lorameter.models.costs.flops import StepTokens, six_n, training_flops
from lorameter.models.shapes import shape_of_config
from lorameter.records.metrics import samples_of
from lorameter.records.record import TrialRecord
from lorameter.studies.variant import Variant

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gathered():
    """Steps of two rows with ten real tokens each."""
    found = StepSamples(None)
    for number in range(1, 21):
        found.add(StepReading(
            number=number, step_time_s=0.1, cpu_time_s=0.1, sequences=2, real_tokens=20, padded_tokens=32
        ))  # fmt: skip
    return found


def work(model):
    return Work(TrainingInfo(
        source="trainer", model=weakly(model), planned_steps=None, trainable_parameters=1, total_parameters=1,
        accumulation=1,
    ))  # fmt: skip


TOKENS = StepTokens(positions=20, pairs=110, passes=1)


def test_an_adapter_is_counted_as_that_of_a_variant(make_model, gathered):
    """By the shape, ranks and targets of the model at hand; the peak is that of the type it multiplies in."""
    model = make_model()
    shape = shape_of_config(model.config.to_dict(), "model")
    values = work(model).values(gathered, H100)
    variant = Variant(r=8, target_modules=("q_proj", "v_proj"))
    assert values["model_flops_per_step"] == training_flops(shape, variant, TOKENS).model
    assert values["peak_flops_per_s"] == pytest.approx(66.9e12)
    assert work(model.to(torch.bfloat16)).values(gathered, H100)["peak_flops_per_s"] == pytest.approx(989.4e12)


def test_a_model_without_an_adapter_trains_all(make_model, gathered):
    """6 N; inside what distributes it, too."""
    model = make_model().get_base_model()
    del model.peft_config
    shape = shape_of_config(model.config.to_dict(), "model")
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert work(wrapped).values(gathered, H100)["model_flops_per_step"] == six_n(shape, TOKENS)


def test_a_family_that_is_not_known_is_counted_from_its_modules(gathered):
    """Of one without an adapter three products a weight, and attention; an adapter leaves out the third."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", vocab_size=128, **small))
    weights = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128) + 64 * 128
    attention = 6 * 2 * 110 * 2 * 64
    assert work(model).values(gathered, H100)["model_flops_per_step"] == 6 * 20 * weights + attention
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert 4 * 20 * weights < work(adapted).values(gathered, H100)["model_flops_per_step"] < 6 * 20 * weights


def test_what_is_not_known_is_left_out(make_model, gathered):
    """A device that is not listed, a model without a configuration, steps whose tokens nobody saw."""
    assert "peak_flops_per_s" not in work(make_model()).values(gathered, "Test CPU")
    assert work(torch.nn.Linear(2, 2)).values(gathered, H100) == {}
    unseen = StepSamples(None)
    unseen.add(StepReading(number=1, step_time_s=0.1, cpu_time_s=0.1))
    assert work(make_model()).values(unseen, H100) == {}


def test_mfu_follows_from_both():
    """Of each step; nothing where one is missing."""
    record = TrialRecord(
        trial="r0-x", status="ok", name="x", variant="v", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples={"step_time_s": (0.5, 1.0)},
        values={"model_flops_per_step": 1e12, "peak_flops_per_s": 1e13},
    )  # fmt: skip
    assert samples_of(record, "mfu") == (0.2, 0.1)
    assert samples_of(msgspec.structs.replace(record, values={}), "mfu") == ()


def test_mfu_of_some_steps_is_told_on_the_way(make_model, gathered):
    """As many FLOPs as in the mean step, over their time and the peak; a step that a check looked on at is none of
    them, and where the tokens of one were not seen, or the device has no peak, nothing is said."""
    told = work(make_model())
    values = told.values(gathered, H100)
    plain = StepReading(number=1, step_time_s=0.1, cpu_time_s=0.1, sequences=2, real_tokens=20)
    slow, watched = dataclasses.replace(plain, step_time_s=0.3), dataclasses.replace(plain, step_time_s=9.0, checks=())
    expected = values["model_flops_per_step"] / 0.2 / values["peak_flops_per_s"]
    assert told.mfu([plain, slow, watched], H100) == {"mfu": pytest.approx(expected)}
    assert told.mfu([plain], "Test CPU") == {}
    assert told.mfu([plain, dataclasses.replace(plain, real_tokens=None)], H100) == {}
    assert told.mfu([watched], H100) == {}
    assert work(torch.nn.Linear(2, 2)).mfu([plain], H100) == {}
