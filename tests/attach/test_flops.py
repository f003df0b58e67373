"""Tests of the FLOPs of a script's step on constructed steps, since no device with a known peak is needed to count."""

import pytest
import torch

from lorameter.attach.measures import StepSamples, Work
from lorameter.attach.observer import StepReading, TrainingInfo, weak_reference
from lorameter.models.costs.flops import StepTokens, training_flops
from lorameter.models.shapes import shape_of_config
from lorameter.studies.variant import LoraVariant

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gathered():
    """Steps of two rows with ten real tokens each."""
    found = StepSamples(None)
    for number in range(1, 21):
        found.add(StepReading(
            number=number, step_time_s=0.1, cpu_time_s=0.1, sequences=2, real_tokens=20, padded_tokens=32
        ))  # fmt: skip
    return found.samples()


def work(model):
    return Work(TrainingInfo(
        source="trainer", model=weak_reference(model), planned_steps=None, trainable_parameters=1, total_parameters=1,
        accumulation=1,
    ))  # fmt: skip


TOKENS = StepTokens(positions=20, pairs=110, passes=1)


def test_an_adapter_is_counted_as_that_of_a_variant(make_model, gathered):
    """The count uses shape, ranks and targets of the given model; the peak is that of the dtype of its products."""
    model = make_model()
    shape = shape_of_config(model.config.to_dict(), "model")
    values = work(model).values(gathered, H100)
    variant = LoraVariant(r=8, target_modules=("q_proj", "v_proj"))
    assert values["model_flops_per_step"] == training_flops(shape, variant, TOKENS).model
    assert values["peak_flops_per_s"] == pytest.approx(66.9e12)
    assert work(model.to(torch.bfloat16)).values(gathered, H100)["peak_flops_per_s"] == pytest.approx(989.4e12)


def test_unknown_peaks_and_flops_are_left_out(make_model, gathered):
    """An unlisted device has no peak; a model without a configuration and steps with unknown tokens have no FLOPs."""
    assert "peak_flops_per_s" not in work(make_model()).values(gathered, "Test CPU")
    assert work(torch.nn.Linear(2, 2)).values(gathered, H100) == {}
    unseen = StepSamples(None)
    unseen.add(StepReading(number=1, step_time_s=0.1, cpu_time_s=0.1))
    assert work(make_model()).values(unseen.samples(), H100) == {}
