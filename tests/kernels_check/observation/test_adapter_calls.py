"""Each call of an adapter's layer is noted with the parts of it that ran."""

import pytest
import torch
from torch import nn

from kernels_check.observation.adapter_calls import AdapterCalls
from kernels_check.observation.calls import CallRecorder


class Layer(nn.Module):
    """A layer of one's own; a factor may be shared with another."""

    def __init__(self, factor, base):
        super().__init__()
        self.base_layer, self.lora_A = base, factor
        self.lora_drop = nn.Dropout(0.5)

    def forward(self, x, *, dropped=True):
        return self.base_layer(x) + self.lora_A(self.lora_drop(x) if dropped else x)


def test_a_part_counts_for_the_layer_in_whose_call_it_ran():
    """A factor that two layers share counts for the inner one while that runs, and for the outer one after it."""
    factor = nn.Linear(4, 4)
    model = nn.ModuleDict({"outer": Layer(factor, Layer(factor, nn.Linear(4, 4)))})
    calls = AdapterCalls(model)
    with calls.watched():
        model["outer"](torch.ones(1, 4))
        model["outer"].base_layer(torch.ones(1, 4), dropped=False)
        factor(torch.ones(1, 4))
    inner = "outer.base_layer"
    assert [call.ran for call in calls.layers["outer"]] == [{"outer.lora_A": 0.0, "outer.lora_drop": 0.5}]
    assert [call.ran for call in calls.layers[inner]] == [
        {f"{inner}.lora_A": 0.0, f"{inner}.lora_drop": 0.5},
        {f"{inner}.lora_A": 0.0},
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_drops_by_its_probability_in_training_alone(training):
    """In evaluation it runs, and drops nothing."""
    model = Layer(nn.Linear(4, 4), nn.Linear(4, 4)).train(training)
    calls = AdapterCalls(model)
    with calls.watched():
        model(torch.ones(1, 4))
    assert calls.layers[""][0].ran["lora_drop"] == (0.5 if training else 0.0)


def test_a_call_is_aside_where_the_whole_entry_records_no_gradients():
    """By the log of all calls; without one none is, and each has its number there."""
    model = nn.Sequential(Layer(nn.Linear(4, 4), nn.Linear(4, 4)))
    log, calls, alone = CallRecorder(model), AdapterCalls(model), AdapterCalls(model)
    with log.hooked(), calls.watched(log=log), alone.watched():
        with torch.no_grad():
            model(torch.ones(1, 4))
        model(torch.ones(1, 4))
    assert [(call.aside, call.number) for call in calls.layers["0"]] == [(True, 1), (False, 6)]
    assert [(call.aside, call.number) for call in alone.layers["0"]] == [(False, None), (False, None)]
