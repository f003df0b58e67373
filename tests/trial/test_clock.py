"""Tests of the stopwatch and of the resident bytes of a step."""

from __future__ import annotations

import time

import torch
from torch import nn

from lorameter.machine.memory import PeakMemoryTracker, host_bytes
from lorameter.trial.memory import resident_bytes
from lorameter.trial.process import Stopwatch


def test_a_lap_has_wall_and_cpu_time():
    """Sleeping takes wall time but no CPU time."""
    result, lap = Stopwatch("cpu")(lambda: time.sleep(0.05) or 7)
    assert result == 7
    assert lap.time_s >= 0.05 > lap.cpu_time_s


def test_the_host_peak_is_that_of_its_phase():
    """Freed memory counts for its own phase and not for the next one."""
    gauge = PeakMemoryTracker("cpu")
    gauge.begin()
    before = host_bytes("VmRSS")
    block = torch.ones(64 * 2**20 // 4)
    del block
    peak = gauge.peaks("load")["host_peak_load_bytes"]
    assert peak >= before + 60 * 2**20
    gauge.begin()
    assert gauge.peaks("train")["host_peak_train_bytes"] < peak - 30 * 2**20


def test_resident_bytes_are_exact_by_kind():
    """Frozen base, adapter, gradients and two Adam moments are exact to the byte; tied tensors count once."""
    model = nn.ModuleDict({"base": nn.Linear(8, 4, bias=False), "adapter": nn.Linear(4, 2, bias=False)})
    model["twin"] = nn.Linear(8, 4, bias=False)
    model["twin"].weight = model["base"].weight
    model["base"].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([model["adapter"].weight])
    model["adapter"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert resident_bytes(model, optimizer) == {
        "base_weight_bytes": 8 * 4 * 4,
        "quantization_state_bytes": 0,
        "adapter_bytes": 4 * 2 * 4,
        "gradient_bytes": 4 * 2 * 4,
        "optimizer_state_bytes": 2 * 4 * 2 * 4 + 4,  # plus the step counter
        "paged_optimizer_state_bytes": 0,
    }


def test_the_scales_of_int8_layers_are_counted_after_a_forward():
    """bitsandbytes moves the scales, one float32 for each row, from the weight to the layer's state."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(32, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    before = resident_bytes(layer, optimizer)
    layer(torch.randn(2, 64))
    after = resident_bytes(layer, optimizer)
    assert before["quantization_state_bytes"] == after["quantization_state_bytes"] == 32 * 4
    assert before["base_weight_bytes"] == after["base_weight_bytes"] == 32 * 64
